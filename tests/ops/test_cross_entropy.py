import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from wide_rows import LABELS, WIDE

from fastadv import ops
from fastadv.ops import _library
from fastadv.ops.cross_entropy import reference
from fastadv.testing import OpCase, assert_close, check_op, check_values, unchecked

HALVES = (torch.bfloat16, torch.float16)


REDUCTIONS = ("none", "sum", "mean")


def make(
    batch,
    classes,
    soft=False,
    smoothing=0.0,
    dtype=torch.float32,
    grad=True,
    seed=0,
    reduction="none",
):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(batch, classes, generator=g)).to(dtype)
    target = torch.randint(classes, (batch,), generator=g)
    if soft:
        target = torch.randn(batch, classes, generator=g).softmax(dim=1)

    def both(function):
        return lambda z: function(z, target.to(z.dtype) if soft else target)

    return OpCase(
        "cross_entropy",
        (logits, target, smoothing, -100, reduction, grad),
        public=both(lambda z, t: ops.cross_entropy(z, t, smoothing, reduction=reduction)),
        plain=both(
            lambda z, t: F.cross_entropy(z, t, label_smoothing=smoothing, reduction=reduction)
        ),
        inputs=(0,),
    )


def gradient(logits, target, smoothing=0.0):
    return torch.ops.fastadv.cross_entropy(logits, target, smoothing, -100, "none", True)[1]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_op(soft, smoothing):
    check_op(make(9, 10, soft, smoothing))
    check_op(make(9, 10, soft, smoothing, reduction="mean"))


@pytest.mark.parametrize("reduction", REDUCTIONS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("batch", [0, 1, 17, 3001])
def test_reductions(batch, dtype, reduction):
    for soft in (False, True):
        case = make(batch, 10, soft, 0.1, dtype, reduction=reduction)
        if batch and not soft:
            case.args[1][::3] = -100
        check_values(case, ("contiguous", "permuted"))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("classes", [1, 2, 7, 10, 16, 17, 33, 100, 1000])
def test_sizes(classes, dtype):
    layouts = ("contiguous", "permuted", "offset", "strided")
    check_values(make(33, classes, False, 0.0, dtype), layouts)
    check_values(make(5, classes, True, 0.3, dtype), layouts)
    check_values(make(1, classes, True, 1.0, dtype, grad=False), ("contiguous",))


@pytest.mark.parametrize("classes", [4097, 9001])
def test_rows_wider_than_the_stash(classes):
    for soft, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        check_values(make(3, classes, soft, 0.1, dtype), ("permuted", "offset"))


@pytest.mark.parametrize("batch", [0, 1, 15, 16, 17, 3001])
def test_batches(batch):
    check_values(make(batch, 10), ("contiguous",))
    check_values(make(batch, 10, soft=True), ("contiguous",))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_is_torchs(soft, smoothing):
    """Values and gradients in fp64, where fastadv runs its reference."""
    case = make(50, 10, soft, smoothing)
    logits = case.args[0].double().requires_grad_()
    got, expected = case.public(logits), case.plain(logits)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), logits)[0] for v in (got, expected)))


def test_probabilities_need_not_sum_to_one():
    logits, target, *_ = make(5, 10, soft=True).args
    check_values(OpCase("cross_entropy", (logits, 3 * target - 0.2, 0.1, -100, "none", True)))
    check_values(OpCase("cross_entropy", (logits, 0 * target, 0.0, -100, "none", True)))


