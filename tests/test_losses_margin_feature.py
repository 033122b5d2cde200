import pytest
import torch
import torch.nn.functional as F

from fastadv import losses

G = torch.Generator().manual_seed(0)
LOGITS, Y = 5 * torch.randn(6, 10, generator=G), torch.arange(6)
STUDENT, TEACHER = torch.randn(4, 3, 5, 5, generator=G), torch.randn(4, 3, 5, 5, generator=G)


def test_margin_reductions():
    other = LOGITS.scatter(1, Y[:, None], -torch.inf).amax(dim=1)
    expected = other - LOGITS[Y, Y]
    assert torch.equal(losses.margin(LOGITS, Y), expected)
    torch.testing.assert_close(losses.margin(LOGITS, Y, reduction="sum"), expected.sum())
    torch.testing.assert_close(losses.margin(LOGITS, Y, reduction="mean"), expected.mean())
    with pytest.raises(ValueError, match=r"reduction is 'batchmean', must be .* or 'mean'"):
        losses.margin(LOGITS, Y, reduction="batchmean")


@pytest.mark.parametrize("kappa", [0, 3.0, 50])
def test_margin_with_kappa_is_the_cw_evaluation(kappa):
    """-max(z_y - max_{c != y} z_c + kappa, 0), written as the published evaluations have it."""
    z = LOGITS.clone().requires_grad_()
    onehot = F.one_hot(Y, 10)
    real = (onehot * z).sum(dim=1)
    other = ((1 - onehot) * z - onehot * 10000).max(dim=1).values
    expected = -torch.clamp(real - other + kappa, min=0)
    got = losses.margin(z, Y, kappa)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), z)[0] for v in (got, expected)))
    if kappa == 3:
        assert (got == 0).any()
        assert (got < 0).any()


def test_feature_reductions_and_distances():
    s, t = STUDENT.flatten(1), TEACHER.flatten(1)
    expected = {
        "mse": F.mse_loss(s, t, reduction="none").mean(dim=1),
        "l2": F.pairwise_distance(s, t, eps=0),
        "cosine": 1 - F.cosine_similarity(s, t),
    }
    for distance, value in expected.items():
        reduced = {"none": value, "sum": value.sum(), "batchmean": value.mean()}
        for reduction, wanted in reduced.items():
            got = losses.feature(STUDENT, TEACHER, distance, reduction)
            torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(losses.feature(STUDENT, TEACHER), F.mse_loss(STUDENT, TEACHER))
    with pytest.raises(ValueError, match=r"reduction is 'mean', must be .* or 'batchmean'"):
        losses.feature(STUDENT, TEACHER, reduction="mean")


def test_float16_mse_gradient_survives_a_large_feature():
    """The gradient of one element, 2 (s - t) / D = 2.5e-7, is rounded after the loss scale."""
    student = torch.full((1, 80_000), 0.01, dtype=torch.float16, requires_grad=True)
    loss = losses.feature(student, torch.zeros_like(student)) * 2.0**16
    (gradient,) = torch.autograd.grad(loss, student)
    expected = torch.full_like(gradient, 2 * student[0, 0].item() / 80_000 * 2**16)
    assert torch.equal(gradient, expected)


def test_an_empty_batch_gives_zero():
    assert losses.margin(LOGITS[:0], Y[:0], reduction="mean") == 0
    assert losses.feature(STUDENT[:0], TEACHER[:0], "cosine") == 0


def test_compiles_whole():
    student, z = STUDENT.clone().requires_grad_(), LOGITS.clone().requires_grad_()

    def both(s, z):
        return losses.feature(s, TEACHER, "cosine") + losses.margin(z, Y, 1.0, "mean")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    eager, traced = (torch.autograd.grad(f(student, z), (student, z)) for f in (both, compiled))
    for a, b in zip(eager, traced, strict=True):
        assert torch.equal(a, b)
