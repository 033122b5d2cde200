import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from fastadv import ops
from fastadv.ops.feature_distance import reference
from fastadv.testing import LAYOUTS, OpCase, check_op, check_values, isas, laid_out, using_isa

DISTANCES = ("mse", "l2", "cosine")
HALVES = (torch.bfloat16, torch.float16)
op = torch.ops.fastadv.feature_distance.default


def plain(s, t, distance):
    s, t = (v.reshape(v.shape[0], -1) for v in (s, t))
    if distance == "mse":
        return (s - t).square().mean(dim=1)
    return (s - t).norm(dim=1) if distance == "l2" else 1 - F.cosine_similarity(s, t, dim=1)


def make(shape, distance, dtype=torch.float32, grads=(True, True), seed=0):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=g)
    teacher = (student + 0.5 * torch.randn(shape, generator=g)).to(dtype)
    return OpCase(
        "feature_distance",
        (student.to(dtype), teacher, distance, *grads),
        public=lambda s, t: ops.feature_distance(s, t, distance),
        plain=lambda s, t: plain(s, t, distance),
        inputs=(0, 1),
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_op(distance):
    check_op(make((3, 2, 3, 4), distance))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("size", [1, 7, 10, 15, 16, 17, 31, 32, 33, 100, 1000])
def test_sizes(size, distance, dtype):
    check_values(make((3, size), distance, dtype), ("contiguous", "offset", "strided"))
    check_values(make((2, size), distance, dtype, grads=(False, True)), ("contiguous",))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4, 0), (5,), (2, 5, 3, 3), (33, 3, 8, 8), (2, 7)])
def test_shapes(shape, distance):
    check_values(make(shape, distance, grads=(True, False)))
    check_values(make(shape, distance))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_sample_keeps_its_accuracy(distance, dtype):
    case = make((2, 500_000), distance, dtype)
    check_values(case, ("contiguous",))
    student, teacher, *rest = case.args
    exact = reference(student.double(), teacher.double(), *rest)[0]
    torch.testing.assert_close(op(*case.args)[0].double(), exact, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", [0.0, 2.0**-9, 1.5 * 2.0**-9, 3 * 2.0**-11, 2.0**-24, 1.0, 16.0])
def test_every_half_is_read_and_written_as_torch_does(dtype, offset):
    """mse over two elements has the gradient s - t: rounded once, ties to even."""
    student = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 2)
    teacher = torch.full_like(student, offset)
    expected = (student.float() - teacher.float()).to(dtype)
    for isa in isas():
        with using_isa(isa):
            gradient = op(student, teacher, "mse", True, False)[1]
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


def test_mixed_layouts_do_not_mix_pixels():
    nhwc = {"memory_format": torch.channels_last}
    student, teacher, *_ = make((2, 3, 5, 4), "l2").args
    for distance in DISTANCES:
        expected = op(student, teacher, distance, True, True)
        for s, t in ((student.contiguous(**nhwc), teacher), (student, teacher.contiguous(**nhwc))):
            for teacher_grad in (False, True):
                got = op(s, t, distance, True, teacher_grad)
                torch.testing.assert_close(got[0], expected[0])
                torch.testing.assert_close(got[1], expected[1])
                if teacher_grad:
                    torch.testing.assert_close(got[2], expected[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_has_the_strides_of_the_result(layout):
    """Compiled code trusts them."""
    student, teacher, *_ = make((2, 3, 5, 4), "l2").args
    laid = laid_out(student, layout)
    for distance in DISTANCES:
        for s, t in ((laid, teacher), (student, laid), (laid, laid)):
            for grads in ((True, True), (True, False)):
                real = op(s, t, distance, *grads)
                with FakeTensorMode() as mode:
                    fake = op(mode.from_tensor(s), mode.from_tensor(t), distance, *grads)
                assert [r.stride() for r in real] == [f.stride() for f in fake]


@pytest.mark.parametrize("distance", DISTANCES)
def test_opcheck_of_grad_requiring_inputs(distance):
    student, teacher, *_ = make((3, 2, 4), distance).args
    student.requires_grad_()
    torch.library.opcheck(op, (student, teacher, distance, True, False))
    torch.library.opcheck(op, (student, teacher.requires_grad_(), distance, True, True))


@pytest.mark.parametrize("size", [3, 40])
@pytest.mark.parametrize("both", [False, True])
def test_zero_vectors_and_zero_distance_have_gradient_zero(size, both):
    s = torch.zeros(2, size, requires_grad=True)
    t = torch.full((2, size), 0.0 if both else 2.0, requires_grad=True)
    for f in (op, reference):
        loss, *gradients = f(s.detach(), t.detach(), "cosine", True, True)
        assert loss.tolist() == [1, 1]
        assert not any(g.any() for g in gradients)
        loss, *gradients = f(t.detach(), t.detach(), "l2", True, True)
        assert loss.tolist() == [0, 0]
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("zero", [False, True])
def test_nan_and_infinity_stay_in_their_sample(distance, value, zero):
    student, teacher, *_ = make((3, 20), distance).args
    teacher[1, 17] = value
    student[1] *= not zero
    exact = reference(student, teacher, distance, True, True)
    got = op(student, teacher, distance, True, True)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g, e, equal_nan=True)
        assert g[0].isfinite().all()
        assert g[2].isfinite().all()
        assert not g[1].isfinite().all()


@pytest.mark.parametrize("scale", [1e-25, 1e-8, 1e25])
def test_l2_at_any_scale(scale):
    student, teacher, *_ = make((4, 50), "l2").args
    loss, gradient, _ = op(student * scale, teacher * scale, "l2", True, False)
    torch.testing.assert_close(loss / scale, plain(student, teacher, "l2"))
    torch.testing.assert_close(gradient.norm(dim=1), torch.ones(4))


def test_l2_too_small_for_a_direction_has_gradient_zero():
    student = torch.tensor([[1e-32, 0.0], [1e-28, 0.0]])
    for f in (op, reference):
        gradient = f(student, torch.zeros(2, 2), "l2", True, False)[1]
        torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 4), size=st.integers(1, 70), seed=st.integers(0, 999))