@pytest.mark.usefixtures("isa")
class TestExtremes:
    def check(self, logits, target, smoothing=0.0):
        args = smoothing, -100, "none", True
        wide = target if target.dtype == torch.int64 else target.double()
        exact = reference(logits.double(), wide, *args)
        same = reference(logits, target, *args)
        got = torch.ops.fastadv.cross_entropy(logits, target, *args)
        for name, *parts in zip(("loss", "gradient"), got, exact, same, strict=True):
            assert_close(name, *parts)
        return got

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("soft", [False, True])
    def test_large_logits_do_not_overflow(self, soft, smoothing):
        logits, target, *_ = make(6, 17, soft).args
        logits[0, 3], logits[1, 4] = 1e4, -1e4
        logits[2] += 1e4
        logits[3] = 1e6 * logits[3]
        loss, grad = self.check(logits, target, smoothing)
        assert loss.isfinite().all()
        assert grad.isfinite().all()

    @pytest.mark.parametrize("classes", [10, 16, 40, 5000])
    def test_masked_classes_without_target_count_nothing(self, classes):
        logits, target, *_ = make(4, classes, soft=True).args
        logits[:, 1::2], target[:, 1::2] = -math.inf, 0
        loss, grad = self.check(logits, target)
        assert loss.isfinite().all()
        assert not grad[:, 1::2].any()
        expected = ops.cross_entropy(logits[:, ::2], target[:, ::2])
        torch.testing.assert_close(loss, expected)
        self.check(logits, torch.arange(4) * 2)

    @pytest.mark.parametrize("smoothing", [0.1, 1.0])
    def test_masked_classes_with_target_cost_infinity(self, smoothing):
        logits, target, *_ = make(3, 10).args
        target[:] = torch.tensor([2, 4, 5])
        logits[1:, 4] = -math.inf  # row 1's label, and a class that only smoothing gives weight
        for kind in (target, F.one_hot(target, 10).float()):
            loss, grad = self.check(logits, kind, smoothing)
            assert loss.isinf().tolist() == [False, True, True]
            assert grad.isfinite().all()
            loss, grad = self.check(logits, kind)
            assert loss.isinf().tolist() == [False, True, False]
            assert grad.isfinite().all()

    @pytest.mark.parametrize("column", [0, 5, 16, 39])
    def test_nan_stays_in_its_row(self, column):
        for soft in (False, True):
            logits, target, *_ = make(20, 40, soft).args
            clean = torch.ops.fastadv.cross_entropy(logits, target, 0.1, -100, "none", True)
            logits[7, column] = math.nan
            got = self.check(logits, target, 0.1)
            others = torch.arange(20) != 7
            for a, b in zip(got, clean, strict=True):
                assert torch.equal(a[others], b[others])
                assert a[7].isnan().all()

    def test_labels_out_of_range(self):
        logits, target, *_ = make(6, 10).args
        target[:5] = torch.tensor([-1, 10, -100, 2**62, -(2**62)])
        loss, grad = unchecked("cross_entropy", logits, target, 0.1, -100, "none")
        assert loss.isnan().tolist() == [True, True, False, True, True, False]
        assert loss[2] == 0
        assert not grad[:5].any()
        assert grad[5].any()
        if _library.backend() == "triton":
            return
        match = r"target has label -1 at row 0, must be in \[0, 9\], or ignore_index \(-100\)"
        for dtype in (torch.float32, torch.float64):  # the CPU's ops look at labels
            with pytest.raises(ValueError, match=match):
                ops.cross_entropy(logits.to(dtype), target)

    @pytest.mark.parametrize("ignored", [-100, 3, 0])
    def test_ignored_labels(self, ignored):
        logits, target, *_ = make(6, 10).args
        target[:] = torch.tensor([ignored, 1, 2, ignored, 4, 9])
        logits[3] = math.nan
        args = target, 0.1, ignored, "none", True
        loss, grad = torch.ops.fastadv.cross_entropy(logits, *args)
        kept = target != ignored
        assert not loss[~kept].any()
        assert not grad[~kept].any()
        others = torch.ops.fastadv.cross_entropy(
            logits[kept], target[kept], 0.1, -100, "none", True
        )
        assert torch.equal(loss[kept], others[0])
        assert torch.equal(grad[kept], others[1])

    @pytest.mark.skipif(
        _library.ops["cross_entropy"].cpu.startswith("reference"),
        reason="fp32 torch rounds it to 0: only the kernels promise more",
    )
    def test_gradient_does_not_vanish_at_a_confident_row(self):
        """p_y - 1 is -4e-9, which fp32 probabilities round to 0."""
        logits = torch.zeros(1, 3)
        logits[0, 0] = 20.0
        got = gradient(logits, torch.tensor([0]))
        exact = gradient(logits.double(), torch.tensor([0]))
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 20),
    classes=st.integers(1, 40),
    soft=st.booleans(),
    smoothing=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_properties(batch, classes, soft, smoothing, seed):
    case = make(batch, classes, soft, seed=seed)
    logits, target = (64 * case.args[0]).round() / 64, case.args[1]
    loss = ops.cross_entropy(logits, target, smoothing)
    assert (loss >= -1e-6).all()
    torch.testing.assert_close(ops.cross_entropy(logits + 50, target, smoothing), loss)
    grad = gradient(logits, target, smoothing)
    torch.testing.assert_close(grad.sum(dim=1), torch.zeros(batch), rtol=0, atol=1e-5)
    if not soft:
        onehot = F.one_hot(target, classes).float()
        torch.testing.assert_close(ops.cross_entropy(logits, onehot, smoothing), loss)


