import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadv import ops
from fastadv.ops import _native
from fastadv.ops.pgd_step import reference
from fastadv.testing import OpCase, check_op, check_values

EPS, STEP = 8 / 255, 2 / 255


def make(shape, norm="linf", in_place=False, per_sample=False, eps=EPS, step=STEP, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g)
    x_adv = x + (2 * torch.rand(shape, generator=g) - 1) * 1.2 * eps
    grad = torch.randn(shape, generator=g)
    grad[grad.abs() < 0.1] = 0
    radius = torch.rand(shape[0], generator=g) * eps if per_sample else None
    args = (x_adv, grad, x, radius, 0.0 if per_sample else eps, step, norm, 0.0, 1.0)
    return OpCase("pgd_step_" if in_place else "pgd_step", args)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_op(norm, in_place, per_sample):
    eps, step = (EPS, STEP) if norm == "linf" else (0.5, 0.2)
    check_op(make((5, 3, 4, 7), norm, in_place, per_sample, eps, step))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("size", [0, 1, 7, 15, 16, 17, 31, 32, 33, 1000, 70001])
def test_sizes(norm, size):
    check_values(make((3, size), norm, in_place=True, eps=0.1, step=0.05))
    check_values(make((1, size), norm), layouts=("contiguous",))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4,), (2, 1, 1, 1), (33, 3, 8, 8)])
def test_shapes(shape):
    for norm in ("linf", "l2"):
        check_values(make(shape, norm, in_place=True))


def test_bits_are_those_of_plain_torch():
    """linf in fp32 is exactly the sequence of torch ops, on every instruction set."""
    case = make((9, 3, 32, 32))
    expected = reference(*case.args)
    for isa in _native.isas():
        _native.use_isa(isa)
        assert torch.equal(case.overload(*case.args), expected)
    _native.use_isa(_native.isas()[0])


def test_mixed_layouts_do_not_mix_pixels():
    x_adv, grad, x, *_ = make((2, 3, 5, 4)).args
    expected = ops.pgd_step(x_adv, grad, x, EPS, STEP)
    nhwc = {"memory_format": torch.channels_last}
    assert torch.equal(ops.pgd_step(x_adv, grad.contiguous(**nhwc), x, EPS, STEP), expected)
    assert torch.equal(ops.pgd_step(x_adv.contiguous(**nhwc), grad, x, EPS, STEP), expected)


def test_x_outside_the_box_ends_in_the_box():
    x = torch.tensor([[-0.2, 1.2, 0.5, -0.05]])
    case = OpCase("pgd_step", (x, torch.ones_like(x), x, None, 0.1, 0.05, "linf", 0.0, 1.0))
    check_values(case)
    assert case.overload(*case.args).tolist() == [[0.0, 1.0, pytest.approx(0.55), 0.0]]


def test_nan_and_zero_gradients_do_not_move():
    x = torch.full((2, 20), 0.5)
    grad = torch.zeros(2, 20)
    grad[0] = math.nan
    assert torch.equal(ops.pgd_step(x, grad, x, EPS, STEP), x)
    assert torch.equal(ops.pgd_step(x, torch.zeros_like(x), x, EPS, STEP, norm="l2"), x)
    grad[0, 1:] = 1  # one NaN leaves the sample without a direction
    assert torch.equal(ops.pgd_step(x, grad, x, EPS, STEP, norm="l2"), x)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_l2_step_has_full_length_at_any_gradient_scale(scale):
    x = torch.full((4, 50), 0.5)
    grad = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * scale
    moved = ops.pgd_step(x, grad, x, eps=1.0, step_size=0.1, norm="l2")
    torch.testing.assert_close((moved - x).norm(dim=1), torch.full((4,), 0.1))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40)),
    eps=st.floats(0, 1),
    step=st.floats(0, 2),
    norm=st.sampled_from(["linf", "l2"]),
    seed=st.integers(0, 999),
)
def test_stays_in_ball_and_box(shape, eps, step, norm, seed):
    x_adv, grad, x, *_ = make(shape, norm, eps=eps, seed=seed).args
    out = ops.pgd_step(x_adv, grad, x, eps, step, norm=norm)
    assert out.min() >= 0
    assert out.max() <= 1
    order = math.inf if norm == "linf" else 2
    assert (out - x).norm(order, dim=1).max() <= eps + 1e-6
    again = ops.pgd_step(out, torch.zeros_like(grad), x, eps, step, norm=norm)
    torch.testing.assert_close(again, out, rtol=0, atol=1e-6)  # projection is idempotent


