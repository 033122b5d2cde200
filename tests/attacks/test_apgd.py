import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import Calls, Holes, smooth
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from fastadv import freeze, losses, models
from fastadv.attacks import APGD
from fastadv.attacks.apgd import checkpoints

EPS = 8 / 255
LOSSES = ("ce", "dlr", "targeted")


def objective(net, loss):
    """What `ascend` takes, of the library's losses."""

    def inner(v, y, target):
        logits = net(v)
        value = {
            "ce": lambda: losses.cross_entropy(logits, y, reduction="none"),
            "dlr": lambda: losses.dlr(logits, y),
            "targeted": lambda: losses.dlr_targeted(logits, y, target),
        }[loss]()
        return value, logits.argmax(1) != y

    return inner


def loss_of_one(logits, y, target, loss):
    """The paper's losses of one sample: equations 1, 6 and 7."""
    ranked = logits.sort(descending=True).values
    if loss == "ce":
        return logits.logsumexp(0) - logits[y]
    if loss == "dlr":
        other = max(value for c, value in enumerate(logits) if c != y)
        return -(logits[y] - other) / (ranked[0] - ranked[2] + 1e-12)
    scale = ranked[0] - (ranked[2] + ranked[3]) / 2 + 1e-12
    return -(logits[y] - logits[target]) / scale


def algorithm_1(f, x, visited, values, eps, norm, rho=0.75):
    """Croce & Hein 2020, algorithm 1, for one sample: what each iterate must be after those that
    were visited, whose losses were `values`, and the last step size.

    Following the visited ones keeps rounding from growing, and from deciding which of two iterates
    is the best where they have converged.
    """
    steps = len(visited) - 1
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    w = [math.ceil(round(100 * share, 6)) * steps // 100 for share in p]

    def gradient(v):
        v = v.clone().requires_grad_()
        return torch.autograd.grad(f(v), v)[0]

    def direction(g):
        return g.sign() if norm == "linf" else g / g.norm()

    def project(v):
        if norm == "linf":
            v = torch.maximum(torch.minimum(v, x + eps), x - eps)
        else:
            v = x + (v - x) * min(1, eps / (v - x).norm())
        return v.clamp(0, 1)

    eta, here, before, expected = 2 * eps, visited[0], visited[0], []
    top, halved, top_then = 0, [], values[0]  # top: which iterate has the highest value
    for k in range(steps):
        z = project(here + eta * direction(gradient(here)))
        alpha = 0.75 if k else 1.0
        expected.append(project(here + alpha * (z - here) + (1 - alpha) * (here - before)))
        before, here = here, visited[k + 1]
        top = k + 1 if values[k + 1] > values[top] else top
        if k + 1 in w:
            last = w[w.index(k + 1) - 1]
            rises = sum(values[i + 1] > values[i] for i in range(last, k + 1))
            same = bool(halved) and not halved[-1] and values[top] == top_then
            halved.append(bool(rises <= rho * (k + 1 - last)) or same)
            top_then = values[top]
            if halved[-1]:
                eta, here = eta / 2, visited[top]
    return torch.stack(expected), eta


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_iterate_is_that_of_algorithm_1(norm, loss):
    net, eps = smooth(), 0.1 if norm == "linf" else 0.3
    g = torch.Generator().manual_seed(4)
    x = torch.rand(12, 8, generator=g, dtype=torch.float64)
    noise = 2 * torch.rand(12, 8, generator=g, dtype=torch.float64) - 1
    start = (x + eps / 4 * noise).clamp(0, 1)
    y = net(x).argmax(1)
    target = (y + 1 + torch.arange(12) % 4) % 5
    seen = []

    def inner(v, y, target):
        value, wrong = objective(net, loss)(v, y, target)
        seen.append((v.detach().clone(), value.detach()))
        return value, wrong

    APGD(eps, loss=loss, norm=norm).ascend(inner, x, y, target, start=start)
    visited, values = (torch.stack(column) for column in zip(*seen, strict=True))
    assert len(visited) == 101
    assert torch.equal(visited[0], start)
    etas = []
    for i in range(len(x)):

        def f(v, i=i):
            return loss_of_one(net(v), y[i], target[i], loss)

        expected, eta = algorithm_1(f, x[i], visited[:, i], values[:, i], eps, norm)
        # The direction of a confident sample's gradient, p - 1 with p near 1, is good to 1e-8.
        torch.testing.assert_close(visited[1:, i], expected, rtol=0, atol=1e-8)
        with torch.no_grad():
            losses_of_i = torch.stack([f(v) for v in visited[:, i]])
        torch.testing.assert_close(values[:, i], losses_of_i, rtol=1e-9, atol=1e-12)
        etas.append(eta)
    assert min(etas) < eps / 8  # halved more than once
    assert len(set(etas)) > 1  # sample by sample


def test_checkpoints():
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert checkpoints(1) == {1: 1}


@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(0, 1),
    steps=st.integers(1, 30),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_every_iterate_is_in_ball_and_box(norm, eps, steps, scale, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 1, 3, 3, generator=g).round(decimals=1)  # corners of the box too
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 5))
    nn.init.normal_(net[1].weight, std=scale, generator=g)
    nn.init.zeros_(net[1].bias)
    calls = Calls(net)
    torch.manual_seed(seed)
    x_adv = APGD(eps, steps=steps, norm=norm)(calls, x, net(x).argmax(1))
    assert len(calls.inputs) == steps + 2
    for v in (*calls.inputs, x_adv):
        distance = (v - x).double().flatten(1).norm(math.inf if norm == "linf" else 2, dim=1)
        assert distance.max() <= eps * (1 + 1e-5) + 1e-7
        assert v.min() >= 0
        assert v.max() <= 1


