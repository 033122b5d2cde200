import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastadv import freeze
from fastadv.attacks import FGSM, PGD, checks
from fastadv.attacks.pgd import OBJECTIVES, input_gradient

EPS = 8 / 255


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 8, 8, generator=g), torch.randint(10, (6,), generator=g)


def transcription(model, x, y, start, steps, eps, step_size):
    """PGD as Madry et al. write it, in eval mode."""
    model.eval()
    x_adv = start.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + step_size * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


def test_equals_the_transcription(model, batch):
    x, y = batch
    ours = PGD(EPS, EPS / 4, 5)(model, x, y, start=x)
    assert torch.equal(ours, transcription(model, x, y, x, 5, EPS, EPS / 4))


def test_fgsm_is_one_full_step_from_x(model, batch):
    x, y = batch
    assert torch.equal(FGSM(EPS)(model, x, y), transcription(model, x, y, x, 1, EPS, EPS))


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "kl"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("init", ["uniform", "gaussian", "zero"])
def test_raises_the_loss_and_stays_in_ball_and_box(model, batch, loss, norm, init):
    x, y = batch
    model.eval()
    z = 3 * torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    eps = EPS if norm == "linf" else 0.5
    attack = PGD(eps, eps / 4, 8, init=init, norm=norm)
    x_adv = attack(model, x, y, loss=loss, target_logits=z)
    distance = (x_adv - x).flatten(1).norm(math.inf if norm == "linf" else 2, dim=1)
    assert distance.max() <= eps * (1 + 1e-5)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    value = {
        "ce": lambda v: F.cross_entropy(model(v), y),
        "margin": lambda v: (others(model(v), y) - model(v).gather(1, y[:, None])[:, 0]).mean(),
        "dlr": lambda v: ratio(model(v), y).mean(),
        "kl": lambda v: F.kl_div(model(v).log_softmax(1), z.softmax(1), reduction="batchmean"),
    }[loss]
    assert value(x_adv) > value(x) + 1e-3


def others(logits, y):
    return torch.stack(
        [row[torch.arange(10) != label].max() for row, label in zip(logits, y, strict=True)]
    )


def ratio(logits, labels):
    """The difference of logits ratio."""
    ranked = logits.sort(dim=1, descending=True).values
    ahead = others(logits, labels) - logits.gather(1, labels[:, None])[:, 0]
    return ahead / (ranked[:, 0] - ranked[:, 2] + 1e-12)


def test_leaves_the_model_as_it_was(model, batch):
    x, y = batch
    model.train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    F.cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    PGD(EPS, EPS / 4, 2)(model, x, y)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_restores_modes_after_an_exception(model, batch):
    x, y = batch
    model.train()
    model.linear.forward = lambda v: 1 / 0
    with pytest.raises(ZeroDivisionError):
        PGD(EPS, EPS / 4, 2)(model, x, y)
    assert all(m.training for m in model.modules())


def test_runs_in_eval_mode_without_weight_gradients(model, batch):
    seen = []

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return self.net(x)

    x, y = batch
    with torch.no_grad():
        PGD(EPS, EPS / 4, 3)(Probe(), x, y)
    assert seen == [(False, True)] * 3


def test_samples_do_not_depend_on_their_batch(model, batch):
    x, y = batch
    attack, index = PGD(EPS, EPS / 4, 3), torch.arange(100, 106)
    torch.manual_seed(5)
    together = attack(model, x, y, index=index)
    torch.manual_seed(5)
    alone = attack(model, x[2:3], y[2:3], index=index[2:3])
    torch.testing.assert_close(alone, together[2:3], rtol=0, atol=1e-6)


def test_ascend_takes_any_objective_and_counts_bad_gradients(batch):
    x, _ = batch
    target = torch.ones_like(x)
    attack = PGD(0.1, 0.05, 4, init="zero")
    x_adv = attack.ascend(lambda v, t: -(v - t).pow(2).flatten(1).sum(1), x, target)
    torch.testing.assert_close(x_adv, (x + 0.1).clamp(max=1))
    assert attack.bad_gradients == 0
    broken = torch.zeros(len(x))
    broken[1] = math.nan
    attack.ascend(lambda v, w: v.flatten(1).sum(1) * w, x, broken)
    assert attack.bad_gradients == 4  # one sample, four steps
    assert input_gradient(lambda v: v.flatten(1).sum(1), x).eq(1).all()