def test_per_sample_eps_takes_both_shapes():
    x_adv, grad, x, *_ = make((3, 2, 4, 4)).args
    eps = torch.tensor([0.0, 0.01, 0.1])
    flat = ops.pgd_step(x_adv, grad, x, eps, STEP)
    assert torch.equal(flat, ops.pgd_step(x_adv, grad, x, eps.view(3, 1, 1, 1), STEP))
    assert torch.equal(flat[0], x[0])
    assert ((flat - x).abs().amax(dim=(1, 2, 3)) <= eps + 1e-7).all()


def test_in_place_returns_its_argument_and_counts_as_a_mutation():
    x_adv, grad, x, *_ = make((2, 3)).args
    before = x_adv._version
    assert ops.pgd_step_(x_adv, grad, x, EPS, STEP) is x_adv
    assert x_adv._version > before
    saved = x_adv.clone().requires_grad_()
    loss = (saved * saved).sum()
    with torch.no_grad():
        ops.pgd_step_(saved, grad, x, EPS, STEP)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        ops.pgd_step_(x_adv.clone(), grad, x, EPS, STEP)


def test_bad_arguments_name_themselves():
    x_adv, grad, x, *_ = make((4, 3, 2, 2)).args

    def fails(error, match, step=ops.pgd_step_, **changed):
        given = {"x_adv": x_adv, "grad": grad, "x": x, "eps": EPS, "step_size": STEP} | changed
        with pytest.raises(error, match=match):
            step(**given)

    fails(TypeError, "grad is torch.float64, must be torch.float32", grad=grad.double())
    fails(ValueError, r"grad has shape \(3, 2, 2\), must be \(4, 3, 2, 2\)", grad=grad[0])
    fails(ValueError, "x is on meta, must be on cpu", x=x.to("meta"))
    half = {"x_adv": x_adv.bfloat16(), "grad": grad.bfloat16(), "x": x.bfloat16()}
    fails(TypeError, "x_adv is torch.bfloat16, must be torch.float32", **half)
    fails(ValueError, r"eps has shape \(3,\), must be a float or one value", eps=torch.ones(3))
    fails(ValueError, r"eps has shape \(2, 2\)", eps=torch.ones(2, 2))
    fails(ValueError, r"eps is 8, .*did you mean 8/255", eps=8)
    fails(ValueError, "eps is -1, must be in", eps=-1.0, norm="l2")
    fails(ValueError, "eps is nan, must be in", eps=math.nan, norm="l2")
    fails(ValueError, "eps is 8, .*did you mean 8/255", eps=torch.full((4,), 8.0))
    fails(TypeError, "eps is '8/255', must be a number", eps="8/255")
    fails(ValueError, "norm is 'l1', must be 'linf' or 'l2'", norm="l1")
    fails(ValueError, "x_adv overlaps x in memory", x=x_adv)
    fails(ValueError, "x_adv overlaps grad in memory", grad=x_adv.view(2, 2, 3, 4).view(4, 3, 2, 2))
    leaf = x_adv.clone().requires_grad_()
    fails(RuntimeError, "x_adv requires grad", x_adv=leaf)
    assert torch.equal(leaf, x_adv)


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
@pytest.mark.gpu
def test_elements_beyond_two_to_the_31():
    """34 GB. `tests/kernels/test_triton_compile.py` reads the same off the machine code."""
    x = torch.zeros(2, 2**30 + 2**12, device="cuda")
    x_adv = ops.pgd_step(x, torch.ones_like(x), x, EPS, STEP)
    assert torch.equal(x_adv[1, -(2**13) :].cpu(), torch.full((2**13,), STEP))
    assert x_adv.max() == x_adv.min()


INTERPRETED = (
    "test_sizes[33-linf]",
    "test_sizes[33-l2]",
    "test_bits_are_those_of_plain_torch",
    "test_mixed_layouts_do_not_mix_pixels",
    "test_nan_and_zero_gradients_do_not_move",
)
REGISTERS = {"linf_kernel": 40, "l2_kernel": 64}
IMAGES, RADII = torch.empty(64, 3, 32, 32), torch.empty(64)
COMPILED = [
    (f"{norm}_kernel{name}", (IMAGES, IMAGES, IMAGES, eps, 0.1, 0.1, norm, 0.0, 1.0), narrow)
    for norm in ("linf", "l2")
    for name, eps, narrow in (("", None, 0), (" per sample", RADII, 1))
]
