import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wide_rows import WIDE

from fastadv import losses, ops
from fastadv.ops import _library, _native
from fastadv.ops.ikl import reference
from fastadv.testing import OpCase, assert_close, check_op, check_values

HALVES = (torch.bfloat16, torch.float16)


def pairs(adv, clean, weight=None, alpha=4.0, beta=20.0):
    """The paper's formula, over all pairs of classes."""
    weight = torch.full_like(adv, 1 / adv.shape[1]) if weight is None else weight.to(adv.dtype)
    soft = -(clean.detach().softmax(1) * adv.log_softmax(1)).sum(1).mean()
    gaps = (clean[:, :, None] - clean[:, None]) - (adv[:, :, None] - adv[:, None])
    squares = (weight[:, :, None] * weight[:, None] * gaps.square()).sum()
    return alpha * soft + beta / 4 * squares / weight.sum(1).square().sum()


def make(
    batch,
    classes,
    weighted=True,
    alpha=4.0,
    beta=20.0,
    dtype=torch.float32,
    wanted=(True, True),
    inputs=(0, 1),
    seed=0,
):
    g = torch.Generator().manual_seed(seed)
    clean, adv = (3 * torch.randn(batch, classes, generator=g) for _ in range(2))
    weight = torch.rand(batch, classes, generator=g) ** 3 if weighted else None
    if weighted:
        weight[:, ::5] = 0

    def call(function):
        def of(*logits):  # the other input, if any, is a constant
            logits = dict(enumerate((adv, clean))) | dict(zip(inputs, logits, strict=True))
            pair = (t.to(logits[inputs[0]].dtype) for t in logits.values())
            return function(*pair, weight, alpha, beta)

        return of

    return OpCase(
        "ikl",
        (adv.to(dtype), clean.to(dtype), weight, alpha, beta, *wanted),
        public=call(losses.ikl),
        plain=call(pairs),
        inputs=inputs,
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("alpha", "inputs"), [(4.0, (0,)), (0.0, (0, 1))])
def test_op(alpha, inputs, weighted):
    """Of the inputs that finite differences know to be none of the constant target."""
    check_op(make(5, 7, weighted, alpha, inputs=inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_target_of_the_first_term_is_a_constant(weighted, dtype):
    """In both orders, and under torch.func."""
    adv, clean, weight, *_ = make(6, 10, weighted).args
    wide = [t.double().requires_grad_() for t in (adv, clean)]
    logits = [t.detach().to(dtype).requires_grad_() for t in wide]
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]

    def derivatives(function, inputs):
        loss = function(*inputs, weight)
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = sum((g * torch.linspace(-1, 1, 10).to(g)).square().sum() for g in first)
        return loss, *first, *torch.autograd.grad(penalty, inputs)

    expected = derivatives(pairs, wide)
    for got, exact in zip(derivatives(losses.ikl, logits), expected, strict=True):
        assert (got - exact).abs().max() <= rtol * exact.abs().max()
    first = torch.autograd.grad(losses.ikl(*logits, weight), logits)
    func = torch.func.grad(lambda *pair: losses.ikl(*pair, weight), (0, 1))(*logits)
    for got, again, exact in zip(first, func, expected[1:3], strict=True):
        assert (got - exact).abs().max() <= rtol * exact.abs().max()
        assert (again - exact).abs().max() <= rtol * exact.abs().max()


@pytest.mark.parametrize("classes", [1, 2, 7, 10, 15, 16, 17, 31, 32, 33, 100, 1000, 4097])
def test_sizes(classes):
    for batch in (0, 1, 5, 33):
        check_values(make(batch, classes), ("contiguous",))
    check_values(make(5, classes, weighted=False, wanted=(True, False)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("classes", [1, 10, 16, 33, 1000])
def test_half(dtype, classes):
    for weighted in (False, True):
        check_values(make(33, classes, weighted, dtype=dtype))


@pytest.mark.parametrize("wanted", [(False, False), (False, True), (True, False)])
def test_gradients_not_asked_for_are_empty(wanted):
    case = make(3, 10, wanted=wanted)
    check_values(case)
    _, *gradients = case.overload(*case.args)
    assert [g.numel() > 0 for g in gradients] == list(wanted)


def test_large_batch():
    check_values(make(3001, 10), ("contiguous",))
    check_values(make(301, 100, weighted=False), ("contiguous",))


@pytest.mark.parametrize(
    ("classes", "weighted", "dtype"),
    [(5000, True, torch.float32), (9001, False, torch.float32), (9001, True, torch.bfloat16)],
)
def test_wide_rows(classes, weighted, dtype):
    """Wider than the kernels keep in registers or in their stash."""
    check_values(make(5, classes, weighted, dtype=dtype), ("permuted", "offset"))


def test_row_stride_is_taken_as_it_is():
    wide = torch.rand(6, 60, generator=torch.Generator().manual_seed(0))
    parts = wide[:, 3:13], wide[:, 20:30], wide[:, 41:51]
    expected = ops.ikl(*(t.contiguous() for t in parts), adv_grad=True, clean_grad=True)
    assert all(map(torch.equal, ops.ikl(*parts, adv_grad=True, clean_grad=True), expected))
    adv, clean, weight = parts
    one = weight[:1].expand(6, 10)
    expected = ops.ikl(adv, clean, one.contiguous(), clean_grad=True)
    assert all(map(torch.equal, ops.ikl(adv, clean, one, clean_grad=True), expected))


@pytest.mark.skipif(_library.ops["ikl"].cpu != "native", reason="of the native kernel")
def test_memory_is_the_loss_and_the_gradients(monkeypatch):
    taken, empty = [], _native.empty
    monkeypatch.setattr(_native, "empty", lambda *a: taken.append(empty(*a)) or taken[-1])
    adv, clean, weight, *_ = make(64, 100).args
    adv.requires_grad_(), clean.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        losses.ikl(adv, clean, weight)
    assert sum(t.nbytes for t in taken) == 2 * adv.nbytes + 4
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated == 2 * adv.nbytes + 4


@pytest.mark.usefixtures("isa")
class TestExtremes:
    def check(self, adv, clean, weight=None):
        rest = 4.0, 20.0, True, True
        wide = (t if t is None else t.double() for t in (adv, clean, weight))
        exact, same = reference(*wide, *rest), reference(adv, clean, weight, *rest)
        got = torch.ops.fastadv.ikl(adv, clean, weight, *rest)
        for name, *parts in zip(("loss", "grad_adv", "grad_clean"), got, exact, same, strict=True):
            assert_close(name, *parts)
        return got

    @pytest.mark.parametrize("classes", [10, 16, 40])
    def test_masked_classes_of_weight_zero_count_nothing(self, classes):
        adv, clean, weight, *_ = make(6, classes).args
        kept = torch.arange(classes) % 2 == 0
        adv[:, ~kept], clean[:, ~kept], weight[:, ~kept] = -math.inf, -math.inf, 0
        clean[1, 1], adv[2, 3] = -1e4, -1e4  # alone in their class, and q is 0 there as well
        got = self.check(adv, clean, weight)
        rest = adv[:, kept], clean[:, kept], weight[:, kept]
        expected = ops.ikl(*rest, adv_grad=True, clean_grad=True)
        for a, b in zip((got[0], *(g[:, kept] for g in got[1:])), expected, strict=True):
            torch.testing.assert_close(a, b)
        assert not any(g[:, ~kept].any() for g in got[1:])

    def test_masked_classes_of_some_weight_give_nan_in_their_row(self):
        adv, clean, weight, *_ = make(5, 10).args
        expected = self.check(adv, clean, weight)
        weight[2, 4] = 0.25
        self.check(adv, clean, weight)
        adv[2, 4], clean[2, 4] = -math.inf, -math.inf
        loss, *grads = self.check(adv, clean, weight)
        assert loss.isnan()
        others = torch.arange(5) != 2
        assert all(g[2].isnan().any() and g[others].isfinite().all() for g in grads)
        assert expected[0].isfinite()

    def test_a_class_that_adv_rules_out(self):
        """Infinite where the target has it; the gradients stay finite."""
        adv, clean, weight, *_ = make(3, 10).args
        adv[1, 4], weight[1, 4] = -math.inf, 0
        loss, *grads = self.check(adv, clean, weight)
        assert loss.isinf()
        assert all(g.isfinite().all() for g in grads)

    @pytest.mark.parametrize("classes", [10, 100, 5000])
    def test_large_logits_do_not_overflow(self, classes):
        adv, clean, weight, *_ = make(8, classes).args
        adv[0, 3], clean[0, 5] = 1e4, 1e4
        adv[1] += 1e4
        adv[2, 1], clean[2] = -1e4, clean[2] - 1e4
        adv[3], clean[3] = 1e6 * adv[3], clean[3] + 3e6
        assert all(t.isfinite().all() for t in self.check(adv, clean, weight))

    @pytest.mark.parametrize("column", [0, 5, 16, 39])
    def test_nan_stays_in_its_row(self, column):
        for which in (0, 1):
            *pair, weight = make(20, 40).args[:3]
            weight[7, column] = 1
            clean = ops.ikl(*pair, weight, adv_grad=True, clean_grad=True)
            pair[which][7, column] = math.nan
            loss, *grads = self.check(*pair, weight)
            others = torch.arange(20) != 7
            assert loss.isnan()
            assert all(
                torch.equal(a[others], b[others]) for a, b in zip(grads, clean[1:], strict=True)
            )
            assert all(g[7].isnan().any() for g in grads)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_only_proportions_of_weights_matter(self, scale):
        """Their squares are out of float32's range."""
        adv, clean, weight, *_ = make(9, 17).args
        expected = ops.ikl(adv, clean, weight, adv_grad=True, clean_grad=True)
        scaled = scale * weight
        for a, b in zip(self.check(adv, clean, scaled), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_rows_without_weight(self):
        adv, clean, weight, *_ = make(5, 10).args
        weight[3] = 0
        loss, grad_adv, grad_clean = self.check(adv, clean, weight)
        assert loss.isfinite()
        assert not grad_clean[3].any()
        torch.testing.assert_close(grad_adv[3], 0.8 * (adv[3].softmax(0) - clean[3].softmax(0)))
        loss, grad_adv, grad_clean = self.check(adv, clean, 0 * weight)
        torch.testing.assert_close(loss, pairs(adv, clean, beta=0.0))
        assert not grad_clean.any()

    @pytest.mark.parametrize("value", [-(2.0**-100), math.inf, -math.inf, math.nan])
    def test_wrong_weights(self, value):
        adv, clean, weight, *_ = make(5, 10).args
        weight[3, 7] = value
        transformed = torch.func.grad_and_value(lambda a: losses.ikl(a, clean, weight))(adv)
        assert transformed[1].isnan()
        if _library.backend() == "triton":  # GPUs do not look at values
            assert ops.ikl(adv, clean, weight)[0].isnan()
            return
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(ValueError, match=rf"weight is {value} at row 3, class 7, must be"):
                losses.ikl(adv.to(dtype), clean.to(dtype), weight.to(dtype))


def test_masked_classes_have_a_second_derivative():
    adv, clean, weight, *_ = (t.double() for t in make(4, 10).args[:3])
    adv[:, 3], clean[:, 3], weight[:, 3] = -math.inf, -math.inf, 0
    adv.requires_grad_(), clean.requires_grad_()
    first = torch.autograd.grad(losses.ikl(adv, clean, weight), (adv, clean), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (adv, clean))
    assert all(g.isfinite().all() for g in second)
    assert not second[1][:, 3].any()
    assert second[1].any()


logits = st.tuples(st.integers(1, 5), st.integers(1, 40), st.booleans(), st.integers(0, 999))


@settings(max_examples=60, deadline=None)
@given(logits, st.floats(-50, 50))
def test_shifting_the_logits_changes_nothing(values, shift):
    batch, classes, weighted, seed = values
    adv, clean, weight, *rest = make(batch, classes, weighted, seed=seed).args
    adv, clean, shift = (64 * adv).round() / 64, (64 * clean).round() / 64, round(64 * shift) / 64
    expected = torch.ops.fastadv.ikl(adv, clean, weight, *rest)
    got = torch.ops.fastadv.ikl(adv + shift, clean - shift, weight, *rest)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(logits)
def test_each_term_is_zero_where_it_should_be(values):
    batch, classes, weighted, seed = values
    adv, clean, weight, *_ = make(batch, classes, weighted, seed=seed).args
    assert losses.ikl(adv, clean, weight, alpha=0.0) >= 0
    loss, *grads = ops.ikl(adv, adv, weight, adv_grad=True, clean_grad=True)
    torch.testing.assert_close(loss, 4 * losses.entropy(adv, reduction="mean"))
    assert not any(g.any() for g in grads)


def test_in_half_precision_it_survives_a_loss_scale():
    """The gradient of a mean over 2048 rows is subnormal in float16 until GradScaler multiplies."""
    for dtype in HALVES:
        adv, clean, weight, *_ = make(2048, 10).args
        pair = [t.to(dtype).requires_grad_() for t in (adv, clean)]
        wide = [t.detach().double().requires_grad_() for t in pair]
        loss = losses.ikl(*pair, weight)
        assert loss.dtype == torch.float32
        got = torch.autograd.grad(2.0**8 * loss, pair)
        exact = torch.autograd.grad(2.0**8 * losses.ikl(*wide, weight), wide)
        for a, b in zip(got, exact, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_an_empty_batch_is_zero():
    for dtype in (torch.float32, torch.float64):
        pair = [torch.zeros(0, 10, dtype=dtype, requires_grad=True) for _ in range(2)]
        for weight in (None, torch.zeros(0, 10)):
            loss = losses.ikl(*pair, weight)
            assert loss.item() == 0
            assert [g.shape for g in torch.autograd.grad(loss, pair)] == [(0, 10)] * 2


def test_a_derivative_to_the_weight_is_right_or_refused():
    """Also where a weight is 0, whose class counts nothing."""
    adv, clean, weight, *_ = (t.double() for t in make(5, 10).args[:3])
    tangent = torch.linspace(-1, 1, 50, dtype=torch.float64).view(5, 10)

    def along(function):
        return torch.func.jvp(lambda w: function(adv, clean, w), (weight,), (tangent,))[1]

    torch.testing.assert_close(along(losses.ikl), along(pairs))
    with pytest.raises(ValueError, match="weight requires grad, must be a constant"):
        torch.func.grad(lambda w: losses.ikl(adv, clean, w))(weight)


def test_weights_of_any_floating_type():
    adv, clean, weight, *_ = make(5, 10).args
    for dtype in (torch.float16, torch.float64):
        wide = weight.to(dtype).float()
        assert torch.equal(losses.ikl(adv, clean, weight.to(dtype)), losses.ikl(adv, clean, wide))
    half = losses.ikl(adv.bfloat16(), clean.bfloat16(), weight.bfloat16())
    assert half.dtype == torch.float32


def test_it_asks_for_the_gradients_that_autograd_needs():
    adv, clean, *_ = make(5, 10).args
    assert not losses.ikl(adv, clean).requires_grad
    clean.requires_grad_()
    losses.ikl(adv, clean).backward()
    with torch.no_grad():
        assert not losses.ikl(adv, clean).requires_grad
    adv.requires_grad_()
    losses.ikl(adv, clean.detach()).backward()
    assert adv.grad is not None


def test_bad_arguments_name_themselves():
    adv, clean, weight, *_ = make(4, 10).args

    def fails(error, match, adv=adv, clean=clean, weight=weight, **options):
        with pytest.raises(error, match=match):
            losses.ikl(adv, clean, weight, **options)

    fails(ValueError, r"adv_logits has shape \(10,\), must be \[B, C\]", adv=adv[0])
    fails(ValueError, r"adv_logits has shape \(4, 0\), must be .* C >= 1", adv=adv[:, :0])
    fails(TypeError, r"adv_logits is torch.int64, must be one of", adv=adv.long())
    fails(TypeError, r"adv_logits is a list, must be a tensor", adv=[])
    fails(ValueError, r"clean_logits has shape \(4, 9\), must be \(4, 10\)", clean=clean[:, :9])
    fails(TypeError, r"clean_logits is torch.float64, must be torch.float32", clean=clean.double())
    fails(ValueError, "clean_logits is on meta, must be on cpu", clean=clean.to("meta"))
    fails(ValueError, r"weight has shape \(10,\), must be \(4, 10\)", weight=weight[0])
    fails(TypeError, "weight is torch.int64, must be torch.float32", weight=weight.long())
    fails(TypeError, "weight is a float, must be a tensor", weight=0.1)
    fails(ValueError, "weight is on meta, must be on cpu", weight=weight.to("meta"))
    constant = "^weight requires grad, must be a constant: detach it$"
    fails(ValueError, constant, weight=weight.clone().requires_grad_())
    for value in (-1.0, math.inf, math.nan):
        fails(ValueError, f"alpha is {value}, must be at least 0 and finite", alpha=value)
        fails(ValueError, f"beta is {value}, must be at least 0 and finite", beta=value)


# What tests/kernels does with the op's Triton kernels: the tests that run on the interpreter by
# default; registers at most, of 255; and (name, arguments of the launcher, narrow loads or None
# where rows are not aligned) of the variants to compile.
INTERPRETED = (
    "test_half[10-dtype0]",
    "test_wide_rows[5000-True-dtype0]",
    "test_op[0.0-inputs1-True]",
    "TestExtremes",
)
REGISTERS = {"ikl_kernel": 80}
SMALL, LARGE, REST = torch.empty(64, 10), torch.empty(64, 1000), (4.0, 20.0, True, True)
COMPILED = [(f"ikl_kernel {kind}", (z, z, None, *REST), 0) for kind, z in WIDE.items()] + [
    ("ikl_kernel C=1000 weighted", (LARGE, LARGE, LARGE, *REST), 1),
    ("ikl_kernel C=10", (SMALL, SMALL, SMALL, *REST), None),
]
