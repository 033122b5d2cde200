import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import func, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv import data, freeze, models
from fastadv.engine.frozen import InPrecision
from fastadv.engine.student import FastConvolutions, FastStudent, _pointwise, _side_by_side, conv2d
from fastadv.runs.config import Config
from fastadv.train.build import build_method, build_nets

NHWC = {"memory_format": torch.channels_last}


class Convolutions(TorchDispatchMode):
    """Collects the shape of the input and the larger stride of every convolution that is run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.seen.append((tuple(args[0].shape), max(args[3])))
        return func(*args, **(kwargs or {}))


def make(batch, channels, out, size, kernel, groups=1, dtype=torch.bfloat16):
    """x, weight and bias, leaves in channels_last."""
    torch.manual_seed(0)
    shapes = (batch, channels, *size), (out, channels // groups, kernel, kernel), (out,)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in shapes)
    return [t.requires_grad_() for t in (x.contiguous(**NHWC), weight.contiguous(**NHWC), bias)]


def results(function, inputs, options, grad):
    """Output and gradients to x, weight and bias."""
    out = function(*inputs, *options)
    return out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))


# batch, in, out, (H, W), kernel, stride, groups; what the library gets: x's shape and the stride
FORMS = [
    ((32, 128, 24, (4, 4), 3, 1, 1), [((2, 128, 4, 80), 1)]),
    ((32, 128, 24, (8, 8), 3, 2, 1), [((2, 128, 8, 160), 2)]),
    ((12, 128, 24, (5, 7), 3, 2, 1), [((3, 128, 5, 32), 2)]),
    ((16, 128, 24, (6, 3), 3, 1, 1), [((1, 128, 6, 64), 1)]),
    ((3, 128, 24, (5, 6), 3, 1, 1), [((3, 128, 5, 7), 1)]),
    ((4, 24, 40, (5, 7), 1, 1, 1), []),
    ((4, 24, 40, (9, 7), 1, 2, 1), []),
    ((4, 40, 40, (9, 7), 3, 2, 40), [((4, 40, 9, 7), 1)]),
]


@pytest.mark.parametrize(("shape", "seen"), FORMS)
def test_forms_are_convolutions(shape, seen):
    *shape, stride, groups = shape
    kernel = shape[-1]
    options = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    inputs = make(*shape, groups)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    grad = torch.randn(F.conv2d(*inputs, *options).shape).bfloat16()
    with Convolutions() as run:
        out = conv2d(*inputs, *options)
    assert run.seen == seen
    assert out.is_contiguous(**NHWC)
    truth = results(F.conv2d, exact, options, grad)
    theirs = results(F.conv2d, inputs, options, grad)
    ours = results(conv2d, inputs, options, grad)
    for want, usual, got in zip(truth, theirs, ours, strict=True):
        assert got.dtype == torch.bfloat16
        assert got.shape == want.shape
        limit = 2 * (usual - want).abs().max() + 1e-6 * want.abs().max()
        assert (got - want).abs().max() <= limit


@pytest.mark.parametrize(
    ("dtype", "layout", "options"),
    [
        (torch.float32, torch.channels_last, ((1, 1), (1, 1), (1, 1), 1)),
        (torch.bfloat16, torch.contiguous_format, ((1, 1), (1, 1), (1, 1), 1)),
        (torch.bfloat16, torch.channels_last, ((1, 1), (0, 0), (1, 1), 1)),
        (torch.bfloat16, torch.channels_last, ((1, 1), (2, 2), (2, 2), 1)),
        (torch.bfloat16, torch.channels_last, ((2, 1), (1, 1), (1, 1), 1)),
        (torch.bfloat16, torch.channels_last, ((3, 3), (1, 1), (1, 1), 1)),
        (torch.bfloat16, torch.channels_last, ((1, 1), "same", (1, 1), 1)),
        (torch.bfloat16, torch.channels_last, (1, 1)),
        (torch.bfloat16, torch.channels_last, ((1, 1), (1, 1), (1, 1), 2)),
    ],
)
def test_others_are_left_alone(dtype, layout, options):
    groups = options[3] if len(options) == 4 else 1
    x, weight, bias = make(4, 128, 24, (8, 8), 3, groups, dtype)
    x = x.detach().contiguous(memory_format=layout)
    with Convolutions() as run:
        got = conv2d(x, weight, bias, *options)
        want = F.conv2d(x, weight, bias, *options)
    assert torch.equal(got, want)
    assert run.seen[0] == run.seen[1]


@pytest.mark.parametrize(("name", "width", "size"), [("resnet18", 64, 16), ("mobilenet_v2", 8, 32)])
def test_a_student_learns_the_same(name, width, size):
    torch.manual_seed(0)
    net = models.get(name, width=width).to(**NHWC).train()
    x, grad = torch.rand(8, 3, size, size).contiguous(**NHWC), torch.randn(8, 10)
    gradients = {}
    low = torch.bfloat16
    for kind, dtype in itertools.product((InPrecision, FastStudent), (torch.float32, low)):
        logits = kind(net, dtype)(x)
        parts = torch.autograd.grad(logits, list(net.parameters()), grad)
        gradients[kind, dtype] = torch.cat([logits.flatten(), *(p.flatten() for p in parts)])
    exact = gradients[InPrecision, torch.float32]
    assert torch.equal(gradients[FastStudent, torch.float32], exact)
    usual, ours = ((gradients[k, low] - exact).norm() for k in (InPrecision, FastStudent))
    assert 0 < ours <= 1.5 * usual
    assert not torch.equal(gradients[InPrecision, low], gradients[FastStudent, low])


def strided(dtype, layout, channels=8, stride=(2, 2), padding=(0, 0)):
    """x, weight and bias of a narrow 1x1 convolution, and its arguments after those."""
    x, weight, bias = make(5, channels, 16, (37, 36), 1, dtype=dtype)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    return [x, weight, bias], (stride, padding, (1, 1), 1)


@pytest.mark.parametrize("stride", [2, (3, 3), (4, 2), (1, 2), [2]])
@pytest.mark.parametrize("padding", [0, (0, 0), "valid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_narrow_strided_convolutions_take_their_pixels_first(stride, padding, dtype, layout):
    """The library, which would write outside its memory, gets no stride."""
    inputs, options = strided(dtype, layout, 15, stride, padding)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with Convolutions() as run, FastConvolutions():
        out = F.conv2d(*inputs, *options)
        F.conv2d(input=inputs[0], weight=inputs[1], stride=stride)
        F.conv2d(inputs[0][0], inputs[1], stride=stride)
    assert [step for _, step in run.seen] == [1, 1, 1]
    assert out.is_contiguous(memory_format=layout)
    grad = torch.randn(out.shape)
    for want, got in zip(
        results(F.conv2d, exact, options, grad), results(conv2d, inputs, options, grad), strict=True
    ):
        assert got.dtype == dtype
        tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding", "groups"),
    [(16, 1, 2, 0, 1), (8, 1, 1, 0, 1), (8, 1, 2, 1, 1), (8, 3, 2, 1, 1), (16, 1, 2, 0, 2)],
)
def test_no_other_convolution_is_changed_for_it(channels, kernel, stride, padding, groups):
    x, weight, bias = make(5, channels, 16, (9, 9), kernel, groups, torch.float32)
    options = (stride, stride), (padding, padding), (1, 1), groups
    with Convolutions() as run:
        got, want = conv2d(x, weight, bias, *options), F.conv2d(x, weight, bias, *options)
    assert torch.equal(got, want)
    assert run.seen[0] == run.seen[1]


NARROW = """
import sys
import torch
from torch import nn
from fastadv import models
from fastadv.engine.student import FastStudent

