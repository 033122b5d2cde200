import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv import models, ops
from fastadv.engine.trace import Tracer
from fastadv.ops import _library
from fastadv.ops.batch_norm import reference
from fastadv.testing import OpCase, check_op, check_values, laid_out

op = torch.ops.fastadv.batch_norm.default
backward = torch.ops.fastadv.batch_norm_backward.default
NHWC = {"memory_format": torch.channels_last}
EPS = 1e-5
FOLLOWED = list(itertools.product((True, False), repeat=2))  # by ReLU, by a residual sum
native = pytest.mark.skipif(
    _library.ops["batch_norm"].cpu != "native", reason="the CPU kernel is not in use"
)


class Calls(TorchDispatchMode):
    """Counts the calls of each op."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func] = self.count.get(func, 0) + 1
        return func(*args, **(kwargs or {}))

    def fused(self):
        return self.count.get(op, 0)


def tensors(shape, dtype=torch.float32, seed=0):
    """x, weight, bias and residual; x has a mean."""
    g = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(shape, generator=g) * 2 + mean for mean in (3, 0))
    weight, bias = (torch.randn(shape[1], generator=g) + mean for mean in (1, 0))
    return x.to(dtype), weight, bias, residual.to(dtype)


def nhwc(*maps):
    return [v.contiguous(**NHWC) if v.dim() == 4 else v for v in maps]


def make(shape, relu=True, added=True, dtype=torch.float32):
    x, weight, bias, residual = nhwc(*tensors(shape, dtype))
    inputs = [x, weight, bias, *([residual] if added else [])]

    def public(x, weight, bias, residual=None):
        return op(x, weight, bias, residual, EPS, relu)[0]

    def plain(x, weight, bias, residual=0):
        y = F.batch_norm(x, None, None, weight, bias, True, 0, EPS) + residual
        return y.relu() if relu else y

    args = (x, weight, bias, residual if added else None, EPS, relu)
    return OpCase("batch_norm", args, public, plain, tuple(range(len(inputs))))


def make_backward(shape, relu=True, added=True, dtype=torch.float32):
    x, weight, bias, residual = nhwc(*tensors(shape, dtype))
    y, mean, var = reference(x, weight, bias, residual, EPS, relu)
    (grad,) = nhwc(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    y, bias = (y if relu and added else None), (bias if relu and not added else None)
    args = (grad, y, x, weight, bias, mean, var, EPS, added)
    return OpCase("batch_norm_backward", args)


@pytest.mark.parametrize(("relu", "added"), FOLLOWED)
def test_op(relu, added):
    check_op(make((3, 5, 3, 4), relu, added))
    check_values(make_backward((3, 5, 3, 4), relu, added))


@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17, 31, 32, 33, 70])
def test_channels(channels):
    for relu, added in FOLLOWED:
        for size in (3, 9):  # 36 pixels, one chunk, and 324, several
            shape = 4, channels, size, size
            check_values(make(shape, relu, added), ("channels_last",))
            check_values(make_backward(shape, relu, added), ("channels_last",))


def test_more_pixels_than_chunks_of_64():
    for shape in ((5, 33, 30, 29), (1, 8, 64, 63), (1, 8, 64, 64)):
        check_values(make(shape), ("channels_last",))
        check_values(make_backward(shape), ("channels_last",))


@pytest.mark.parametrize("channels", [40, 70, 130])  # few channels' sums err by chance
def test_bfloat16(channels):
    for relu, added in FOLLOWED:
        shape = 4, channels, 9, 9
        check_values(make(shape, relu, added, torch.bfloat16), ("channels_last",))
        check_values(make_backward(shape, relu, added, torch.bfloat16), ("channels_last",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_run_as_plain_torch(dtype):
    x, weight, bias, residual = nhwc(*tensors((4, 40, 5, 5)))
    wide = torch.promote_types(dtype, torch.float32)
    args = x.to(dtype), weight.to(wide), bias.to(wide), residual.to(dtype), EPS, True
    for got, want in zip(op(*args), reference(*args), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("dtype", "largest", "rtol"), [(torch.float32, 3e4, 1e-6), (torch.bfloat16, 64, 1e-5)]
)
def test_a_large_mean_costs_no_digits(dtype, largest, rtol):
    x, weight, bias, _ = tensors((16, 32, 8, 8))
    x = (x + torch.linspace(0, largest, 32).view(32, 1, 1)).to(dtype).contiguous(**NHWC)
    var, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    _, got_mean, got_var = op(x, weight, bias, None, EPS, False)
    torch.testing.assert_close(got_mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(got_var.double(), var, rtol=rtol, atol=0)


def test_nan_stays_in_its_channel():
    x, weight, bias, residual = tensors((2, 40, 4, 4))
    x[0, 3, 1, 1] = torch.nan
    residual[1, 7, 2, 2] = torch.nan
    y = op(*nhwc(x, weight, bias, residual), EPS, True)[0]
    wrong = torch.zeros_like(y, dtype=torch.bool)
    wrong[:, 3], wrong[1, 7, 2, 2] = True, True
    assert torch.equal(y.isnan(), wrong)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_opcheck_of_grad_requiring_inputs(layout):
    *args, eps, relu = make((3, 5, 3, 4)).args
    args = [laid_out(arg, layout).detach().requires_grad_() for arg in args]
    torch.library.opcheck(op, (*args, eps, relu))
    case = make_backward((3, 5, 3, 4)).mapped(lambda t: laid_out(t, layout))
    torch.library.opcheck(backward, case.args)


@pytest.mark.parametrize(("relu", "added"), FOLLOWED)
def test_second_derivatives(relu, added):
    """They differentiate the statistics too."""
    case = make((3, 2, 3, 2), relu, added)
    inputs = [case.args[i].double().requires_grad_() for i in case.inputs]
    assert torch.autograd.gradgradcheck(case.public, inputs)


@pytest.mark.parametrize(("relu", "added"), FOLLOWED)
@pytest.mark.parametrize("changed", [0, 1, 2, 3, "y"])
def test_a_change_before_backward_is_refused_or_harmless(relu, added, changed):
    case = make((3, 5, 3, 4), relu, added)
    inputs = [case.args[i].clone().requires_grad_() for i in case.inputs]
    if changed == 3 and not added:
        return
    want = torch.autograd.grad(case.public(*inputs).sum(), inputs)
    y = case.public(*inputs)
    total = y.sum()
    with torch.no_grad():
        (y if changed == "y" else inputs[changed]).add_(1)
    read = {0, 1} | ({"y"} if relu and added else set()) | ({2} if relu and not added else set())
    if changed in read:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, inputs)
    else:
        for got, expected in zip(torch.autograd.grad(total, inputs), want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (0, 3)])
def test_only_what_requires_a_gradient_gets_one(wanted):
    case = make((3, 5, 3, 4))
    every = [case.args[i].clone().requires_grad_() for i in case.inputs]
    some = [v.detach().requires_grad_(i in wanted) for i, v in enumerate(every)]
    want = torch.autograd.grad(case.public(*every).sum(), every)
    total = case.public(*some).sum()
    total.backward(retain_graph=True)
    total.backward()
    for i, v in enumerate(some):
        assert (v.grad is not None) == (i in wanted)
        assert v.grad is None or torch.equal(v.grad, 2 * want[i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3)}, "x has shape"),
        ({0: torch.zeros(0, 5, 3, 4)}, "not empty"),
        ({0: torch.zeros(3, 5, 3, 4, dtype=torch.int32)}, "x is torch.int32"),
        ({1: torch.ones(4)}, "weight has shape"),
        ({2: torch.ones(5).double()}, "bias is torch.float64"),
        ({3: torch.ones(3, 5, 4, 3)}, "residual has shape"),
        ({3: torch.ones(3, 5, 3, 4).bfloat16()}, "residual is torch.bfloat16"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    args = [change.get(i, arg) for i, arg in enumerate(make((3, 5, 3, 4)).args)]
    with pytest.raises((TypeError, ValueError), match=message):
        op(*args)


def trained(call, norm, x, residual):
    """Output, gradients and statistics after two training calls of a copy of norm."""
    norm = copy.deepcopy(norm).train()
    for _ in range(2):
        inputs = [v.detach().clone().requires_grad_() for v in (x, residual)]
        y = call(norm, *inputs)
        grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
        grads = torch.autograd.grad(y, [*inputs, *norm.parameters()], grad)
    return y, *grads, norm.running_mean, norm.running_var, norm.num_batches_tracked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, F.relu, nn.ReLU(), F.silu])
def test_is_what_the_modules_do(activation, dtype):
    x, weight, bias, residual = tensors((6, 40, 5, 7), dtype)
    x, residual = x.contiguous(**NHWC), residual.contiguous(**NHWC)
    norm = nn.BatchNorm2d(40, momentum=0.3)
    norm.weight.data, norm.bias.data = weight, bias

    def modules(norm, x, residual):
        out = norm(x) + residual
        return out if activation is None else activation(out)

    def fused(norm, x, residual):
        return ops.batch_norm(norm, x, activation, residual)

    exact = trained(modules, copy.deepcopy(norm).double(), x.double(), residual.double())
    usual, ours = (trained(f, norm, x, residual) for f in (modules, fused))
    assert ours[0].is_contiguous(**NHWC)
    for want, theirs, got in zip(exact, usual, ours, strict=True):
        assert got.dtype == theirs.dtype
        bound = 2 * (theirs - want).abs().max() + 1e-6 * want.abs().max()
        assert (got - want).abs().max() <= bound


@native
def test_one_kernel_forward_and_one_backward():
    x, *_, residual = (laid_out(t, "channels_last").requires_grad_() for t in tensors((4, 8, 5, 5)))
    with Calls() as calls:
        ops.batch_norm(nn.BatchNorm2d(8), x, F.relu, residual).sum().backward()
    assert calls.count[op] == calls.count[backward] == 1
    assert torch.ops.aten.relu.default not in calls.count


def norm_without(*names):
    norm = nn.BatchNorm2d(8)
    for name in names:
        setattr(norm, name, None)
    return norm


def hooked_norm():
    norm = nn.BatchNorm2d(8)
    norm.register_forward_hook(lambda *_: None)
    return norm


def replaced_norm():
    norm = nn.BatchNorm2d(8)
    norm.forward = lambda x: 2 * x
    return norm


X, ADDED = nhwc(*torch.rand(2, 4, 8, 5, 5))
OTHERS = {
    "eval": (lambda: nn.BatchNorm2d(8).eval(), X, ADDED),
    "momentum": (lambda: nn.BatchNorm2d(8, momentum=None), X, ADDED),
    "affine": (lambda: nn.BatchNorm2d(8, affine=False), X, ADDED),
    "statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), X, ADDED),
    "bias": (lambda: norm_without("bias"), X, ADDED),
    "no statistics": (lambda: norm_without("running_mean", "running_var"), X, ADDED),
    "count": (lambda: norm_without("num_batches_tracked"), X, ADDED),
    "double": (lambda: nn.BatchNorm2d(8).double(), X.double(), ADDED),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), X, ADDED),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), X[:, :, 0, 0], None),
    "hooked": (hooked_norm, X, ADDED),
    "replaced": (replaced_norm, X, ADDED),
    "contiguous": (lambda: nn.BatchNorm2d(8), X.contiguous(), None),
    "half": (lambda: nn.BatchNorm2d(8), X.half(), None),
    "other layout": (lambda: nn.BatchNorm2d(8), X, ADDED.contiguous()),
    "other dtype": (lambda: nn.BatchNorm2d(8), X.bfloat16(), ADDED),
    "broadcast": (lambda: nn.BatchNorm2d(8), X, torch.ones(8, 1, 1)),
    "number": (lambda: nn.BatchNorm2d(8), X, 0.5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_to_the_module(name):
    make_norm, x, residual = OTHERS[name]
    norm, other = make_norm(), make_norm()
    with Calls() as calls:
        got = ops.batch_norm(norm, x, F.relu, residual)
    assert not calls.fused()
    want = other(x)
    assert torch.equal(got, F.relu(want if residual is None else want + residual))
    for key, value in other.state_dict().items():
        assert torch.equal(norm.state_dict()[key], value)


def test_hooks_see_what_they_wait_for():
    norm, relu, seen = nn.BatchNorm2d(8), nn.ReLU(), []
    handle = relu.register_forward_hook(lambda module, *_: seen.append(module))
    ops.batch_norm(norm, X, relu, ADDED)
    assert seen == [relu]
    handle.remove()
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    ops.batch_norm(norm, X, relu, ADDED)
    handle.remove()
    assert seen == [relu, norm, relu]
    ops.batch_norm(norm, X, relu, ADDED)
    assert len(seen) == 3


@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_derivatives(frozen):
    norm = nn.BatchNorm2d(8).requires_grad_(not frozen)
    tangents = []
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, ADDED)
        for y in (ops.batch_norm(norm, x, F.relu), F.relu(norm(x))):
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert torch.equal(*tangents)


@native
def test_calls_of_both_kinds_may_come_before_backward():
    norm = nn.BatchNorm2d(8)
    with Calls() as calls:
        maps = [ops.batch_norm(norm, v, F.relu) for v in (X.contiguous(), X, X.contiguous())]
    assert calls.fused() == 1
    sum(maps).sum().backward()
    assert norm.num_batches_tracked == 3


def test_one_value_per_channel_is_refused_as_by_the_module():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.batch_norm(nn.BatchNorm2d(8), torch.rand(1, 8, 1, 1))


def test_transforms_see_modules():
    norm, x = nn.BatchNorm2d(8), X.clone()

    def loss(x):
        return ops.batch_norm(copy.deepcopy(norm), x, F.relu).square().sum()

    want = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), want)
    net = models.get("digits_net", width=4).to(**NHWC)
    graph = Tracer("cpu").trace(net)
    assert (
        sum(
            isinstance(net.get_submodule(n.target), nn.BatchNorm2d)
            for n in graph.nodes
            if n.op == "call_module"
        )
        == 4
    )
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    x = torch.rand(4, 3, 8, 8).contiguous(**NHWC)
    torch.testing.assert_close(compiled(x), net(x))


@native
@pytest.mark.parametrize(
    "name", ["digits_net", "resnet18", "resnet20", "preact_resnet18", "wrn10_1", "mobilenet_v2"]
)
def test_networks_use_it(name):
    net = models.get(name, in_channels=3, width=8).to(**NHWC).train()
    norms = [
        key
        for key, module in net.named_modules()
        if isinstance(module, nn.BatchNorm2d) and "shortcut" not in key
    ]
    with Calls() as calls:
        net(torch.rand(2, 3, 32, 32).contiguous(**NHWC))
    assert calls.fused() == len(norms) > 0
