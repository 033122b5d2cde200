"""The losses over rows of logits: reductions, dtypes and torch.compile."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadv import losses

G = torch.Generator().manual_seed(0)
LOGITS, Y = 3 * torch.randn(6, 10, generator=G), torch.randint(10, (6,), generator=G)
SOFT = torch.randn(6, 10, generator=G).softmax(dim=1)


@pytest.mark.parametrize("target", [Y, SOFT], ids=["labels", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy_is_torchs(target, smoothing, reduction):
    z = LOGITS.clone().requires_grad_()
    values = [
        function(z, target, label_smoothing=smoothing, reduction=reduction)
        for function in (losses.cross_entropy, F.cross_entropy)
    ]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), z)[0] for v in values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cross_entropy_takes_a_target_of_any_floating_type(dtype):
    expected = F.cross_entropy(LOGITS.double(), SOFT.double())
    for logits, target in ((LOGITS.to(dtype), SOFT), (LOGITS, SOFT.to(dtype))):
        eps = max(torch.finfo(t.dtype).eps for t in (logits, target))
        loss = losses.cross_entropy(logits, target)
        assert loss.dtype == torch.promote_types(logits.dtype, torch.float32)
        torch.testing.assert_close(loss.double(), expected, rtol=4 * eps, atol=0)
    with pytest.raises(ValueError, match=r"target requires grad, .* losses.kl"):
        losses.cross_entropy(LOGITS, SOFT.clone().requires_grad_())


def entropy(logits, y, **options):
    return losses.entropy(logits, **{"reduction": "mean", **options})


SCALED = [losses.cross_entropy, losses.mart_bce, entropy]


@pytest.mark.parametrize("loss", SCALED)
def test_float16_gradient_survives_a_loss_scale(loss):
    """p_c / 2048 is subnormal in float16 until GradScaler multiplies."""
    y = Y.repeat(342)[:2048]
    logits = LOGITS.repeat(342, 1)[:2048].half().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(2.0**16 * loss(logits, y), logits)
    (exact,) = torch.autograd.grad(2.0**16 * loss(wide, y), wide)
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(got.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dlr_targeted_is_the_formula(dtype):
    z, target = LOGITS.to(dtype), (Y + 1 + torch.arange(6)) % 10
    loss = losses.dlr_targeted(z, Y, target)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    expected = []
    for row, y, t in zip(z.double().tolist(), Y, target, strict=True):
        first, _, third, fourth = sorted(row, reverse=True)[:4]
        expected.append(-(row[y] - row[t]) / (first - (third + fourth) / 2))
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=loss.dtype), rtol=1e-5, atol=1e-6)
    assert losses.dlr_targeted(z, Y, target, reduction="mean") == loss.mean()


def test_dlr_targeted_gradient_and_refusals():
    z = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: losses.dlr_targeted(z, Y, (Y + 1) % 10), z)
    with pytest.raises(ValueError, match=r"logits has shape \(6, 3\), must be .* C >= 4"):
        losses.dlr_targeted(LOGITS[:, :3], Y % 3, Y % 2)
    with pytest.raises(ValueError, match="reduction is 'max'"):
        losses.dlr_targeted(LOGITS, Y, Y, reduction="max")


REDUCED = [losses.cross_entropy, losses.dlr, losses.mart_bce, entropy]


@pytest.mark.parametrize("loss", REDUCED)
def test_reductions(loss):
    rows = loss(LOGITS, Y, reduction="none")
    assert rows.shape == (6,)
    torch.testing.assert_close(loss(LOGITS, Y, reduction="sum"), rows.sum())
    torch.testing.assert_close(loss(LOGITS, Y, reduction="mean"), rows.mean())
    with pytest.raises(ValueError, match=r"reduction is 'batchmean', must be .* or 'mean'"):
        loss(LOGITS, Y, reduction="batchmean")
    empty = LOGITS[:0].clone().requires_grad_()
    for reduction in ("sum", "mean"):
        value = loss(empty, Y[:0], reduction=reduction)
        assert value.item() == 0
        assert torch.autograd.grad(value, empty)[0].shape == (0, 10)


@pytest.mark.parametrize("loss", REDUCED)
def test_compiles_whole(loss):
    z = LOGITS.clone().requires_grad_()

    def step(z):
        return loss(2 * z, Y, reduction="mean")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, traced = (torch.autograd.grad(f(z), z)[0] for f in (step, compiled))
    assert torch.equal(eager, traced)


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(1, 40),
    seed=st.integers(0, 999),
    temperature=st.floats(0.1, 10),
    shift=st.integers(-50, 50),
)
def test_entropy_is_between_0_and_log_c_and_torchs(classes, seed, temperature, shift):
    logits = 3 * torch.randn(4, classes, generator=torch.Generator().manual_seed(seed))
    logits = (64 * logits).round() / 64
    value = losses.entropy(logits, temperature)
    expected = torch.distributions.Categorical(logits=logits.double() / temperature).entropy()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert (value >= 0).all()
    assert (value <= math.log(classes) + 1e-6).all()
    torch.testing.assert_close(losses.entropy(logits + shift, temperature), value)
    assert (losses.entropy(logits, temperature, 1e-5) <= value + 1e-6).all()
    uniform = losses.entropy(torch.full((1, classes), float(shift)), temperature)
    assert uniform.item() == pytest.approx(math.log(classes), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(3, 40), seed=st.integers(0, 999), shift=st.integers(-50, 50))
def test_shifting_the_logits_changes_no_loss(classes, seed, shift):
    g = torch.Generator().manual_seed(seed)
    logits = (64 * 3 * torch.randn(4, classes, generator=g)).round() / 64
    y = torch.randint(classes, (4,), generator=g)
    for loss in REDUCED:
        value = loss(logits, y, reduction="none")
        torch.testing.assert_close(loss(logits + shift, y, reduction="none"), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mart_bce_of_probabilities_is_the_expectation_over_labels(dtype):
    z = LOGITS.to(dtype).requires_grad_()
    by_label = [losses.mart_bce(z, torch.full((6,), c), reduction="none") for c in range(10)]
    expected = (torch.stack(by_label, dim=1) * SOFT).sum()
    values = losses.mart_bce(z, SOFT, reduction="sum"), expected
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6, check_dtype=False)
    grads = (torch.autograd.grad(v, z, retain_graph=True)[0] for v in values)
    torch.testing.assert_close(*grads, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"shapes \(\(6, 4\), \(6, 10\)\), must be \[B\] or"):
        losses.mart_bce(z, SOFT[:, :4])
    masked = torch.tensor([[1.0, 2.0, -math.inf]])
    by_id = losses.mart_bce(masked, torch.tensor([0]))
    torch.testing.assert_close(losses.mart_bce(masked, torch.tensor([[1.0, 0.0, 0.0]])), by_id)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [-100, 255, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ignored_labels_are_torchs(dtype, ignored, smoothing, reduction):
    z, y = torch.randn(7, 10, dtype=dtype, requires_grad=True), torch.tensor([0, 3, 9, 3, 1, 2, 4])
    y = y if ignored == 3 else torch.where(y == 3, ignored, y)
    options = {"label_smoothing": smoothing, "reduction": reduction, "ignore_index": ignored}
    expected, got = F.cross_entropy(z, y, **options), losses.cross_entropy(z, y, **options)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), z)[0] for v in (got, expected)))
    left = losses.cross_entropy(z, torch.full((7,), ignored), **options)
    assert torch.equal(left, torch.zeros_like(left))  # torch: nan for the mean


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype):
    z, y = torch.randn(6, 10), Y.to(dtype)
    assert torch.equal(losses.cross_entropy(z, y), losses.cross_entropy(z, Y))
    assert torch.equal(losses.mart_bce(z, y), losses.mart_bce(z, Y))
    assert torch.equal(losses.dlr_targeted(z, y, y), losses.dlr_targeted(z, Y, Y))


def test_labels_outside_the_classes_are_refused():
    z = torch.randn(6, 10)
    for label in (-1, 10, 2**40):
        y = torch.tensor([0, 1, label, 3, 4, 5])
        named = rf"has label {label} at row 2, must be in \[0, 9\]"
        for call in (
            lambda y=y: losses.cross_entropy(z, y),
            lambda y=y: losses.margin(z, y),
            lambda y=y: losses.dlr(z, y),
            lambda y=y: losses.mart_bce(z, y),
            lambda y=y: losses.dlr_targeted(z, y, Y),
            lambda y=y: losses.dlr_targeted(z, Y, y),
        ):
            with pytest.raises(ValueError, match=named):
                call()