def test_keeps_the_wrong_iterate_of_highest_loss_else_the_highest():
    g = torch.Generator().manual_seed(5)
    x, seen = torch.rand(64, 3, generator=g), []

    def inner(v):
        """A loss and an outcome that have little in common; a quarter is never wrong."""
        loss = v.sum(1) + torch.randn(64, generator=g)
        wrong = (torch.rand(64, generator=g) < 0.2) & (torch.arange(64) % 4 > 0)
        seen.append((v.detach().clone(), loss.detach(), wrong))
        return loss, wrong

    found = APGD(0.1, steps=20).ascend(inner, x, start=x)
    for i in range(64):
        best = max(seen, key=lambda visit: (bool(visit[2][i]), float(visit[1][i])))
        for ours, visited in zip(found, best, strict=True):
            assert torch.equal(ours[i], visited[i])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", LOSSES)
def test_ascend_waits_for_nothing(norm, loss):
    """Fake tensors have no values: whatever reads one, or depends on how many there are, raises."""
    net = models.get("digits_net", in_channels=1, width=4).eval()
    attack = APGD(0.1, steps=8, norm=norm, loss=loss)

    def run(inner):
        with FakeTensorMode(allow_non_fake_inputs=True):
            x, y = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
            return attack.ascend(inner, x, y, y + 1, start=x.clone())

    x_adv, value, wrong = run(objective(net, loss))
    assert (x_adv.shape, value.shape, wrong.dtype) == ((3, 1, 8, 8), (3,), torch.bool)
    with pytest.raises(DynamicOutputShapeException):
        run(lambda v, y, t: (v[y == 0].sum() + v.flatten(1).sum(1), y != 0))


def test_rounds_are_run_on_robust_samples_alone(model, batch):
    x, y = batch
    y = y.clone()
    y[1] = (y[1] + 1) % 10  # wrong from the beginning

    class Falls(nn.Module):
        """Sample i, the nearest in x, falls in call `when[i]` alone; 0 and 2 never do."""

        def forward(self, v):
            sizes.append(len(v))
            rows = torch.cdist(v.flatten(1), x.flatten(1)).argmin(1)
            falls = torch.tensor([when.get(int(row), 99) == len(sizes) for row in rows])
            right = F.one_hot(labels[rows], 10) * (3.0 - v.mean((1, 2, 3)))[:, None]
            return torch.where(falls[:, None], -right, right)

    labels, sizes = batch[1], []
    when = {3: 3, 4: 6, 5: 6}  # calls 2 to 4 are round 1, 5 to 7 round 2, 8 to 10 round 3
    x_adv = APGD(EPS, steps=2, restarts=3)(Falls(), x, y)
    assert sizes == [6, *[5] * 3, *[4] * 3, *[2] * 3]
    assert torch.equal(x_adv[1], x[1])
    assert (x_adv != x).flatten(1).any(1).tolist() == [True, False, True, True, True, True]


def test_restarts_start_apart_and_end_when_nothing_is_robust(model, batch):
    x, y = batch
    calls = Calls(model)
    APGD(EPS, steps=1, restarts=3)(calls, x, y)
    first, *starts = calls.inputs[0], *calls.inputs[1::2]
    assert torch.equal(first, x)
    assert len(starts) == 3
    for one, other in itertools.combinations(starts, 2):
        assert (one - other).abs().max() > EPS / 2
    calls.inputs.clear()
    wrong = (y + 1) % 10
    assert torch.equal(APGD(EPS, steps=1, restarts=3)(calls, x, wrong), x)
    assert len(calls.inputs) == 1


