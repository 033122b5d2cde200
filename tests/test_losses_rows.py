"""The losses over rows of logits: reductions, dtypes and torch.compile."""

import pytest
import torch
import torch.nn.functional as F

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


SCALED = [losses.cross_entropy, losses.mart_bce]


@pytest.mark.parametrize("loss", SCALED)
def test_float16_gradient_survives_a_loss_scale(loss):
    """p_c / 2048 is subnormal in float16 until GradScaler multiplies."""
    y = Y.repeat(342)[:2048]
    logits = LOGITS.repeat(342, 1)[:2048].half().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(2.0**16 * loss(logits, y), logits)
    (exact,) = torch.autograd.grad(2.0**16 * loss(wide, y), wide)
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(got.dtype).eps, atol=1e-6)


REDUCED = [losses.cross_entropy, losses.dlr, losses.mart_bce]


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