def test_works_under_no_grad_and_inference_mode(model, batch):
    x, y = batch
    attack = PGD(EPS, EPS / 4, 2, init="zero")
    expected = attack(model, x, y)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(attack(model, x, y), expected)


def test_empty_batch_returns_empty(model, batch):
    x, y = batch
    assert PGD()(model, x[:0], y[:0]).shape == (0, 3, 8, 8)


def test_frozen_twin_is_refreshed(model, batch):
    x, y = batch
    model.eval()
    twin = freeze(model)
    with torch.no_grad():
        for p in model.parameters():
            p.data = p * 1.1
    attack = PGD(EPS, EPS / 4, 2, init="zero")
    assert torch.equal(attack(twin, x, y), attack(model, x, y))


class Probabilities(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10].softmax(1)


def test_bad_arguments_name_themselves(model, batch):
    x, y = batch
    attack = PGD(EPS, EPS / 4, 1)

    def fails(match, *args, error=ValueError, net=model, **kwargs):
        with pytest.raises(error, match=match):
            attack(net, *args, **kwargs)

    with pytest.raises(ValueError, match="eps is 8, must be .*did you mean 8/255"):
        PGD(eps=8)
    with pytest.warns(UserWarning, match=r"step_size 0.031373 is larger than eps 0.0078"):
        PGD(eps=2 / 255, step_size=8 / 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PGD(), FGSM()
    with pytest.raises(ValueError, match="init is 'normal', must be"):
        PGD(init="normal")
    fails(r"x is in \[-?[\d.e+]+, 2\], must be in \[0.0, 1.0\]", x * 0 + 2, y)
    fails("x is in", x.clone().fill_(math.nan), y)
    fails("x is torch.uint8, must be torch.float32", (x * 255).byte(), y, error=TypeError)
    fails("y has labels from 0 to 10, must be in", x, torch.tensor([0, 1, 2, 3, 4, 10]))
    fails("y is torch.float32", x, y.float())
    fails(r"y is torch.int64 \(5,\), must be torch.int64 \(6,\)", x, y[:5])
    fails("y is missing", x)
    fails("target_logits is missing", x, y, loss="kl")
    fails("loss is 'mse', must be one of", x, y, loss="mse")
    two = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    fails(r"logits has shape \(6, 2\), must be .* C >= 3", x, y % 2, loss="dlr", net=two)
    fails("model returned probabilities", x, y, net=Probabilities())
    nan = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    nn.init.constant_(nan[1].bias, math.nan)
    fails("model returned NaN", x, y, net=nan)
    fails("model returned shape", x, y, net=nn.Conv2d(3, 10, 1))


def rank(model, x_adv, y):
    """(misclassified, cross-entropy) [B, 2] of points: what the attack wants high."""
    with torch.no_grad():
        logits = model.eval()(x_adv)
    value = F.cross_entropy(logits, y, reduction="none")
    return torch.stack([(logits.argmax(1) != y).to(value.dtype), value], 1)


def test_restarts_return_the_best_of_their_starts(model, batch):
    """Bit for bit the better of the runs from each start by itself, in one batch."""
    x, y = batch
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    attack = PGD(EPS, EPS / 4, 2, restarts=4)
    torch.manual_seed(5)
    x_adv = attack(model, x, y)
    torch.manual_seed(5)
    starts = attack._starts(x, None).chunk(4)
    singles = [PGD(EPS, EPS / 4, 2)(model, x, y, start=start) for start in starts]
    ranks = [rank(model, single, y) for single in singles]
    chosen = set()
    for i in range(len(x)):
        best = max(range(4), key=lambda r: tuple(ranks[r][i].tolist()))
        assert torch.allclose(x_adv[i], singles[best][i], atol=1e-6)
        chosen.add(best)
    assert len(chosen) > 1


def test_restarts_prefer_a_misclassified_point_to_a_higher_loss():
    """Two starts, no steps: the loss is higher at the one that is classified right."""

    class Table(nn.Module):
        def forward(self, x):
            table = torch.tensor([[2.0, 1.9, 1.9, 1.9, 1.9], [2.0, 2.1, -9.0, -9.0, -9.0]])
            return table[(x.flatten(1)[:, 0] > 0.5).long()]

    x, y = torch.full((1, 1), 0.5), torch.zeros(1, dtype=torch.int64)
    logits = Table()(torch.tensor([[0.4], [0.6]]))
    assert F.cross_entropy(logits[:1], y) > F.cross_entropy(logits[1:], y)
    found = set()
    for seed in range(8):
        torch.manual_seed(seed)
        found.add(bool(PGD(0.2, 0.05, 0, restarts=8)(Table(), x, y) > 0.5))
    assert found == {True}


@pytest.mark.parametrize("loss", ["ce", "dlr", "kl"])
def test_keep_best_returns_the_best_iterate(model, batch, loss):
    """Steps of twice eps jump from corner to corner: the last iterate is rarely the best."""
    x, y = batch
    visited = []

    class Noted(nn.Module):
        def forward(self, v):
            visited.append(v.detach().clone())
            return model(v)

    model.eval()
    z = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attack = PGD(EPS, 2 * EPS, 6, keep="best")
    x_adv = attack(Noted(), x, y, loss=loss, target_logits=z)
    assert len(visited) == 7  # every iterate, and the last
    label = z.argmax(1) if loss == "kl" else y

    def value(v):
        with torch.no_grad():
            logits = model(v)
            if loss == "kl":
                each = F.kl_div(logits.log_softmax(1), z.softmax(1), reduction="none").sum(1)
            else:
                each = OBJECTIVES[loss](logits, y)
        return [(bool(w), float(e)) for w, e in zip(logits.argmax(1) != label, each, strict=True)]

    values, mine = [value(v) for v in visited], value(x_adv)
    for i in range(len(x)):
        assert mine[i] == pytest.approx(max(v[i] for v in values), abs=1e-5)
    assert not torch.equal(x_adv, visited[-1])


def test_keep_best_keeps_the_start_where_steps_only_harm():
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.ones(3, dtype=torch.int64)
    for keep, stays in (("best", True), ("last", False)):
        x_adv = PGD(0.1, 0.025, 5, "zero", keep=keep)(Hilltop(), x, y)
        assert torch.equal(x_adv, x) == stays


class Hilltop(nn.Module):
    """Class 0 gains at x = 0.5 alone, and the gradient says to go up."""

    def forward(self, x):
        v = x.flatten(1).sum(1)
        logit = torch.where(v == 2, 5.0, 0.0) + (v - v.detach())
        return torch.stack([logit, torch.ones_like(logit)], 1)


def test_restarts_do_not_depend_on_the_batch(model, batch):
    x, y = batch
    attack, index = PGD(EPS, EPS / 4, 2, restarts=3), torch.arange(6)
    torch.manual_seed(0)
    whole = attack(model, x, y, index=index)
    torch.manual_seed(0)
    part = attack(model, x[3:], y[3:], index=index[3:])
    assert (whole[3:] - part).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "match"),
    [({"restarts": 0}, "restarts is 0, must be at"), ({"keep": "all"}, "keep is 'all', must be")],
)
def test_refuses_restarts_and_keep(options, match):
    with pytest.raises(ValueError, match=match):
        PGD(EPS, EPS / 4, **options)


