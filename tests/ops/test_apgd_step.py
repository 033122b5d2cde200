import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadv import ops
from fastadv.ops import _library, _native
from fastadv.ops.apgd_step import reference
from fastadv.testing import OpCase, check_op, check_values, run

NAMES = "x_adv x_old x_best grad_best x_found bad_gradients grad x step_size better_best "
NAMES = (NAMES + "better_found restart eps_per_sample eps weight norm lo hi").split()
FLAGS = [(b, f, r) for b in (False, True) for f in (False, True) for r in (False, True)]


def make(shape, norm="linf", eps=0.1, weight=0.75, box=(0.0, 1.0), seed=0, per_sample=False):
    """Sample i has the flags FLAGS[i % 8]; a tenth of the gradient is 0, two samples have holes."""
    g = torch.Generator().manual_seed(seed)
    lo, hi = box
    x = lo + (hi - lo) * torch.rand(shape, generator=g)
    x_adv, x_old, x_best, x_found = (
        (x + (2 * torch.rand(shape, generator=g) - 1) * eps).clamp(lo, hi) for _ in range(4)
    )
    grad, grad_best = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    grad[grad.abs() < 0.1] = 0
    if x.numel():
        grad[0].view(-1)[-1] = math.nan
        grad[-1].view(-1)[0] = -math.inf
    step_size = eps * (0.1 + 2 * torch.rand(shape[0], generator=g))
    flags = torch.tensor(FLAGS).repeat(shape[0] // 8 + 1, 1)[: shape[0]].unbind(1)
    args = (x_adv, x_old, x_best, grad_best, x_found, torch.tensor(7), grad, x, step_size)
    radii = eps * torch.linspace(0, 1, shape[0]) if per_sample else None
    numbers = radii, eps, weight, norm, lo, hi
    return OpCase("apgd_step_", (*args, *(f.clone() for f in flags), *numbers))


def arguments(values):
    """Those of the public function, whose eps is a number or one per sample."""
    radii, rest = values["eps_per_sample"], {k: values[k] for k in values if k != "eps_per_sample"}
    return rest if radii is None else rest | {"eps": radii}


def stepped(case, **changed):
    """{name: tensor} of all arguments after a call of the public function on copies."""
    values = dict(zip(NAMES, case.args, strict=True)) | changed
    values = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    ops.apgd_step_(**arguments(values))
    return values


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_op(norm, per_sample):
    check_op(make((9, 3, 4, 7), norm, per_sample=per_sample))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(9,), (9, 1, 1, 1)])
def test_a_radius_per_sample_is_that_samples(norm, shape):
    case = make((9, 3, 4, 7), norm, per_sample=True)
    values = dict(zip(NAMES, case.args, strict=True))
    together = stepped(case, eps_per_sample=values["eps_per_sample"].view(shape))
    for i, eps in enumerate(values["eps_per_sample"].tolist()):
        alone = stepped(case, eps_per_sample=None, eps=eps)
        assert all(torch.equal(alone[n][i], together[n][i]) for n in NAMES[:5])


def test_radii_are_checked():
    good = arguments(dict(zip(NAMES, make((4, 3, 2, 2)).args, strict=True)))
    for eps, match in (
        (torch.ones(3), r"eps has shape \(3,\), must be a float or one value per sample: \[4\]"),
        (torch.tensor([0.1, 0.1, 8.0, 0.1]), r"eps is 8, must be in \[0, 1.0\]"),
        (torch.tensor([0.1, -0.1, 0.1, 0.1]), "eps is -0.1, must be in"),
    ):
        with pytest.raises(ValueError, match=match):
            ops.apgd_step_(**good | {"eps": eps})


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("size", [0, 1, 7, 15, 16, 17, 31, 32, 33, 1000, 20001])
def test_sizes(norm, size):
    check_values(make((8, size), norm), layouts=("contiguous",))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4,), (2, 1, 1, 1), (17, 3, 8, 8)])
def test_shapes(shape, norm):
    check_values(make(shape, norm))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("box", [(0.3, 0.8), (-0.9, -0.2)])
def test_a_box_without_zero(norm, box):
    """What lies past the end of a sample counts nothing."""
    check_values(make((8, 19), norm, eps=0.2, box=box))


def test_bits_are_those_of_plain_torch():
    """linf in fp32 is exactly the sequence of torch ops, on every instruction set."""
    case = make((16, 3, 32, 32))
    expected = run(reference, case)
    for isa in _native.isas():
        _native.use_isa(isa)
        assert all(map(torch.equal, run(case.overload, case), expected))
    _native.use_isa(_native.isas()[0])