def test_graph_can_be_kept_and_needs_no_gradient():
    logits, target, *_ = make(3, 10).args
    assert not ops.cross_entropy(logits, target).requires_grad
    logits.requires_grad_()
    loss = ops.cross_entropy(logits, target).sum()
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.library.opcheck(
        torch.ops.fastadv.cross_entropy.default, (logits, target, 0.1, -100, "none", True)
    )


def test_bad_arguments_name_themselves():
    logits, y, *_ = make(4, 10).args
    soft = make(4, 10, soft=True).args[1]

    def fails(error, match, logits=logits, target=y, smoothing=0.0):
        with pytest.raises(error, match=match):
            ops.cross_entropy(logits, target, smoothing)

    fails(ValueError, r"logits has shape \(10,\), must be \[B, C\]", logits=logits[0])
    fails(ValueError, r"logits has shape \(4, 0\), must be .* C >= 1", logits=logits[:, :0])
    fails(TypeError, r"logits is torch.int64", logits=logits.long())
    fails(TypeError, r"target is torch.bool, must be integer labels or", target=y.bool())
    fails(ValueError, r"target has shape \(3,\), must be \(4,\)", target=y[:3])
    fails(ValueError, r"target has shape \(4, 1\), must be \(4,\)", target=y[:, None])
    fails(ValueError, r"target has shape \(4, 9\), must be \(4, 10\)", target=soft[:, :9])
    fails(TypeError, r"target is torch.float64, must be torch.float32", target=soft.double())
    fails(ValueError, r"target is on meta, must be on cpu", target=y.to("meta"))
    fails(ValueError, r"target requires grad, .* losses.kl", target=soft.requires_grad_())
    for smoothing in (-0.1, 1.1, math.nan):
        fails(ValueError, r"label_smoothing is .*, must be in \[0, 1\]", smoothing=smoothing)


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_op[0.1-False]",
    "test_sizes[16-dtype1]",
    "TestExtremes",
    "test_rows_wider_than_the_stash[4097]",
)
REGISTERS = {"cross_entropy_kernel": 80}
TAIL = 0.1, -100, "none", True
COMPILED = [(f"cross_entropy_kernel {kind}", (z, LABELS, *TAIL), 2) for kind, z in WIDE.items()] + [
    (f"cross_entropy_kernel probabilities {kind}", (z, torch.empty_like(z), *TAIL), 0)
    for kind, z in WIDE.items()
    if z.dtype == torch.float32
]
COMPILED.append(("cross_entropy_kernel C=10", (torch.empty(64, 10), LABELS, *TAIL), None))