def test_a_start_goes_with_one_restart(model, batch):
    x, y = batch
    with pytest.raises(ValueError, match="start is given, must be None with restarts=2"):
        PGD(EPS, EPS / 4, 2, restarts=2)(model, x, y, start=x)


def test_starts_are_clipped_where_their_init_is_or_as_told():
    x = torch.cat([torch.zeros(8, 3, 4, 4), torch.ones(8, 3, 4, 4)])
    for options, inside in (
        ({"init": "uniform"}, True),
        ({"init": "uniform", "clip_start": False}, False),
        ({"init": "gaussian"}, False),
        ({"init": "gaussian", "clip_start": True}, True),
        ({"init": "gaussian", "clip_start": False}, False),
    ):
        start = PGD(0.1, 0.05, **options).start(x)
        assert bool(((start >= 0) & (start <= 1)).all()) == inside
        assert not torch.equal(start, x)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("options", [{"keep": "best"}, {"restarts": 2, "keep": "best"}])
@pytest.mark.parametrize("steps", [0, 3])
def test_no_start_is_returned_from_outside_ball_or_box(model, batch, norm, options, steps):
    x, y = batch

    class Away(nn.Module):
        """The loss rises with the distance to the first image."""

        def forward(self, v):
            size = (v - x[:1]).flatten(1).norm(dim=1, keepdim=True)
            return torch.cat([size * 0, size], 1)

    attack = PGD(0.01, 0.001, steps, "gaussian", 0.3, norm, **options)
    x_adv = attack(Away(), x, y * 0)
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    assert (x_adv - x).double().flatten(1).norm(order, dim=1).max() <= 0.01 * (1 + 1e-5)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_kl_is_wrong_where_the_target_is_another_class():
    """Without labels: of two starts the misclassified one, though its divergence is less."""

    class Table(nn.Module):
        def forward(self, x):
            table = torch.tensor([[2.0, 1.9, 1.9, 1.9, 1.9], [2.0, 2.1, -9.0, -9.0, -9.0]])
            return table[(x.flatten(1)[:, 0] > 0.5).long()]

    x, z = torch.full((1, 1), 0.5), torch.tensor([[1.2, 1.0, -9.0, -9.0, -9.0]])
    right, wrong = Table()(torch.tensor([[0.4], [0.6]])).log_softmax(1).split(1)
    assert F.kl_div(right, z.softmax(1)) > F.kl_div(wrong, z.softmax(1))
    attack = PGD(0.2, 0.05, 0, restarts=8)
    for seed in range(8):
        torch.manual_seed(seed)
        assert attack(Table(), x, target_logits=z, loss="kl") > 0.5


