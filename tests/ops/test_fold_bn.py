import pytest
import torch
from torch import nn

from fastadv import ops
from fastadv.ops import _library
from fastadv.ops.fold_bn import reference
from fastadv.testing import assert_close

SHAPES = [(5, 3, 3, 3), (33, 1, 3, 3), (7, 130, 3, 3), (1, 1, 1, 1), (64, 32, 1, 1), (9, 1, 1)]
SHAPES += [(2, 3, 5, 2)]


def make(shapes=SHAPES, layout=torch.contiguous_format, seed=0):
    """(weights, biases, norms), in turn with and without a bias, a norm, its gamma and beta."""
    torch.manual_seed(seed)
    weights, biases, norms = [], [], []
    for i, shape in enumerate(shapes):
        weight, bias, mean, gamma, beta = (torch.randn(size) for size in (shape, *[shape[:1]] * 4))
        weights.append(weight.contiguous(memory_format=layout) if len(shape) == 4 else weight)
        biases.append(bias if i % 2 else None)
        affine = (None, None) if i % 3 == 1 else (gamma, beta)
        norms.append(None if i % 4 == 3 else (mean, torch.rand(shape[0]) + 0.01, *affine, 0.1**i))
    return weights, biases, norms


def outputs(weights, biases, norms, dtype):
    """(weights_out, biases_out) filled with NaN."""
    layouts = [torch.channels_last if w.dim() == 4 else torch.contiguous_format for w in weights]
    weights_out = [
        torch.empty_like(w, dtype=dtype, memory_format=layout).fill_(torch.nan)
        for w, layout in zip(weights, layouts, strict=True)
    ]
    biases_out = [
        None if bias is norm is None else w.new_full(w.shape[:1], torch.nan, dtype=dtype)
        for w, bias, norm in zip(weights, biases, norms, strict=True)
    ]
    return weights_out, biases_out


def folded(function, arguments, dtype):
    written = outputs(*arguments, dtype)
    function(*written, *arguments)
    return [tensor for tensors in written for tensor in tensors if tensor is not None]


def double(arguments):
    """The arguments in float64."""
    if isinstance(arguments, torch.Tensor):
        return arguments.double()
    return [double(a) for a in arguments] if isinstance(arguments, (list, tuple)) else arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values(layout, dtype):
    arguments = make(layout=layout)
    exact = folded(reference, double(arguments), torch.float64)
    same = folded(reference, arguments, dtype)
    got = folded(ops.fold_bn_, arguments, dtype)
    for i, parts in enumerate(zip(got, exact, same, strict=True)):
        assert_close(f"fold_bn_[{i}]", *parts)


def test_is_the_network_that_it_folds():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(5, 4, 3, bias=True).double(), nn.BatchNorm2d(4).double()
    norm(conv(torch.rand(9, 5, 8, 8, dtype=torch.float64)))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    parts = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    arguments = [conv.weight], [conv.bias], [parts]
    with torch.no_grad():
        weight, bias = folded(ops.fold_bn_, arguments, torch.float64)
    x = torch.rand(2, 5, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, bias), norm.eval()(conv(x)))


def test_a_weight_that_no_three_strides_describe():
    weights, biases, norms = make([(4, 3, 3, 3)])
    weights = [weights[0].mT.contiguous().mT]
    assert torch.equal(
        folded(ops.fold_bn_, (weights, biases, norms), torch.float32)[0],
        folded(ops.fold_bn_, make([(4, 3, 3, 3)]), torch.float32)[0],
    )


def test_follows_new_values_and_new_tensors():
    weights, biases, norms = make(SHAPES[:3])
    written = outputs(weights, biases, norms, torch.float32)
    for change in (lambda v: v.mul_(2), lambda v: v + 1):
        weights = [change(w) for w in weights]
        norms = [n and (change(n[0]), *n[1:]) for n in norms]
        versions = [w._version for w in written[0]]
        ops.fold_bn_(*written, weights, biases, norms)
        expected = folded(reference, (weights, biases, norms), torch.float32)
        got = [t for tensors in written for t in tensors if t is not None]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert all(w._version > v for w, v in zip(written[0], versions, strict=True))


