import math

import pytest
import torch
import torch.nn.functional as F

from fastadv import ops
from fastadv.ops.bias_relu import Fused, reference, reference_backward
from fastadv.testing import assert_close

NHWC = torch.channels_last
SHAPES = [(2, 5, 3, 7), (1, 1, 1, 1), (3, 64, 8, 8), (0, 3, 2, 2), (5, 3, 1, 1)]
op, backward = torch.ops.fastadv.bias_relu.default, torch.ops.fastadv.bias_relu_backward.default


def fused(x, bias=None, residual=None, cap=math.inf):
    """`ops.bias_relu` as on a GPU."""
    return Fused.apply(x, bias, residual, cap)


FUNCTIONS = pytest.mark.parametrize("function", [ops.bias_relu, fused])


def make(shape=SHAPES[0], dtype=torch.float32, seed=0):
    """(x, bias, residual)"""
    g = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(shape, generator=g) for _ in range(2))
    bias = torch.randn(shape[1], generator=g).to(dtype)
    return x.to(dtype, memory_format=NHWC), bias, residual.to(dtype, memory_format=NHWC)


def torchs(x, bias=None, residual=None, cap=math.inf):
    """The same in torch's own ops."""
    v = x if bias is None else x + bias[:, None, None]
    v = v if residual is None else v + residual
    return F.relu(v) if cap == math.inf else F.hardtanh(v, 0.0, cap)


def gradients(y, inputs, create_graph=False):
    """Of two readers of y, a pair or a tensor, whose gradients differ."""
    first, second = y if isinstance(y, tuple) else (y, y)
    weight = torch.arange(second.shape[3])
    loss = (first**2).float().sum() + (second**3 * weight).float().sum()
    return torch.autograd.grad(loss, inputs, create_graph=create_graph)