def test_targets_are_the_likeliest_other_classes(model, batch, monkeypatch):
    x, y = batch
    asked = []
    monkeypatch.setattr(
        "fastadv.losses.dlr_targeted",
        lambda logits, y, target: asked.append(target) or -logits.gather(1, y[:, None])[:, 0] * 0,
    )
    with torch.no_grad():
        expected = model(x).argsort(dim=1, descending=True)[:, 1:]
    tiny = 1e-6  # too small a ball to break anything
    APGD(tiny, steps=1, restarts=2, loss="targeted", target_classes=3)(model, x, y)
    assert torch.equal(torch.stack(asked[::4], 1), expected[:, :3])
    assert len(asked) == 3 * 2 * 2
    asked.clear()
    APGD(tiny, steps=1, loss="targeted", target_classes=50)(model, x, y)
    assert torch.equal(torch.stack(asked[::2], 1), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", LOSSES)
def test_breaks_everything_in_a_large_ball(loss, norm):
    net = smooth().float()
    x = torch.rand(50, 8, generator=torch.Generator().manual_seed(7))
    y = net(x).argmax(1)
    x_adv = APGD(0.6 if norm == "linf" else 1.7, steps=20, loss=loss, norm=norm)(net, x, y)
    assert (net(x_adv).argmax(1) != y).all()


def test_samples_do_not_depend_on_their_batch(model, batch):
    x, y = batch
    attack, index = APGD(0.1, steps=1, restarts=2, norm="l2"), torch.arange(100, 106)
    torch.manual_seed(5)
    together = attack(model, x, y, index=index)
    torch.manual_seed(5)
    alone = attack(model, x[2:3], y[2:3], index=index[2:3])
    torch.testing.assert_close(alone, together[2:3], rtol=0, atol=1e-6)


def test_leaves_the_model_as_it_was(model, batch):
    x, y = batch
    model.train()
    model.layer1.eval()
    F.cross_entropy(model(x), y).backward()
    modes = [m.training for m in model.modules()]
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    grads = [p.grad.clone() for p in model.parameters()]
    calls = Calls(model)
    with torch.no_grad():
        y = copy.deepcopy(model).eval()(x).argmax(1)  # right at x, so that there is work
        APGD(EPS / 8, steps=2)(calls, x, y)
    assert calls.modes[1:] == [(False, True)] * 3
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    model.linear.forward = lambda v: 1 / 0
    with pytest.raises(ZeroDivisionError):
        APGD(EPS, steps=2)(model, x, y)
    assert [m.training for m in model.modules()] == modes


def test_frozen_twin_is_refreshed_and_inference_mode_changes_nothing(model, batch):
    x, y = batch
    twin = freeze(model)
    with torch.no_grad():
        for p in model.parameters():
            p.data = p * 1.1
    attack, results = APGD(EPS / 8, steps=3), []
    modes = torch.no_grad, torch.enable_grad, torch.inference_mode
    for net, mode in zip((twin, model, model), modes, strict=True):
        torch.manual_seed(6)
        with mode():
            results.append(attack(net, x.clone(), y.clone()))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_is_not_finite_does_not_move_and_is_counted():
    x = torch.full((3, 4), 0.5)
    holes = torch.ones(3, 4)
    holes[1, 2], holes[2] = math.nan, math.inf
    for norm in ("linf", "l2"):
        attack = APGD(0.1, steps=4, norm=norm)
        with torch.no_grad():
            x_adv, _, _ = attack.ascend(lambda v: (Holes.apply(v, holes), v[:, 0] < 0), x, start=x)
        assert attack.bad_gradients == 2 * 5  # two samples, five gradients
        assert x_adv.isfinite().all()
        assert (x_adv[0] > 0.5).all()
        assert (x_adv[1] > 0.5).tolist() == [True, True, False, True]
        assert torch.equal(x_adv[2], x[2])


def test_a_vanishing_gradient_has_a_direction():
    x = torch.full((2, 4), 0.5)
    attack = APGD(0.1, steps=4, norm="l2")
    x_adv, _, _ = attack.ascend(lambda v: (1e-30 * v.sum(1), v[:, 0] < 0), x, start=x)
    torch.testing.assert_close(x_adv, x + 0.05)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_passes_are_averaged(norm):
    """Gradient and loss are the means over the passes, the outcome is that of most of them."""
    x, passes, seen = torch.full((3, 4), 0.5), itertools.count(), []

    def inner(v):
        turn = next(passes) % 5
        slope = torch.tensor([[1.0, 2, 3, -4], [-1, 1, 1, 1], [1, -1, 1, 1]]) * (turn - 1)
        seen.append(v.detach().clone())
        wrong = torch.tensor([turn < 2, turn < 3, True])
        return (v * slope).sum(1) + turn, wrong

    attack = APGD(0.1, 4, norm=norm, eot_iter=5)
    ascend = attack.ascend_l1 if norm == "l1" else attack.ascend
    x_adv, loss, wrong = ascend(inner, x, start=x)
    mean = torch.tensor([[1.0, 2, 3, -4], [-1, 1, 1, 1], [1, -1, 1, 1]])  # turn - 1 is 1 on average
    torch.testing.assert_close(loss, (x_adv * mean).sum(1) + 2)
    assert wrong.tolist() == [False, True, True]
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(seen[:5]))
    assert len(seen) == 5 * (4 + (3 if norm == "l1" else 1))
    once = APGD(0.1, 4, norm=norm)
    climb = once.ascend_l1 if norm == "l1" else once.ascend
    expected, *_ = climb(lambda v: ((v * mean).sum(1), v[:, 0] < 0), x, start=x)
    torch.testing.assert_close(x_adv, expected)


