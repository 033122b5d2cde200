"""Attacks towards a class: what they maximise, when they succeed, and how targets are named."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastadv import freeze
from fastadv.attacks import APGD, FGSM, PGD, Captured, Square, graphs, targets

EPS = 8 / 255
ATTACKS = {
    "pgd": PGD(EPS, EPS / 4, 4),
    "best": PGD(EPS, EPS / 4, 4, restarts=2, keep="best"),
    "fgsm": FGSM(EPS),
    "apgd": APGD(EPS, 6),
    "square": Square(EPS, 24),
}
each = pytest.mark.parametrize("name", ATTACKS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    net = nn.Sequential(*layers)
    net(torch.rand(32, 3, 8, 8))  # BatchNorm statistics of its own
    return net.eval()


@pytest.fixture
def batch(model):
    """Six images that the model classifies right, close to its boundaries."""
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model[-1].bias -= model(x).mean(0)
        return x, model(x).argmax(1)


def transcription(model, x, target, steps, step_size, loss):
    """Targeted PGD from x: descends the loss to the target."""
    x_adv = x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(loss(model(x_adv), target).sum(), x_adv)
        x_adv = x_adv.detach() - step_size * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv


def behind(logits, target):
    """max_{c != t} z_c - z_t."""
    others = logits.clone()
    others[torch.arange(len(target)), target] = -math.inf
    return others.max(1).values - logits.gather(1, target[:, None])[:, 0]


LOSSES = {
    "ce": lambda logits, target: F.cross_entropy(logits, target, reduction="none"),
    "margin": behind,
    "cw": lambda logits, target: behind(logits, target).clamp(min=-50),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_pgd_descends_the_loss_to_the_target(model, batch, loss):
    x, y = batch
    target = (y + 3) % 10
    expected = transcription(model, x, target, 5, EPS / 4, LOSSES[loss])
    attack = PGD(EPS, EPS / 4, 5, "zero")
    assert torch.equal(attack(model, x, y, target=target, loss=loss), expected)
    assert torch.equal(attack(model, x, target=target.int(), loss=loss), expected)
    once = transcription(model, x, target, 1, EPS, LOSSES[loss])
    assert torch.equal(FGSM(EPS)(model, x, y, target=target, loss=loss), once)


def test_cw_leaves_alone_what_is_fifty_logits_ahead():
    logits = torch.tensor([[49.0, 0.0], [51.0, 0.0], [0.0, 9.0]], requires_grad=True)
    value = targets.OBJECTIVES["cw"](logits, None, torch.zeros(3, dtype=torch.int64))
    assert value.tolist() == [-1, 0, -59]
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert grad.tolist() == [[1, -1], [0, 0], [1, -1]]


@pytest.mark.parametrize("attack", [PGD(EPS, EPS / 4, 5, "zero"), APGD(EPS, 1, loss="dlr")])
def test_dlr_is_the_targeted_one(model, batch, attack):
    """-(z_y - z_t) / (z_1 - (z_3 + z_4) / 2) rises."""
    x, y = batch
    target = (y + 3) % 10

    def ratio(logits):
        top = logits.sort(1, descending=True).values
        ahead = logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])
        return ahead[:, 0] / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)

    options = {} if isinstance(attack, APGD) else {"loss": "dlr"}
    torch.manual_seed(0)
    x_adv = attack(model, x, y, target=target, **options)
    if not options:
        torch.manual_seed(0)
        same = APGD(EPS, 1, loss="targeted", target_classes=2)(model, x, y, target=target)
        assert torch.equal(same, x_adv)
        with torch.no_grad():
            assert (ratio(model(x_adv)) > ratio(model(x))).all()
        return
    expected = transcription(model, x, target, 5, EPS / 4, lambda logits, _: -ratio(logits))
    assert (x_adv - expected).abs().gt(1e-6).float().mean() < 0.01


def predicted(model, x):
    with torch.no_grad():
        return model.eval()(x).argmax(1)


class Linear(nn.Module):
    """Six classes: the logit of class c is 4 times pixel c of the first row."""

    def forward(self, x):
        return 4 * x[:, 0, 0, :6]


@pytest.fixture
def reachable():
    """Three images [1, 2, 7] of label 0 under `Linear`; class 5 is the least likely, 1 the second,
    and all six are within 0.1."""
    row = torch.tensor([0.56, 0.55, 0.54, 0.53, 0.52, 0.51, 0.5])
    return row.expand(3, 1, 2, 7).clone(), torch.zeros(3, dtype=torch.int64)


@each
@pytest.mark.parametrize(
    ("target", "found"), [("second", 1), ("least-likely", 5), (torch.tensor([4, 2, 3]), None)]
)
def test_success_is_the_target(reachable, name, target, found):
    x, y = reachable
    found = target if found is None else torch.full((3,), found)
    attack = {
        "pgd": PGD(0.1, 0.02, 10),
        "best": PGD(0.1, 0.02, 10, restarts=2, keep="best"),
        "fgsm": FGSM(0.1),
        "apgd": APGD(0.1, 10),
        "square": Square(0.1, 300),
    }[name]
    x_adv = attack(Linear(), x, y, target=target)
    assert torch.equal(predicted(Linear(), x_adv), found)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize("attack", [APGD(0.1, 10), Square(0.1, 300)])
def test_an_attack_goes_on_until_the_target_is_found(reachable, attack):
    """A sample at another wrong class is not done, one at the target is left alone."""
    x, _ = reachable
    y = torch.tensor([1, 1, 5])  # the model says 0
    target = torch.tensor([3, 0, 4])
    x_adv = attack(Linear(), x, y, target=target)
    assert torch.equal(predicted(Linear(), x_adv), target)
    assert torch.equal(x_adv[1], x[1])
    assert torch.equal(attack(Linear(), x, y), x)


@pytest.mark.parametrize("loss", ["dlr", "targeted"])
def test_apgd_finds_the_second_class_by_the_targeted_dlr(reachable, loss):
    x_adv = APGD(0.1, 10, loss=loss)(Linear(), *reachable, target="second")
    assert torch.equal(predicted(Linear(), x_adv), torch.ones(3, dtype=torch.int64))


class Table(nn.Module):
    """Of class 2 where the image's one pixel is up to 0.5, and of class 0 beyond, although class 2
    has the higher probability there."""

    def forward(self, x):
        table = torch.tensor([[0.0, 2.0, 2.1, 2.0, 2.0], [4.0, -9.0, 3.9, -9.0, -9.0]])
        return table[(x.flatten(1)[:, 0] > 0.5).long()]


@pytest.mark.parametrize("attack", [PGD(0.2, 0.05, 0, restarts=8), Square(0.2, 8, restarts=3)])
def test_the_target_comes_before_a_higher_objective(attack):
    x, target = torch.full((1, 1, 1, 1), 0.55), torch.tensor([2])
    logits = Table()(torch.tensor([[0.4], [0.6]]))
    assert F.cross_entropy(logits[:1], target) > F.cross_entropy(logits[1:], target)
    for seed in range(6):
        torch.manual_seed(seed)
        x_adv = attack(Table(), x, torch.tensor([1]), target=target)
        assert predicted(Table(), x_adv) == 2


def test_square_ascends_the_cross_entropy():
    """The probability of a target that is out of reach rises to the most that the ball allows,
    where only the pixel of the target is up."""
    x = torch.full((4, 1, 2, 7), 0.5)
    x[..., 0] = 0.9
    y, target = torch.zeros(4, dtype=torch.int64), torch.full((4,), 5)
    x_adv = Square(0.05, 120)(Linear(), x, y, target=target)
    best = x - 0.05
    best[..., 5] += 0.1
    torch.testing.assert_close(Linear()(x_adv), Linear()(best))


@each
def test_targets_by_name_are_classes(model, batch, name):
    x, y = batch
    order = model.eval()(x).argsort(1, descending=True)
    wrong = y.clone()
    wrong[0], wrong[1] = order[0, -1], order[1, 4]  # labels that the model does not give
    for target, classes in (
        ("second", torch.where(torch.arange(6) < 2, order[:, 0], order[:, 1])),
        ("least-likely", torch.where(torch.arange(6) < 1, order[:, -2], order[:, -1])),
    ):
        torch.manual_seed(0)
        named = ATTACKS[name](model, x, wrong, target=target)
        torch.manual_seed(0)
        assert torch.equal(ATTACKS[name](model, x, wrong, target=classes), named)


def test_random_targets_are_uniform_and_by_seed_and_index():
    y, index = torch.arange(3000) % 5, torch.arange(3000) + 7
    logits = torch.zeros(3000, 5)

    def draw(rows, seed):
        torch.manual_seed(seed)
        return targets.classes("random", logits[rows], y[rows], index[rows])

    everything = torch.arange(3000)
    drawn = draw(everything, 0)
    counts = torch.zeros(5, 5).index_put((y, drawn), torch.ones(3000), accumulate=True)
    assert counts.diagonal().eq(0).all()
    assert counts[~torch.eye(5, dtype=torch.bool)].sub(150).abs().max() < 60
    some = torch.tensor([2900, 3, 77])
    assert torch.equal(draw(some, 0), drawn[some])
    assert not torch.equal(draw(everything, 1), drawn)
    two = targets.classes("random", torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]), index[:4])
    assert two.tolist() == [1, 0, 0, 1]


@each
@pytest.mark.parametrize("target", ["random", "second", "least-likely"])
def test_a_targeted_sample_does_not_depend_on_its_batch(model, batch, name, target):
    (x, y), index = batch, torch.arange(6) + 40
    torch.manual_seed(5)
    together = ATTACKS[name](model, x, y, target=target, index=index)
    torch.manual_seed(5)
    alone = ATTACKS[name](model, x[2:4], y[2:4], target=target, index=index[2:4])
    torch.testing.assert_close(alone, together[2:4], rtol=0, atol=1e-6)


@each
def test_an_attack_without_a_target_is_what_it_was(model, batch, name):
    x, y = batch
    torch.manual_seed(0)
    expected = ATTACKS[name](model, x, y)
    torch.manual_seed(0)
    assert torch.equal(ATTACKS[name](model, x, y, target=None), expected)
    torch.manual_seed(0)
    assert not torch.equal(ATTACKS[name](model, x, y, target=(y + 1) % 10), expected)


@each
def test_wrong_targets_are_named(model, batch, name):
    x, y = batch
    other = (y + 1) % 10
    same = torch.where(torch.arange(6) < 4, other, y)
    for target, error, match in (
        (same, ValueError, f"target is {y[4]} in row 4, must be another class than y"),
        (y, ValueError, f"target is {y[0]} in row 0, must be another"),
        (other + 10, ValueError, r"target has labels from \d+ to \d+, must be in \[0, 9\]"),
        (other - 11, ValueError, r"target has labels from -\d+ to -\d+, must be in \[0, 9\]"),
        (other[:5], ValueError, r"target is torch.int64 \(5,\), must be torch.int64 \(6,\)"),
        (other[:, None], ValueError, r"target is torch.int64 \(6, 1\), must be torch.int64 \(6,"),
        (other.float(), ValueError, r"target is torch.float32 \(6,\), must be torch.int64"),
        (other.tolist(), TypeError, "target is a list, must be a tensor"),
        (3, TypeError, "target is 3, must be a tensor"),
        (other.to("meta"), ValueError, "target is on meta, must be on cpu"),
        ("likeliest", ValueError, "target is 'likeliest', must be one of least-likely, random, se"),
    ):
        with pytest.raises(error, match=match):
            ATTACKS[name](model, x, y, target=target)


def test_pgd_says_what_a_target_goes_with(model, batch):
    x, y = batch
    attack, z = PGD(EPS, EPS / 4, 1), torch.randn(6, 10)
    for options, match in (
        ({"target": "second"}, "y is missing, which target='second' needs"),
        ({"target": y + 10}, r"target has labels from \d+ to \d+, must be in \[0, 9\]"),
        ({"target": (y + 1) % 10, "loss": "dlr"}, "y is missing, which loss='dlr' needs"),
        (
            {"target": "random", "loss": "kl", "target_logits": z},
            "target is 'random', must be None with loss='kl'",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            attack(model, x, **options)
    with pytest.raises(TypeError, match="index is a list, must be a tensor"):
        attack(model, x, y, target="random", index=[0] * 6)


@each
def test_the_model_is_left_as_it_was(model, batch, name):
    x, y = batch
    model.train()
    model[2].eval()
    modes = [m.training for m in model.modules()]
    mean = model[1].running_mean.clone()
    with torch.inference_mode():
        ATTACKS[name](model, x, y, target="least-likely")
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model[1].running_mean, mean)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "attack",
    [PGD(EPS, EPS / 4, 2, "zero"), PGD(EPS, EPS / 4, 0, restarts=2), APGD(EPS, 2, loss="dlr")],
)
@pytest.mark.parametrize("target", ["second", "random", torch.arange(6, dtype=torch.int32)])
def test_targets_work_in_inference_mode(model, batch, attack, target):
    x, y = batch
    y = torch.where(y == torch.arange(6), (y + 1) % 10, y).int()
    options = {"loss": "dlr"} if isinstance(attack, PGD) else {}
    torch.manual_seed(0)
    expected = attack(model, x, y, target=target, **options)
    torch.manual_seed(0)
    with torch.inference_mode():
        assert torch.equal(attack(model, x, y, target=target, **options), expected)


@each
def test_twins_and_doubles_are_attacked_too(model, batch, name):
    x, y = batch
    twin = freeze(model.eval())
    with torch.no_grad():
        model[-1].bias.copy_(model[-1].bias.flip(0))
    y = predicted(model, x)
    torch.manual_seed(0)
    expected = ATTACKS[name](model, x, y, target="second")
    torch.manual_seed(0)
    assert (ATTACKS[name](twin, x, y, target="second") - expected).abs().mean() < 1e-3
    x_adv = ATTACKS[name](model.double(), x.double(), y, target="second")
    assert x_adv.dtype == torch.float64


@each
def test_nothing_to_attack_is_given_back(model, name):
    x, y = torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)
    for target in ("random", y):
        assert ATTACKS[name](model, x, y, target=target).shape == x.shape


def test_captured_attacks_towards_targets_step_by_step(model, batch, monkeypatch):
    monkeypatch.setattr(graphs, "on_gpu", lambda x: True)
    x, y = batch
    captured, plain = Captured(PGD(EPS, EPS / 4, 3, "zero")), PGD(EPS, EPS / 4, 3, "zero")
    for _ in range(3):
        found = captured(model, x, y, target="second")
        assert torch.equal(found, plain(model, x, y, target="second"))
    assert captured.graph is None