@pytest.mark.parametrize("cap", [math.inf, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, cap):
    x, bias, residual = make(shape, dtype)
    for given in ((bias, residual), (None, residual), (bias, None), (None, None)):
        wide = (v if v is None else v.double() for v in given)
        exact, bits = reference(x.double(), *wide, cap)
        y, found = op(x, *given, cap)
        assert y.is_contiguous(memory_format=NHWC)
        assert_close("y", y, exact, reference(x, *given, cap)[0])
        assert torch.equal(found, bits)
        pair = fused(x, *given, cap)
        assert all(torch.equal(one, y) for one in pair)
        assert pair[0].data_ptr() == pair[1].data_ptr()


def test_bits_are_in_the_order_of_memory():
    x = torch.zeros(1, 3, 1, 3).to(memory_format=NHWC)
    x[0, 1, 0, 0] = x[0, 2, 0, 2] = 1.0
    assert op(x, None, None, math.inf)[1].tolist() == [0b10, 0b1]
    grad = torch.full_like(x, 2.0)
    assert torch.equal(backward(grad, None, torch.tensor([0b10, 0b1], dtype=torch.uint8)), 2 * x)


@FUNCTIONS
@pytest.mark.parametrize("cap", [math.inf, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_two_readers(dtype, cap, function):
    x, bias, residual = make((2, 5, 3, 7), dtype)
    for added in (residual, None):
        inputs = [v.requires_grad_() for v in (x, added) if v is not None]
        got = gradients(function(x, bias, added, cap), inputs)
        for found, expected in zip(
            got, gradients(torchs(x, bias, added, cap), inputs), strict=True
        ):
            torch.testing.assert_close(found, expected)
    y, _ = function(x, bias, None, cap)  # one reader
    (found,), (expected,) = (
        torch.autograd.grad(v.sum(), x) for v in (y, torchs(x, bias, None, cap))
    )
    assert torch.equal(found, expected)


@FUNCTIONS
def test_gradients_of_gradients(function):
    x, bias, residual = make((2, 3, 2, 3), torch.float64)
    inputs = x.requires_grad_(), residual.requires_grad_()
    for cap in (math.inf, 0.5):
        results = []
        for y in (function(x, bias, residual, cap), torchs(x, bias, residual, cap)):
            first = gradients(y, inputs, create_graph=True)
            results.append(torch.autograd.grad(sum((g**3).sum() for g in first), inputs))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)


def test_transforms_see_torchs_own_ops():
    x, bias, residual = make((2, 3, 2, 3))
    got = torch.func.grad(lambda v: (ops.bias_relu(v, bias, residual)[0] ** 2).sum())(x)
    assert torch.equal(got, torch.func.grad(lambda v: (torchs(v, bias, residual) ** 2).sum())(x))


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_infinity_and_zero(dtype, function):
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, 0.4, -1.0]
    x = torch.tensor(values, dtype=dtype).view(1, 1, 2, 4).to(memory_format=NHWC)
    for cap in (math.inf, 0.5):
        x.requires_grad_()
        y, _ = function(x, None, None, cap)
        expected = torchs(x, None, None, cap)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        found, wanted = (torch.autograd.grad(v.sum(), x)[0] for v in (y, expected))
        assert torch.equal(found, wanted)


@FUNCTIONS
def test_a_gradient_in_another_layout(function):
    x, bias, residual = make()
    x.requires_grad_()
    weight = torch.randn(x.shape)  # contiguous, and so is the gradient
    (grad,) = torch.autograd.grad((function(x, bias, residual)[0] * weight).sum(), x)
    assert torch.equal(grad, weight * (torchs(x, bias, residual) > 0))


def test_opcheck():
    x, bias, residual = make()
    torch.library.opcheck(op, (x, bias, residual, 6.0))
    torch.library.opcheck(backward, (x, residual, op(x, bias, None, 6.0)[1]))


def test_bad_arguments_name_themselves():
    x, bias, residual = make((2, 3, 4, 5))

    def fails(error, match, **changed):
        given = {"x": x, "bias": bias, "residual": residual} | changed
        with pytest.raises(error, match=match):
            ops.bias_relu(**given)

    fails(TypeError, "x is torch.int64", x=x.long())
    fails(TypeError, "x is a list, must be a tensor", x=[1.0])
    fails(ValueError, r"x has shape \(2, 3\), must be", x=torch.ones(2, 3))
    fails(ValueError, "x has strides .*, must be channels_last", x=x.contiguous())
    fails(TypeError, "residual is torch.float64, must be torch.float32", residual=residual.double())
    fails(ValueError, "residual has strides .*, must be channels", residual=residual.contiguous())
    fails(ValueError, r"bias has shape \(2,\), must be \(3,\)", bias=bias[:2])
    fails(ValueError, "bias requires grad, must be a constant", bias=bias.clone().requires_grad_())
    fails(ValueError, "cap is 0.0, must be above 0", cap=0.0)
    fails(ValueError, "cap is nan, must be above 0", cap=math.nan)
    with pytest.raises(ValueError, match=r"bits has shape \(1,\), must be \(15,\)"):
        backward(x, None, torch.zeros(1, dtype=torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    x, bias, residual = make((3, 64, 8, 8), dtype)
    y, bits = op(x.cuda(), bias.cuda(), residual.cuda(), 6.0)
    expected, wanted = reference(x, bias, residual, 6.0)
    assert torch.equal(y.cpu(), expected)
    assert torch.equal(bits.cpu(), wanted)
    grad = backward(y, x.cuda(), bits)
    assert torch.equal(grad.cpu(), reference_backward(expected, x, wanted))


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_values[(2, 5, 3, 7)-dtype0-inf]",
    "test_values[(3, 64, 8, 8)-dtype1-0.5]",
    "test_bits_are_in_the_order_of_memory",
    "test_gradients_of_two_readers[dtype0-0.5-bias_relu]",
    "test_nan_infinity_and_zero[dtype0-bias_relu]",
)
REGISTERS = {"bias_relu_kernel": 40, "bias_relu_backward_kernel": 40}
MAP = torch.empty(64, 64, 32, 32, dtype=torch.bfloat16)
COMPILED = [
    ("bias_relu_kernel", (MAP, MAP[0, :, 0, 0].contiguous(), MAP, math.inf), 0),
    (
        "bias_relu_backward_kernel",
        (MAP, MAP, torch.empty(MAP.numel() // 8, dtype=torch.uint8)),
        1,  # the bits
    ),
]