def test_the_step_is_that_of_the_paper():
    """Croce & Hein 2020, section 3: by hand, in one dimension, where no projection acts and where
    the ball's and the box's do."""
    x = torch.tensor([[0.5], [0.5], [0.05], [0.5]])
    x_adv = torch.tensor([[0.52], [0.58], [0.02], [0.52]])
    x_old = torch.tensor([[0.50], [0.50], [0.05], [0.50]])
    grad = torch.tensor([[2.0], [3.0], [-1.0], [-2.0]])
    #           z = 0.56, 0.6 (ball), 0.0 (box), 0.48; then 0.75 (z - x_adv) + 0.25 (x_adv - x_old)
    expected = torch.tensor([[0.555], [0.6], [0.0], [0.495]])
    step_size, none = torch.full((4,), 0.04), torch.zeros(4, dtype=torch.bool)
    flags = {"better_best": none, "better_found": none, "restart": none}
    for norm in ("linf", "l2"):
        now, before, kept = x_adv.clone(), x_old.clone(), [torch.zeros(4, 1) for _ in range(3)]
        bad = torch.tensor(0)
        out = ops.apgd_step_(
            now, before, *kept, bad, grad, x, step_size, **flags, eps=0.1, weight=0.75, norm=norm
        )
        assert out is now
        torch.testing.assert_close(now, expected)
        assert torch.equal(before, x_adv)
        assert bad == 0
        assert not any(k.any() for k in kept)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_is_kept_and_where_it_goes_on(norm):
    case = make((16, 3, 5, 4), norm)
    given, after = dict(zip(NAMES, case.args, strict=True)), stepped(case)
    clean = given["grad"].nan_to_num(nan=0, posinf=0, neginf=0)
    for i, (best, found, restart) in enumerate(FLAGS * 2):
        x_adv = given["x_adv"][i]
        assert torch.equal(after["x_found"][i], x_adv if found else given["x_found"][i])
        assert torch.equal(after["x_best"][i], x_adv if best else given["x_best"][i])
        assert torch.equal(after["grad_best"][i], clean[i] if best else given["grad_best"][i])
        start = given["x_best"][i] if restart and not best else x_adv
        assert torch.equal(after["x_old"][i], start)
    assert after["bad_gradients"] == 7 + 2
    # Going on from the best is a step from it without a word of the present point.
    none = torch.zeros(16, dtype=torch.bool)
    at_best = {"x_adv": given["x_best"], "grad": given["grad_best"], "restart": none}
    moved = stepped(case, **at_best)["x_adv"]
    rows = torch.tensor([restart and not best for best, _, restart in FLAGS * 2])
    assert torch.equal(after["x_adv"][rows], moved[rows])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_sample_with_many_holes_counts_once(norm):
    case = make((3, 3000), norm)
    grad = torch.ones(3, 3000)
    grad[1] = math.inf
    grad[2, 5] = grad[2, 2999] = math.nan
    assert stepped(case, grad=grad)["bad_gradients"] == 7 + 2


def test_mixed_layouts_do_not_mix_pixels():
    case = make((8, 3, 5, 4))
    expected = stepped(case)
    for names in (["grad"], ["x", "grad"], ["x_best"], NAMES[:5], [*NAMES[:5], "x"]):
        tensors = dict(zip(NAMES, case.args, strict=True))
        nhwc = {n: tensors[n].contiguous(memory_format=torch.channels_last) for n in names}
        after = stepped(case, **nhwc)
        assert all(torch.equal(after[n], expected[n]) for n in NAMES[:6])
    constant = {"grad": torch.ones(8, 3, 5, 1)}
    expanded = stepped(case, grad=constant["grad"].expand(8, 3, 5, 4))
    assert torch.equal(expanded["x_adv"], stepped(case, grad=torch.ones(8, 3, 5, 4))["x_adv"])


@pytest.mark.skipif(_library.ops["apgd_step_"].cpu != "native", reason="another backend")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_native_kernel_runs(norm, monkeypatch):
    """Also on channels_last images with another layout of the gradient; fp64 goes without it."""
    calls, run = [], _native.run
    monkeypatch.setattr(_native, "run", lambda *args: calls.append(1) or run(*args))
    case = make((3, 3, 5, 4), norm)
    stepped(case)
    nhwc = [a.contiguous(memory_format=torch.channels_last) for a in case.args[:5]]
    stepped(case, **dict(zip(NAMES, nhwc, strict=False)))
    assert len(calls) == 2
    double = case.mapped(lambda a: a.double() if a.is_floating_point() else a)
    assert stepped(double)["x_adv"].dtype == torch.float64
    assert len(calls) == 2


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_l2_step_has_full_length_at_any_gradient_scale(scale):
    x = torch.full((4, 50), 0.5)
    grad = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * scale
    values = {"x_adv": x, "x_old": x, "x": x, "grad": grad, "step_size": torch.full((4,), 0.1)}
    none = {"restart": torch.zeros(4, dtype=torch.bool)}
    case = make((4, 50), "l2", eps=1.0, weight=1.0)
    moved = stepped(case, **values, **none)["x_adv"]
    torch.testing.assert_close((moved - x).norm(dim=1), torch.full((4,), 0.1))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    eps=st.floats(0, 1),
    weight=st.floats(0, 1),
    norm=st.sampled_from(["linf", "l2"]),
    seed=st.integers(0, 999),
)
def test_stays_in_ball_and_box(shape, eps, weight, norm, seed):
    case = make(shape, norm, eps, weight, seed=seed)
    after = stepped(case)
    out, x = after["x_adv"], after["x"]
    assert out.min() >= 0
    assert out.max() <= 1
    order = math.inf if norm == "linf" else 2
    assert (out - x).norm(order, dim=1).max() <= eps + 1e-6