def test_cw_leaves_alone_what_is_fifty_logits_ahead():
    logits = torch.tensor([[0.0, 49.0], [0.0, 51.0], [9.0, 0.0]], requires_grad=True)
    value = OBJECTIVES["cw"](logits, torch.zeros(3, dtype=torch.int64))
    assert value.tolist() == [-1, 0, -59]
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert grad.tolist() == [[-1, 1], [0, 0], [-1, 1]]


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
def test_gradients_with_any_hole_are_counted(batch, hole):
    x, _ = batch
    weights = torch.ones(len(x))
    weights[[1, 4]] = hole
    attack = PGD(0.1, 0.05, 3, init="zero")
    x_adv = attack.ascend(lambda v, w: v.flatten(1).sum(1) * w, x, weights)
    assert attack.bad_gradients == 2 * 3
    assert x_adv.isfinite().all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_of_its_norm(model, batch, norm):
    x = 0.25 + batch[0] / 2  # away from the walls
    delta = (FGSM(0.2, norm)(model, x, batch[1]) - x).flatten(1)
    distance = delta.norm(math.inf if norm == "linf" else 2, dim=1)
    torch.testing.assert_close(distance, torch.full((6,), 0.2))


@pytest.mark.parametrize(
    ("z", "match"),
    [
        ([[2.0, -1.0]], None),  # sums to one, but no probability is negative
        ([[0.7, 0.3]], "model returned probabilities"),
        ([[0.7, 0.31]], None),
        ([[math.inf, 0.0]], "model returned NaN or infinite logits"),
        ([[-math.inf, 0.0]], "model returned NaN or infinite logits"),
        ([[math.nan, 0.0]], "model returned NaN or infinite logits"),
    ],
)
def test_logits_are_told_from_what_is_none(z, match):
    if match is None:
        checks.check_logits(torch.tensor(z), 1)
        return
    with pytest.raises(ValueError, match=match):
        checks.check_logits(torch.tensor(z), 1)