torch.set_num_threads(2)
widths, batches = (eval(arg) for arg in sys.argv[1:])
nhwc = {"memory_format": torch.channels_last}
for dtype, size in ((torch.float32, 16), (torch.bfloat16, 32)):
    for width in widths:
        layer = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False).to(**nhwc)
        model = FastStudent(nn.Sequential(layer, nn.Flatten()), dtype)
        for batch in batches:
            x = torch.randn(batch, width, size, size).contiguous(**nhwc)
            logits = model(x)
            weights = torch.randn(logits.shape)
            (found,) = torch.autograd.grad((logits * weights).sum(), layer.weight)
            pixels = x[:, :, ::2, ::2].double().transpose(0, 1).flatten(1)
            grad = weights.double().view(batch, 2 * width, -1).transpose(0, 1).flatten(1)
            exact = grad @ pixels.t()
            # Torch's own gradient without a stride: without AVX-512 it adds up in bfloat16.
            dense, cast = x[:, :, ::2, ::2].to(dtype, **nhwc), layer.weight.to(dtype)
            out = nn.functional.conv2d(dense, cast)
            (theirs,) = torch.autograd.grad(out, cast, weights.to(dtype).view_as(out))
            error, own = ((v[:, :, 0, 0] - exact).abs().max() for v in (found, theirs))
            bound = 2 * own + (1e-6 if dtype == torch.float32 else 2e-3) * exact.abs().max()
            assert error <= bound, (width, batch, error, own)
student = models.get("resnet18", width=8).to(**nhwc)
for _ in range(3):
    FastStudent(student)(torch.rand(53, 3, 16, 16).contiguous(**nhwc)).square().mean().backward()