def test_everything_written_counts_as_mutated():
    values = dict(zip(NAMES, make((2, 3)).args, strict=True))
    before = {name: values[name]._version for name in NAMES[:6]}
    ops.apgd_step_(**arguments(values))
    assert all(values[name]._version > version for name, version in before.items())
    saved = values["x_best"].clone().requires_grad_()
    loss = (saved * saved).sum()
    with torch.no_grad():
        ops.apgd_step_(**arguments(values) | {"x_best": saved})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        ops.apgd_step_(**arguments(values) | {"x_adv": values["x_adv"].clone()})


def test_bad_arguments_name_themselves():
    case = make((4, 3, 2, 2))
    good = dict(zip(NAMES, case.args, strict=True))

    def fails(error, match, **changed):
        with pytest.raises(error, match=match):
            ops.apgd_step_(**arguments(good) | changed)

    for name in (*NAMES[1:5], "grad", "x"):
        tensor = good[name]
        fails(
            TypeError, f"{name} is torch.float64, must be torch.float32", **{name: tensor.double()}
        )
        fails(ValueError, rf"{name} has shape \(3, 2, 2\), must be \(4, 3,", **{name: tensor[0]})
    for name in NAMES[1:5]:
        fails(ValueError, f"x_adv overlaps {name} in memory", **{name: good["x_adv"]})
    fails(ValueError, "x_best overlaps x_found in memory", x_found=good["x_best"])
    fails(ValueError, "grad_best overlaps grad in memory", grad=good["grad_best"])
    fails(ValueError, "x_old overlaps x in memory", x=good["x_old"])
    half = {n: good[n].bfloat16() for n in (*NAMES[:5], "grad", "x")}
    fails(TypeError, "x_adv is torch.bfloat16, must be torch.float32", **half)
    fails(ValueError, "x is on meta, must be on cpu", x=good["x"].to("meta"))
    fails(TypeError, "bad_gradients is torch.int32", bad_gradients=torch.tensor(0).int())
    fails(ValueError, r"bad_gradients has shape \(1,\)", bad_gradients=torch.tensor([0]))
    fails(TypeError, "step_size is torch.float64", step_size=good["step_size"].double())
    fails(ValueError, r"step_size has shape \(3,\)", step_size=good["step_size"][:3])
    for name in ("better_best", "better_found", "restart"):
        fails(TypeError, f"{name} is torch.int64, must be torch.bool", **{name: good[name].long()})
        fails(ValueError, rf"{name} has shape \(3,\), must be \(4,\)", **{name: good[name][:3]})
    fails(ValueError, "eps is 8, .*did you mean 8/255", eps=8)
    fails(ValueError, "norm is 'l1', must be 'linf' or 'l2'", norm="l1")
    for name in NAMES[:5]:
        fails(RuntimeError, f"{name} requires grad", **{name: good[name].clone().requires_grad_()})
    assert all(map(torch.equal, make((4, 3, 2, 2)).args[:6], case.args[:6]))


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_sizes[33-linf]",
    "test_sizes[33-l2]",
    "test_a_box_without_zero[box0-l2]",
    "test_bits_are_those_of_plain_torch",
    "test_what_is_kept_and_where_it_goes_on[linf]",
    "test_what_is_kept_and_where_it_goes_on[l2]",
    "test_mixed_layouts_do_not_mix_pixels",
    "test_a_sample_with_many_holes_counts_once",
    "test_everything_written_counts_as_mutated",
)
REGISTERS = {"linf_ascent_kernel": 72, "l2_ascent_kernel": 64}
IMAGES, RADII = torch.empty(64, 3, 32, 32), torch.empty(64)
WRITTEN, BOOLS = ([IMAGES] * 5 + [torch.tensor(0)]), [torch.empty(64, dtype=torch.bool)] * 3
ROWS = IMAGES, IMAGES, RADII, *BOOLS  # grad, x, step_size and the flags
COMPILED = [
    (f"{norm}_ascent_kernel{name}", (*WRITTEN, *ROWS, eps, 0.1, 0.75, norm, 0.0, 1.0), narrow)
    for norm in ("linf", "l2")
    for name, eps, narrow in (("", None, 4), (" per sample", RADII, 5))
]