def test_properties(batch, size, seed):
    s, t, *_ = make((batch, size), "l2", seed=seed).args
    mse, l2, cosine = (ops.feature_distance(s, t, d) for d in DISTANCES)
    torch.testing.assert_close(l2.square() / size, mse)
    assert ((cosine >= -1e-6) & (cosine <= 2 + 1e-6)).all()
    torch.testing.assert_close(ops.feature_distance(3 * s, 0.5 * t, "cosine"), cosine)
    for d, value in zip(DISTANCES, (mse, l2, cosine), strict=True):
        assert torch.equal(ops.feature_distance(t, s, d), value)
        assert not ops.feature_distance(s, s, d).any()
    s.requires_grad_()
    (gradient,) = torch.autograd.grad(ops.feature_distance(s, t, "cosine").sum(), s)
    across = (gradient * s).sum(dim=1).abs()  # a longer vector has the same direction
    assert (across <= 1e-5).all()


def test_gradient_goes_to_whoever_requires_it():
    student, teacher, *_ = make((3, 20), "mse").args
    loss = ops.feature_distance(student, teacher.requires_grad_())
    (gradient,) = torch.autograd.grad(loss.sum(), teacher)
    torch.testing.assert_close(gradient, 2 * (teacher - student).detach() / 20)
    assert not ops.feature_distance(student, teacher.detach()).requires_grad


def test_bad_arguments_name_themselves():
    student, teacher, *_ = make((4, 6), "mse").args

    def fails(error, match, s=student, t=teacher, distance="mse"):
        with pytest.raises(error, match=match):
            ops.feature_distance(s, t, distance)

    fails(ValueError, r"teacher_features has shape \(3, 6\), must be \(4, 6\)", t=teacher[:3])
    fails(
        TypeError, "teacher_features is torch.bfloat16, must be torch.float32", t=teacher.bfloat16()
    )
    fails(TypeError, "student_features is torch.int64", s=student.long())
    fails(ValueError, "student_features has no batch dimension", s=student.sum(), t=teacher.sum())
    fails(ValueError, "teacher_features is on meta, must be on cpu", t=teacher.to("meta"))
    fails(ValueError, "distance is 'l1', must be 'mse', 'l2' or 'cosine'", distance="l1")


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_op[cosine]",
    "test_sizes[17-mse-dtype1]",
    "test_shapes[shape0-l2]",
    "test_shapes[shape1-mse]",
    "test_every_half_is_read_and_written_as_torch_does[0.0-dtype0]",
    "test_mixed_layouts_do_not_mix_pixels",
    "test_nan_and_infinity_stay_in_their_sample",
    "test_zero_vectors_and_zero_distance_have_gradient_zero",
)
REGISTERS = {"difference_kernel": 64, "cosine_kernel": 96}
SHAPES = (
    (512, torch.float32, "mse"),
    (1024, torch.bfloat16, "cosine"),
    (65536, torch.bfloat16, "l2"),
    (65536, torch.float32, "cosine"),
)
COMPILED = [
    (
        f"{'cosine' if distance == 'cosine' else 'difference'}_kernel {size} {dtype} {distance}",
        (*torch.empty(2, 64, size, dtype=dtype), distance, True, True),
        0,
    )
    for size, dtype, distance in SHAPES
]
