import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from wide_rows import WIDE

from fastadv import losses, ops
from fastadv.ops import _library, _native
from fastadv.ops.softmax_kl import reference
from fastadv.testing import OpCase, assert_close, check_op, check_values

REDUCTIONS = ("none", "sum", "batchmean", "mean")
ALL = (True, True, True)


def plain(student, teacher, weight, temperature=1.0, reduction="batchmean"):
    """What people write."""
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    loss = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)
    loss = loss if weight is None else loss * weight
    count = {"sum": 1, "batchmean": len(student), "mean": student.numel()}
    return loss if reduction == "none" else loss.sum() / count[reduction]


def make(
    batch,
    classes,
    reduction="none",
    temperature=1.0,
    weighted=False,
    dtype=torch.float32,
    wanted=ALL,
    near=None,
    seed=0,
):
    """near: None, or the distance between the student's and the teacher's logits."""
    g = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(batch, classes, generator=g)
    noise = torch.randn(batch, classes, generator=g)
    student = 3 * noise if near is None else teacher + near * noise
    weight = torch.rand(batch, generator=g) if weighted else None
    inputs = (0, 1, 2) if weighted else (0, 1)
    return OpCase(
        "softmax_kl",
        (student.to(dtype), teacher.to(dtype), weight, temperature, reduction, *wanted),
        public=lambda s, t, w=None: losses.kl(s, t, temperature, reduction, w),
        plain=lambda s, t, w=None: plain(s, t, w, temperature, reduction),
        inputs=inputs,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_op(reduction, weighted, temperature):
    check_op(make(5, 7, reduction, temperature, weighted))


@pytest.mark.parametrize("classes", [1, 2, 7, 10, 15, 16, 17, 31, 32, 33, 100, 1000, 4097])
def test_sizes(classes):
    for batch in (0, 1, 5, 33):
        check_values(make(batch, classes, temperature=0.7, weighted=True), layouts=("contiguous",))
    check_values(make(5, classes, "batchmean", wanted=(True, False, False)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 10, 16, 33, 1000])
def test_half(dtype, classes):
    for reduction in ("none", "sum"):
        check_values(make(33, classes, reduction, 2.0, weighted=True, dtype=dtype))


@pytest.mark.parametrize("wanted", [(0, 0, 0), (0, 1, 0), (1, 0, 1)])
def test_gradients_not_asked_for_are_empty(wanted):
    wanted = tuple(map(bool, wanted))
    case = make(3, 10, wanted=wanted)
    check_values(case)
    _, *gradients = case.overload(*case.args)
    assert [g.numel() > 0 for g in gradients] == list(wanted)


def test_large_batch():
    check_values(make(3001, 10, "batchmean", weighted=True), layouts=("contiguous",))
    check_values(make(301, 100, "sum"), layouts=("contiguous",))


@pytest.mark.parametrize("near", [1e-1, 1e-3, 1e-5])
def test_near_equal_logits(near):
    """At 1e-3 KL is near 1e-6, far below the rounding of the logarithms that it is made of."""
    check_values(make(64, 10, near=near), layouts=("contiguous",))
    check_values(make(64, 1000, near=near), layouts=("contiguous",))


@pytest.mark.parametrize(
    ("classes", "wanted", "dtype"),
    [
        (5000, ALL, torch.float32),
        (5000, (False, False, True), torch.float32),
        (9001, ALL, torch.bfloat16),
        (9001, (True, False, False), torch.float32),
    ],
)
def test_wide_rows(classes, wanted, dtype):
    """Wider than the kernels keep in registers or in their stash."""
    case = make(5, classes, "none", 3.0, weighted=True, dtype=dtype, wanted=wanted)
    check_values(case, layouts=("permuted", "offset"))


def test_nan_stays_in_its_wide_row():
    student, teacher, *_ = make(3, 5000).args
    clean = ops.softmax_kl(student, teacher, None, 1.0, "none", *ALL)
    teacher[1, 4999] = math.nan
    for a, b in zip(ops.softmax_kl(student, teacher, None, 1.0, "none", *ALL), clean, strict=True):
        assert torch.equal(a[::2], b[::2])
        assert a[1].isnan().all()


def test_row_stride_is_taken_as_it_is():
    wide = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    student, teacher = wide[:, 3:13], wide[:, 20:30]
    expected = ops.softmax_kl(student.contiguous(), teacher.contiguous(), student_grad=True)
    assert all(map(torch.equal, ops.softmax_kl(student, teacher, student_grad=True), expected))
    expanded = teacher[:1].expand(6, 10)
    expected = ops.softmax_kl(student, expanded.contiguous())
    assert torch.equal(ops.softmax_kl(student, expanded)[0], expected[0])


class Storages(TorchDispatchMode):
    """Bytes of every new storage that a call allocates."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and function._schema.name != "aten::detach":
            self.bytes.append(out.untyped_storage().nbytes())
        return out


@pytest.mark.skipif(_library.ops["softmax_kl"].cpu != "native", reason="of the native kernel")
def test_memory_is_the_loss_and_the_gradients(monkeypatch):
    """The op allocates its outputs and nothing else; the backward pass one tensor per gradient."""
    taken = []
    empty = _native.empty
    monkeypatch.setattr(_native, "empty", lambda *a: taken.append(empty(*a)) or taken[-1])
    student, teacher, *_ = make(64, 100).args
    student.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = losses.kl(student, teacher)
    assert sum(t.nbytes for t in taken) == student.nbytes + 4
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated == student.nbytes + 4
    with Storages() as storages:
        torch.autograd.grad(loss, student)
    assert sorted(storages.bytes) == [4, student.nbytes]  # the one of grad_loss, the gradient


def test_gradient_of_a_sum_has_stride_zero():
    student, teacher, *_ = make(5, 10).args
    student.requires_grad_()
    (got,) = torch.autograd.grad(losses.kl(student, teacher, reduction="none").sum(), student)
    (expected,) = torch.autograd.grad(losses.kl(student, teacher, reduction="sum"), student)
    assert torch.equal(got, expected)


def test_backward_twice_gives_the_same():
    student, teacher, weight, *_ = make(5, 10, weighted=True).args
    inputs = [t.requires_grad_() for t in (student, teacher, weight)]
    loss = losses.kl(student, teacher, 2.0, "batchmean", weight)
    first = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    again = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    assert all(map(torch.equal, first, again))


def test_masked_classes_have_a_second_derivative():
    """Where q_c = 0 the formula has 0 log 0; nothing of it may reach a gradient."""
    student, teacher, *_ = (t.double() for t in make(4, 10).args[:2])
    teacher[:, 3], student[1, 3] = -math.inf, -math.inf
    student.requires_grad_(), teacher.requires_grad_()
    loss = losses.kl(student, teacher, 2.0)
    first = torch.autograd.grad(loss, (student, teacher), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (student, teacher))
    assert all(g.isfinite().all() for g in second)
    kept = [c for c in range(10) if c != 3]
    assert torch.equal(second[1][:, 3], torch.zeros(4, dtype=torch.float64))
    assert second[1][:, kept].any()


logits = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(0, 999), st.floats(0.1, 10))


@settings(max_examples=60, deadline=None)
@given(logits)
def test_kl_is_not_negative_and_zero_iff_equal(values):
    batch, classes, seed, temperature = values
    student, teacher, *_ = make(batch, classes, seed=seed).args
    loss = losses.kl(student, teacher, temperature, "none")
    exact = losses.kl(student.double(), teacher.double(), temperature, "none")
    assert (loss >= -1e-6).all()
    assert (loss > 0)[exact > 1e-6].all()
    loss, grad, *_ = ops.softmax_kl(student, student, None, temperature, "none", True)
    assert (loss == 0).all()
    assert (grad == 0).all()


@settings(max_examples=60, deadline=None)
@given(logits, st.floats(-50, 50))
def test_shifting_the_logits_changes_nothing(values, shift):
    batch, classes, seed, temperature = values
    args = make(batch, classes, temperature=temperature, seed=seed).args
    student, teacher = ((64 * t).round() / 64 for t in args[:2])
    shift = round(64 * shift) / 64  # the shifted logits are exact in fp32
    expected = ops.softmax_kl(student, teacher, *args[2:])
    got = ops.softmax_kl(student + shift, teacher - shift, *args[2:])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 / temperature)


@pytest.mark.usefixtures("isa")
class TestExtremes:
    def check(self, student, teacher, **options):
        case = make(*student.shape, **options)
        args = (student, teacher, *case.args[2:])
        exact = reference(student.double(), teacher.double(), *args[2:])
        same = reference(*args)
        got = case.overload(*args)
        for i, parts in enumerate(zip(got, exact, same, strict=True)):
            assert_close(f"softmax_kl[{i}]", *parts)
        return got

    @pytest.mark.parametrize("classes", [10, 16, 40])
    def test_teacher_masks_classes(self, classes):
        student, teacher, *_ = make(4, classes).args
        teacher[:, 1::2] = -math.inf
        student[0, 1], student[1, 3], student[2, 5] = -math.inf, 1e4, 50.0
        teacher[1, 0] = -math.inf
        _, _, grad_teacher, _ = self.check(student, teacher)
        assert (grad_teacher[:, 1::2] == 0).all()

    @pytest.mark.parametrize("classes", [40, 5000])
    def test_only_the_last_classes_are_not_masked(self, classes):
        student, teacher, *_ = make(3, classes).args
        teacher[:, :-4] = -math.inf
        student[0, :-4] = -math.inf
        self.check(student, teacher)

    def test_student_rules_out_what_the_teacher_has(self):
        student, teacher, *_ = make(3, 10).args
        student[1, 4] = -math.inf
        loss, grad_student, grad_teacher, _ = self.check(student, teacher)
        assert loss.isinf().tolist() == [False, True, False]
        assert grad_student.isfinite().all()
        assert grad_teacher.isfinite().all(dim=1).tolist() == [True, False, True]

    @pytest.mark.parametrize("classes", [10, 100, 5000])
    def test_large_logits_do_not_overflow(self, classes):
        student, teacher, *_ = make(8, classes).args
        student[0, 3], teacher[0, 5] = 1e4, 1e4
        student[1] += 1e4
        student[2, 1], teacher[2] = -1e4, teacher[2] - 1e4
        student[3], teacher[3] = 1e6 * student[3], teacher[3] + 3e6
        got = self.check(student, teacher)
        assert all(t.isfinite().all() for t in got)

    @pytest.mark.parametrize("column", [0, 5, 16, 39])
    @pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, -1])
    def test_nan_stays_in_its_row(self, column, bits):
        for which in (0, 1):
            pair = list(make(20, 40).args[:2])
            clean = ops.softmax_kl(*pair, None, 1.0, "none", *ALL)
            pair[which].view(torch.int32)[7, column] = bits
            got = ops.softmax_kl(*pair, None, 1.0, "none", *ALL)
            others = torch.arange(20) != 7
            for a, b in zip(got, clean, strict=True):
                assert torch.equal(a[others], b[others])
                assert a[7].isnan().any()
            assert got[0][7].isnan()
            assert got[1 + which][7].isnan().all()


def test_inductor_compiles_forward_and_backward():
    student, teacher, weight, *_ = make(5, 10, weighted=True).args
    inputs = [t.requires_grad_() for t in (student, teacher, weight)]

    def step(s, t, w):
        return 2 * losses.kl(s * 1.5, t, 2.0, "batchmean", w)

    expected = step(*inputs)
    got = torch.compile(step, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, expected)
    pairs = (torch.autograd.grad(loss, inputs) for loss in (got, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_half[10-dtype0]",
    "test_nan_stays_in_its_wide_row",
    "TestExtremes",
)
REGISTERS = {"softmax_kl_kernel": 64}
SMALL, REST = torch.empty(64, 10), (torch.empty(64), 1.0, "mean", True, True, True)
COMPILED = [(f"softmax_kl_kernel {kind}", (z, z, *REST), 1) for kind, z in WIDE.items()] + [
    ("softmax_kl_kernel C=10", (SMALL, SMALL, *REST), None)
]