def test_averaging_beats_the_noise_of_a_random_model(model, balanced):
    """One pass of a random model has a gradient that is mostly noise."""
    x, y = balanced

    class Random(nn.Module):
        def forward(self, v):
            return model(v) + 20 * (torch.randn_like(v) * v).flatten(1).mean(1, keepdim=True) * tilt

    tilt, margins = torch.linspace(-1, 1, 10), []
    for eot_iter in (1, 20):
        torch.manual_seed(0)
        x_adv = APGD(0.02, 10, eot_iter=eot_iter)(Random(), x, y)
        with torch.no_grad():
            margins.append(losses.margin(model(x_adv), y).mean())
    assert margins[1] > margins[0]


def test_most_passes_decide_what_is_misclassified_already():
    """Of a model that is wrong in every fourth pass no sample may be left where it is; of one that
    is wrong in three of four all are."""

    class Random(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.rate = rate

        def forward(self, v):
            s = (v * (1 - v)).flatten(1).sum(1, keepdim=True)
            wrong = (torch.rand(len(v), 1) < self.rate).float()
            return torch.cat([s + 1, s + 2 * wrong], 1)

    x, y = torch.full((300, 1, 2, 2), 0.4), torch.zeros(300, dtype=torch.int64)
    torch.manual_seed(0)
    for rate, eot_iter, least, most in (
        (0.25, 1, 40, 110),
        (0.25, 101, 0, 0),
        (0.75, 1, 190, 260),
        (0.75, 101, 300, 300),
    ):
        x_adv = APGD(0.1, 1, eot_iter=eot_iter)(Random(rate), x, y)
        assert least <= (x_adv == x).flatten(1).all(1).sum() <= most


def test_empty_batch_returns_empty(model, batch):
    x, y = batch
    assert APGD()(model, x[:0], y[:0]).shape == (0, 3, 8, 8)


def test_bad_arguments_name_themselves(model, batch):
    x, y = batch

    def fails(match, *args, error=ValueError, net=model, loss="ce"):
        with pytest.raises(error, match=match):
            APGD(EPS, steps=1, loss=loss)(net, *args)

    for match, arguments in {
        "eps is 8, must be .*did you mean 8/255": {"eps": 8},
        "norm is 'l0', must be": {"norm": "l0"},
        "loss is 'cw', must be one of ce, dlr, targeted": {"loss": "cw"},
        "steps is 0, must be at least 1": {"steps": 0},
        "restarts is 0, must be at least 1": {"restarts": 0},
        "target_classes is 0, must be at least 1": {"target_classes": 0},
        "rho is 1.5, must be in": {"rho": 1.5},
        "eot_iter is 0, must be at least 1": {"eot_iter": 0},
    }.items():
        with pytest.raises(ValueError, match=match):
            APGD(**arguments)
    fails(r"x is in \[", x + 2, y)
    fails("x is torch.uint8, must be torch.float32", (x * 255).byte(), y, error=TypeError)
    fails("y has labels from", x, y + 10)
    fails("y is torch.float32", x, y.float())
    two = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    nn.init.zeros_(two[1].weight)  # class 0 for all: nothing is wrong at x
    nn.init.zeros_(two[1].bias)
    for loss, least in (("dlr", 3), ("targeted", 4)):
        fails(f"logits has shape \\(6, 2\\), must be .* C >= {least}", x, y * 0, loss=loss, net=two)
    fails("model returned probabilities", x, y, net=nn.Sequential(model, nn.Softmax(1)))
    fails("model returned shape", x, y, net=nn.Conv2d(3, 10, 1))


def test_bad_gradients_add_up_over_the_rounds_of_one_call():
    class Broken(nn.Module):
        """Robust everywhere; the gradient of two samples of three has holes."""

        def forward(self, v):
            holes = torch.ones_like(v)
            holes[: 2 * len(v) // 3] = math.nan
            z = 1e-6 * Holes.apply(v, holes)
            return torch.stack([3 + z, 0 * z, 0 * z], 1)

    x, y = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    attack = APGD(0.1, steps=4, restarts=3)
    for _ in range(2):
        attack(Broken(), x, y)
        assert attack.bad_gradients == 2 * 5 * 3  # samples, gradients of a round, rounds