"""


@pytest.mark.parametrize(
    ("widths", "batches"),
    [
        ("(4, 8, 15, 16, 17, 64)", "(1, 33, 53)"),
        pytest.param("range(4, 65)", "range(1, 65)", marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_no_gradient_writes_outside_its_memory(widths, batches):
    """In a process of its own, which glibc ends where it finds its memory overwritten."""
    env = os.environ | {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    command = [sys.executable, "-c", NARROW, widths, batches]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def second_order(function, x, weight):
    """Gradients to both of |d sum sin(function) / d (x, weight)|^2."""
    first = torch.autograd.grad(function(x, weight).sin().sum(), (x, weight), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))


# what computes it, how torch does, (batch, in, out, (H, W), kernel)
TWICE = {
    "pointwise": (
        lambda x, w: _pointwise(x, w, None, 2),
        lambda x, w: F.conv2d(x, w, None, 2),
        (4, 24, 5, (9, 7), 1),
    ),
    "side by side": (
        lambda x, w: _side_by_side(x, w, None, 2),
        lambda x, w: F.conv2d(x, w, None, 2, 1),
        (4, 24, 5, (9, 7), 3),
    ),
    "pixels first": (
        lambda x, w: conv2d(x, w, None, (3, 2)),
        lambda x, w: F.conv2d(x, w, None, (3, 2)),
        (4, 7, 5, (9, 7), 1),
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_forms_are_differentiable_twice(name):
    ours, torchs, shape = TWICE[name]
    x, weight, _ = make(*shape, dtype=torch.float64)
    for found, wanted in zip(
        second_order(ours, x, weight), second_order(torchs, x, weight), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(4, 24, 40, (9, 7), 1), (16, 128, 24, (4, 4), 3)])
def test_bfloat16_forms_are_differentiable_twice(shape):
    pad = shape[-1] // 2
    options = (None, (2, 2), (pad, pad), (1, 1), 1)
    x, weight, _ = make(*shape)
    scaled = (weight / 30).detach().requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, scaled)]
    found = second_order(lambda x, w: conv2d(x, w, *options), x, scaled)
    wanted = second_order(lambda x, w: F.conv2d(x, w, *options), *exact)
    for got, want in zip(found, wanted, strict=True):
        assert F.cosine_similarity(got.double().flatten(), want.flatten(), 0) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_under_transforms(dtype):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 1, 2), nn.Flatten()
    net, x = nn.Sequential(*layers).to(**NHWC).eval(), torch.rand(4, 3, 9, 9)
    ours, usual = (
        lambda image, kind=kind: kind(net, dtype)(image[None]).logsumexp(1).sum()
        for kind in (FastStudent, InPrecision)
    )
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.01}
    )
    for transform in (
        lambda f: func.vmap(func.grad(f))(x),
        lambda f: func.jvp(func.vmap(f), (x,), (x,))[1],
        lambda f: func.vmap(func.grad(lambda v: func.grad(f)(v).square().sum()))(x),
    ):
        torch.testing.assert_close(transform(ours), transform(usual), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_students_of_other_dtypes_that_return_more_than_logits(dtype):
    """They compute in their own dtype; images and the gradient to them stay float32."""
    net = Tuple(models.get("resnet18", width=4)).to(**NHWC)
    exact = copy.deepcopy(net).double()
    student = FastStudent(net.to(dtype))
    x, grad = torch.rand(8, 3, 8, 8).requires_grad_(), torch.randn(8, 10)
    logits = student(x)
    assert student.dtype == dtype
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found = torch.autograd.grad(logits, (x, net.net.linear.weight), grad.to(logits.dtype))
    assert [g.dtype for g in found] == [torch.float32, dtype]
    wanted = exact(x.double())[0]
    error = (logits - wanted).norm() / wanted.norm()
    assert error < (1e-12 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_twin_of_a_student_in_float64_is_exact(dtype):
    net, x = models.get("resnet18", width=4).eval(), torch.rand(4, 3, 8, 8).double()
    twin = freeze(FastStudent(net, dtype), torch.float64)
    torch.testing.assert_close(twin(x), net.double()(x), rtol=1e-12, atol=1e-12)


class Tuple(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        logits = self.net(x)
        return logits, {"features": logits}


def test_the_mode_ends_with_the_forward_pass():
    x, weight, _ = make(4, 24, 40, (5, 7), 1)
    with Convolutions() as run:
        with FastConvolutions():
            F.conv2d(x, weight, None, (1, 1), (0, 0), (1, 1), 1)
        assert run.seen == []
        F.conv2d(x, weight, None, (1, 1), (0, 0), (1, 1), 1)
    assert len(run.seen) == 1


def test_training_uses_it():
    config = Config(method="natural", data="digits", student="digits_net", precision_outer="bf16")
    nets, student = build_nets(config, data.load("digits"), build_method(config))
    assert isinstance(nets.student, FastStudent)
    assert nets.student.net is student
    assert nets.student.dtype == torch.bfloat16