@pytest.mark.skipif("triton" not in _library.ops["fold_bn_"].cpu, reason="of the Triton kernel")
def test_tables_are_made_once():
    from fastadv.kernels import fold_bn

    arguments = make(SHAPES[:1])
    written = outputs(*arguments, torch.bfloat16)
    before = fold_bn._tables.cache_info().misses
    for _ in range(3):
        ops.fold_bn_(*written, *arguments)
        arguments[0][0].mul_(2)
    assert fold_bn._tables.cache_info().misses == before + 1


def test_bad_arguments_name_themselves():
    names = ["weights_out", "biases_out", "weights", "biases", "norms"]
    good = make()
    good = dict(zip(names, (*outputs(*good, torch.float32), *good), strict=True))
    mean, var, *rest = good["norms"][0]

    def fails(error, match, i, **changed):
        """With another i-th element of some sequences."""
        columns = {n: [*good[n][:i], v, *good[n][i + 1 :]] for n, v in changed.items()}
        with pytest.raises(error, match=match):
            ops.fold_bn_(**good | columns)

    out, weight = good["weights_out"][0], good["weights"][0]
    fails(TypeError, r"weights_out\[0\] is torch.float16", 0, weights_out=out.half())
    second = good["weights_out"][1].bfloat16()
    fails(TypeError, r"weights_out\[1\] is .*bfloat16, must be .*float32", 1, weights_out=second)
    fails(ValueError, r"weights_out\[0\] has shape \(3,", 0, weights_out=out[:3])
    fails(ValueError, r"weights_out\[0\] is on meta", 0, weights_out=out.to("meta"))
    fails(ValueError, r"weights_out\[0\] has strides \(27, 9,", 0, weights_out=weight.clone())
    fails(TypeError, r"biases_out\[0\] is torch.bfloat16", 0, biases_out=mean.bfloat16())
    sparse = torch.empty(10)[::2]
    fails(ValueError, r"biases_out\[0\] has stride 2, must be", 0, biases_out=sparse)
    fails(TypeError, r"weights\[1\] is .*16, must be .*32", 1, weights=second)
    fails(ValueError, r"biases\[0\] has shape \(1,\), must be \(5,\)", 0, biases=mean[:1])
    fails(TypeError, r"mean\[0\] is torch.float64", 0, norms=(mean.double(), var, *rest))
    fails(ValueError, r"var\[0\] is on meta", 0, norms=(mean, var.to("meta"), *rest))
    fails(ValueError, r"var\[0\] has shape \(4,\)", 0, norms=(mean, var[:4], *rest))
    with pytest.raises(ValueError, match="shorter"):
        ops.fold_bn_(**good | {"biases": good["biases"][:-1]})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_on_a_gpu(dtype):
    arguments = make()
    exact = folded(reference, double(arguments), torch.float64)
    same = folded(reference, arguments, dtype)
    there = on_gpu(arguments)
    for _ in range(2):  # the second time by tables that are there
        got = folded(ops.fold_bn_, there, dtype)
        for i, (found, *expected) in enumerate(zip(got, exact, same, strict=True)):
            assert_close(f"fold_bn_[{i}]", found.cpu(), *expected)


def on_gpu(arguments):
    if isinstance(arguments, torch.Tensor):
        return arguments.cuda()
    return [on_gpu(a) for a in arguments] if isinstance(arguments, (list, tuple)) else arguments


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_values[layout0-dtype1]",
    "test_values[layout1-dtype0]",
    "test_tables_are_made_once",
    "test_a_weight_that_no_three_strides_describe",
    "test_follows_new_values_and_new_tensors",
)
REGISTERS = {"fold_bn_kernel": 48}
WEIGHT, ROW = torch.empty(64, 32, 3, 3), torch.empty(64)
COMPILED = [
    (
        f"fold_bn_kernel {dtype}",
        ([WEIGHT.to(dtype)], [ROW.to(dtype)], [WEIGHT], [ROW], [(ROW, ROW, ROW, ROW, 1e-5)]),
        None,
    )
    for dtype in (torch.bfloat16, torch.float32)
]
