import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import Calls, Holes, smooth
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from fastadv import freeze, models
from fastadv.attacks import FAB
from fastadv.attacks.fab import to_hyperplane

EPS = 8 / 255
NORMS = ("linf", "l2", "l1")
ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}


def difference(net):
    """What `approach` takes, of a network."""

    def inner(v, y, target):
        logits, rows = net(v), torch.arange(len(v))
        return logits[rows, target] - logits[rows, y], logits.argmax(1) != y

    return inner


def length(d, norm):
    return d.double().flatten(1).norm(ORDERS[norm], dim=1)


def sorted_projection(v, w, value, norm, lo=0.0, hi=1.0):
    """The least d of one sample in float64: which elements end at their wall follows from the
    order in which they meet it."""
    v, w, value = (a.double() for a in (v, w, value))
    w = -w * value.sign()
    moves = (w != 0).nonzero()[:, 0]
    if not len(moves) or value == 0:
        return torch.zeros_like(v)
    if norm == "l1":
        return greedy(v, w, value.abs(), moves, lo, hi)
    direction = w.sign() if norm == "linf" else w
    walls = torch.where(w > 0, hi - v, lo - v)
    when = (walls[moves] / direction[moves]).sort()
    order = moves[when.indices]
    done = torch.cat((torch.zeros(1), (w * walls)[order].cumsum(0)))  # by those at their walls
    left = (w * direction)[order].flip(0).cumsum(0).flip(0)  # speed of the others
    at_wall = done[:-1] + left * when.values  # w . d as each arrives
    first = int((at_wall < value.abs()).sum())
    d = torch.zeros_like(v)
    if first < len(order):
        d = direction * (value.abs() - done[first]) / left[first]
    d[order[:first]] = walls[order[:first]]
    return d


def greedy(v, w, goal, moves, lo, hi):
    """The same in l1: the steepest elements first, each up to its wall."""
    d = torch.zeros_like(v)
    for e in sorted(moves.tolist(), key=lambda e: -abs(w[e])):
        wall = hi - v[e] if w[e] > 0 else lo - v[e]
        d[e] = min((goal - w @ d) / abs(w[e]), abs(wall)) * wall.sign()
    return d


def planes(kind, n, rows, seed):
    """(v, w, value) in float64; the share of its reach that each row needs goes up to 1.1."""
    g = torch.Generator().manual_seed(seed)

    def uniform():
        return torch.rand(rows, n, generator=g, dtype=torch.float64)

    v, w = uniform(), torch.randn(rows, n, generator=g, dtype=torch.float64)
    if kind == "corners":
        v = torch.where(uniform() < 0.7, v.round(), v)
    if kind == "spread":
        w = w * (4 * uniform() - 2).exp()
    if kind != "dense":
        w[uniform() < 0.3] = 0
    sign = torch.where(uniform()[:, 0] < 0.5, 1.0, -1.0)
    room = torch.where(w * sign[:, None] < 0, 1 - v, v)
    share = torch.linspace(0, 1.1, rows, dtype=torch.float64)
    return v, w, sign * share * (room * w.abs()).sum(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["dense", "zeros", "corners", "spread"])
@pytest.mark.parametrize("n", [1, 2, 11, 300])
def test_projection_is_that_of_sorting(norm, kind, n):
    v, w, value = planes(kind, n, 56, seed=n)
    value[-1] *= 1e6
    expected = torch.stack([sorted_projection(*row, norm) for row in zip(v, w, value, strict=True)])
    d = to_hyperplane(v, w, value, norm, 0.0, 1.0)
    # What needs all of its reach is ill-conditioned: rounding decides where its last elements end.
    clear = (torch.linspace(0, 1.1, 56, dtype=torch.float64) - 1).abs() > 1e-3
    # In l1 what is left for the last element is divided by its weight, however small this is.
    weight = (
        w.abs() / w.abs().amax(1, keepdim=True).clamp(min=1e-9)
        if norm == "l1"
        else torch.ones_like(w)
    )
    low = to_hyperplane(v.float(), w.float(), value.float(), norm, 0.0, 1.0).double()
    wide = to_hyperplane(4 * v - 1, w, 4 * value, norm, -1.0, 3.0) / 4
    for found, rtol, atol in ((d, 1e-9, 1e-11), (wide, 1e-9, 3e-12), (low, 0, 2e-5)):
        found, wanted = ((weight * e)[clear] for e in (found, expected))
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("norm", NORMS)
def test_where_the_hyperplane_is_out_of_reach_all_go_to_their_walls(norm):
    v = torch.tensor([[0.0, 0.3, 1.0, 0.6, 0.5]])
    w = torch.tensor([[1.0, -2.0, 1.0, 1e-5, 0.0]])
    for scale in (1e-30, 1.0, 1e30):
        up, down = (
            to_hyperplane(v, scale * w, torch.tensor([s * scale * 50]), norm, 0.0, 1.0)
            for s in (-1, 1)
        )
        assert torch.equal(v + up, torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.5]]))
        assert torch.equal(v + down, torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.5]]))


@pytest.mark.parametrize("norm", NORMS)
def test_projection_does_not_depend_on_the_scale_of_the_logits(norm):
    v, w, value = (a.float() for a in planes("zeros", 11, 40, seed=0))
    d = to_hyperplane(v, w, value, norm, 0.0, 1.0)
    for scale in (2.0**-100, 2.0**100):
        assert torch.equal(to_hyperplane(v, scale * w, scale * value, norm, 0.0, 1.0), d)
    assert torch.equal(to_hyperplane(v, 0 * w, value, norm, 0.0, 1.0), 0 * v)
    assert torch.equal(to_hyperplane(v, w, 0 * value, norm, 0.0, 1.0), 0 * v)


def step_of_algorithm_1(f, x, here, norm):
    """Croce & Hein 2020, algorithm 1, for one sample: the iterate after `here`."""
    v = here.clone().requires_grad_()
    value = f(v)
    (w,) = torch.autograd.grad(value, v)
    value = value.detach()
    d = sorted_projection(here, w, value, norm)
    d_x = sorted_projection(x, w, value + w @ (x - here), norm)
    near, far = (e.norm(ORDERS[norm]) for e in (d, d_x))
    alpha = min(near / (near + far), 0.1)
    return ((1 - alpha) * (here + 1.05 * d) + alpha * (x + 1.05 * d_x)).clamp(0, 1), alpha


@pytest.mark.parametrize("norm", NORMS)
def test_every_iterate_is_that_of_algorithm_1(norm):
    net = smooth()
    g = torch.Generator().manual_seed(4)
    x = torch.rand(12, 8, generator=g, dtype=torch.float64).round(decimals=1)
    start = (x + 0.1 * torch.randn(12, 8, generator=g, dtype=torch.float64)).clamp(0, 1)
    with torch.no_grad():
        y = net(x).argmax(1)
    target = (y + 1 + torch.arange(12) % 4) % 5
    calls = Calls(net)
    found, least = FAB(norm=norm, steps=40).approach(difference(calls), x, y, target, start=start)
    assert calls.modes == [(True, True), (True, False)] * 40
    here, stepped = (torch.stack(calls.inputs[k::2]) for k in (0, 1))
    assert torch.equal(here[0], start)
    with torch.no_grad():
        wrong = torch.stack([net(v).argmax(1) != y for v in stepped])
    back = torch.where(wrong[..., None], x + 0.9 * (stepped - x), stepped)
    torch.testing.assert_close(here[1:], back[:-1], rtol=0, atol=1e-12)
    alphas = []
    for i in range(len(x)):

        def f(v, i=i):
            return net(v)[target[i]] - net(v)[y[i]]

        for k in range(40):
            expected, alpha = step_of_algorithm_1(f, x[i], here[k, i], norm)
            torch.testing.assert_close(stepped[k, i], expected, rtol=0, atol=1e-9)
            alphas.append(float(alpha))
        distances = [
            float(length((v - x[i])[None], norm)) if bad else math.inf
            for v, bad in zip(stepped[:, i], wrong[:, i], strict=True)
        ]
        best = min(range(40), key=distances.__getitem__)
        assert least[i] == pytest.approx(distances[best])
        assert torch.equal(found[i], stepped[best, i] if wrong[:, i].any() else x[i])
    assert min(alphas) < 0.09
    assert max(alphas) == 0.1
    assert wrong.any()
    assert not wrong.all()


@pytest.mark.parametrize("norm", NORMS)
def test_keeps_the_nearest_wrong_iterate_else_x(norm):
    g = torch.Generator().manual_seed(5)
    x, seen = torch.rand(64, 3, generator=g), []

    def inner(v):
        """Wrong by chance; a quarter never is. The point is what is kept, not where it goes."""
        wrong = (torch.rand(64, generator=g) < 0.3) & (torch.arange(64) % 4 > 0)
        if not torch.is_grad_enabled():
            seen.append((v.clone(), wrong))
        return (v * torch.randn(64, 3, generator=g)).sum(1) + 1, wrong

    found, least = FAB(norm=norm, steps=20).approach(inner, x, start=x)
    assert len(seen) == 20
    for i in range(64):
        bad = [v[i] for v, wrong in seen if wrong[i]]
        distances = [float(length((v - x[i])[None], norm)) for v in bad]
        assert bool(bad) == least[i].isfinite().item()
        if bad:
            assert least[i] == pytest.approx(min(distances), rel=1e-6)
            assert torch.equal(found[i], bad[distances.index(min(distances))])
        else:
            assert torch.equal(found[i], x[i])


@pytest.mark.parametrize("norm", NORMS)
def test_approach_waits_for_nothing(norm):
    """Fake tensors have no values: whatever reads one, or depends on how many there are, raises."""
    net = models.get("digits_net", in_channels=1, width=4).eval()
    attack = FAB(0.1, steps=3, norm=norm)

    def run(inner):
        with FakeTensorMode(allow_non_fake_inputs=True):
            x, y = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
            return attack.approach(inner, x, y, y + 1, start=x.clone())

    x_adv, least = run(lambda v, y, t: (net(v)[:, 1], net(v).argmax(1) != y))
    assert (x_adv.shape, least.shape) == ((3, 1, 8, 8), (3,))
    with pytest.raises(DynamicOutputShapeException):
        run(lambda v, y, t: (v[y == 0].sum() + v.flatten(1).sum(1), y != 0))


@given(norm=st.sampled_from(NORMS), eps=st.floats(0, 0.6), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_linear_classifiers_fall_where_they_must(norm, eps, seed):
    """Of a linear model the nearest adversarial point is the nearest of C - 1 projections."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(8, 1, 3, 3, generator=g).round(decimals=1)  # corners of the box too
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    nn.init.normal_(net[1].weight, generator=g)
    nn.init.zeros_(net[1].bias)
    with torch.no_grad():
        logits = net(x)
    y, flat = logits.argmax(1), x.flatten(1)
    least = torch.full((8,), math.inf, dtype=torch.float64)
    for i in range(8):
        for c in range(4):
            w = (net[1].weight[c] - net[1].weight[y[i]]).detach()
            d = sorted_projection(flat[i], w, logits[i, c] - logits[i, y[i]], norm)
            reached = (w.double() @ d + (logits[i, c] - logits[i, y[i]])).abs() < 1e-5
            if c != y[i] and reached:
                least[i] = min(least[i], length(d[None], norm)[0])
    x_adv = FAB(eps, steps=40, norm=norm)(net, x, y)
    broken = net(x_adv).argmax(1) != y
    distance = length(x_adv - x, norm)
    assert (distance <= eps).all()
    assert torch.equal(broken, distance > 0)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not broken[least > eps * (1 + 1e-5) + 1e-6].any()
    assert broken[least < 0.98 * eps].all()


def test_finds_nothing_beyond_eps_and_moves_nothing_in_vain(model, balanced):
    x, y = balanced
    y = y.clone()
    y[1] = (y[1] + 1) % 10  # wrong from the beginning
    far = FAB(1.0, steps=20)(model, x, y)
    distance = length(far - x, "linf")
    moved = torch.arange(6) != 1
    assert torch.equal(distance > 0, moved)
    for share in (0.5, 0.9):
        eps = float(share * distance[moved].min())
        near = FAB(eps, steps=20, target_classes=1)(model, x, y)
        assert torch.equal(near, x)
    one = FAB(1.0, steps=20, target_classes=1)(model, x, y)
    distance = length(one - x, "linf")
    eps = float(distance[moved].median())
    some = FAB(eps, steps=20, target_classes=1)(model, x, y)
    kept = distance <= eps
    assert torch.equal(some[kept], one[kept])
    assert torch.equal(some[~kept], x[~kept])
    assert 1 < int(kept.sum()) < 6


def test_rounds_are_run_on_robust_samples_alone(balanced):
    x, y = balanced
    labels, sizes = y, []
    y = y.clone()
    y[1] = (y[1] + 1) % 10  # wrong from the beginning

    class Falls(nn.Module):
        """Sample i, the nearest in x, falls in call `when[i]` alone; 0 and 2 never do."""

        def forward(self, v):
            sizes.append(len(v))
            rows = torch.cdist(v.flatten(1), x.flatten(1)).argmin(1)
            falls = torch.tensor([when.get(int(row), 99) == len(sizes) for row in rows])
            mean = v.mean((1, 2, 3))
            right = F.one_hot(labels[rows], 10) * (0.05 + mean - mean.detach())[:, None]
            return torch.where(falls[:, None], -right, right)

    when = {3: 3, 4: 7, 5: 9}  # calls 2 to 5 are round 1, 6 to 9 round 2, 10 to 13 round 3
    x_adv = FAB(1.0, steps=2, target_classes=3)(Falls(), x, y)
    assert sizes == [6, *[5] * 4, *[4] * 4, *[2] * 4]
    assert (x_adv != x).flatten(1).any(1).tolist() == [False, False, False, True, True, True]


def test_every_target_begins_at_x_and_restarts_in_half_the_ball(model, balanced):
    x, y = balanced
    for norm in NORMS:
        calls = Calls(model)
        FAB(1e-3, steps=1, restarts=3, target_classes=2, norm=norm)(calls, x, y)
        assert torch.equal(calls.inputs[0], x)
        starts = calls.inputs[1::2]
        assert len(starts) == 6
        assert torch.equal(starts[0], x)
        assert torch.equal(starts[3], x)
        noise = [starts[k] - x for k in (1, 2, 4, 5)]
        for k, delta in enumerate(noise):
            assert length(delta, norm).max() <= 0.5e-3 * (1 + 1e-4)
            assert length(delta, norm).max() > 0.4e-3
            for other in noise[:k]:
                assert (delta - other).abs().max() > 0.1 * delta.abs().max()


def test_targets_are_the_likeliest_other_classes(model, balanced, monkeypatch):
    x, y = balanced
    with torch.no_grad():
        expected = model(x).argsort(dim=1, descending=True)[:, 1:]
    asked = []

    def approach(self, inner, x, y, target, start):
        asked.append(target)
        return x, torch.full((len(x),), math.inf)

    monkeypatch.setattr(FAB, "approach", approach)
    FAB(restarts=2, target_classes=3)(model, x, y)
    assert torch.equal(torch.stack(asked, 1), expected[:, :3].repeat_interleave(2, dim=1))
    asked.clear()
    FAB(target_classes=50)(model, x, y)
    assert torch.equal(torch.stack(asked, 1), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_another_box_changes_nothing(norm):
    class Rescaled(nn.Module):
        def forward(self, v):
            return net((v + 1) / 4)

    net, eps = smooth(), {"linf": 0.2, "l2": 0.3, "l1": 0.4}[norm]
    x = torch.rand(30, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with torch.no_grad():
        y = net(x).argmax(1)
    results = []
    for attack, model, points in (
        (FAB(eps, 10, 2, norm=norm), net, x),
        (FAB(4 * eps, 10, 2, norm=norm, lo=-1.0, hi=3.0), Rescaled(), 4 * x - 1),
    ):
        torch.manual_seed(8)
        results.append(attack(model, points, y))
    torch.testing.assert_close(results[1], 4 * results[0] - 1, rtol=0, atol=1e-6)
    assert 3 < int((results[0] != x).any(1).sum()) < 30


def test_samples_do_not_depend_on_their_batch(model, balanced):
    x, y = balanced
    attack, index = FAB(5e-4, steps=2, restarts=2, norm="l2"), torch.arange(100, 106)
    starts = []
    for rows in (slice(None), slice(2, 3)):
        calls = Calls(model)
        torch.manual_seed(5)
        attack(calls, x[rows], y[rows], index=index[rows])
        assert len(calls.inputs) == 1 + 9 * 2 * 4
        starts.append(calls.inputs[5])
    assert torch.equal(starts[0][2:3], starts[1])
    assert not torch.equal(starts[1], x[2:3])


@pytest.mark.parametrize("norm", NORMS)
def test_untargeted_steps_go_to_the_nearest_hyperplane(norm):
    """Of those of all other classes, chosen anew in every step."""
    net = smooth()
    x = torch.rand(10, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        y = net(x).argmax(1)
    calls = Calls(net)
    x_adv = FAB(1.0, 20, norm=norm, target_classes=None)(calls, x, y)
    here, stepped = (torch.stack(calls.inputs[1 + k :: 2]) for k in (0, 1))
    assert len(here) == 20  # one pass per step for the gradients of all classes
    assert torch.equal(here[0], x)
    dual, chosen = {"linf": 1, "l2": 2, "l1": math.inf}[norm], set()
    for i in range(len(x)):
        for k in range(20):
            planes = []
            for c in range(5):

                def f(v, i=i, c=c):
                    return net(v)[c] - net(v)[y[i]]

                v = here[k, i].clone().requires_grad_()
                if c != y[i]:
                    (w,) = torch.autograd.grad(f(v), v)
                    planes.append((float(f(v).abs() / w.norm(dual)), c, f))
            _, c, f = min(planes)
            expected, _ = step_of_algorithm_1(f, x[i], here[k, i], norm)
            torch.testing.assert_close(stepped[k, i], expected, rtol=0, atol=1e-9)
            chosen.add((i, c))
    assert len(chosen) > len(x)  # some change their mind
    with torch.no_grad():
        assert (net(x_adv).argmax(1) != y).sum() >= 5


def test_untargeted_restarts_and_bad_gradients(model, balanced):
    x, y = balanced
    calls = Calls(model)
    attack = FAB(1e-3, steps=1, restarts=3, target_classes=None)
    attack(calls, x, y)
    starts = calls.inputs[1::2]
    assert len(starts) == 3  # whatever the number of classes
    assert torch.equal(starts[0], x)
    assert not torch.equal(starts[1], starts[2])
    assert attack.bad_gradients == 0

    class Broken(nn.Module):
        def forward(self, v):
            return model(v) + (0 * v).norm().sqrt() * torch.eye(10)[3]

    with torch.no_grad():
        attack(Broken(), x, model(x).argmax(1))
    assert attack.bad_gradients == 6 * 3  # once per image and step, not per class


def test_leaves_the_model_as_it_was(model, balanced):
    x, y = balanced
    model.train()
    model.layer1.eval()
    F.cross_entropy(model(x), y).backward()
    modes = [m.training for m in model.modules()]
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    grads = [p.grad.clone() for p in model.parameters()]
    calls = Calls(model)
    with torch.no_grad():
        y = copy.deepcopy(model).eval()(x).argmax(1)  # right at x, so that there is work
        FAB(EPS / 50, steps=2, target_classes=1)(calls, x, y)
    assert calls.modes[1:] == [(False, True), (False, False)] * 2
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    model.linear.forward = lambda v: 1 / 0
    with pytest.raises(ZeroDivisionError):
        FAB(EPS, steps=2)(model, x, y)
    assert [m.training for m in model.modules()] == modes


def test_frozen_twin_is_refreshed_and_inference_mode_changes_nothing(model, balanced):
    x, y = balanced
    twin = freeze(model)
    with torch.no_grad():
        for p in model.parameters():
            p.data = p * 1.1
        y = model(x).argmax(1)
    attack, results = FAB(EPS, steps=3), []
    modes = torch.no_grad, torch.enable_grad, torch.inference_mode
    for net, mode in zip((twin, model, model), modes, strict=True):
        with mode():
            results.append(attack(net, x.clone(), y.clone()))
    assert (results[1] != x).any()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)
    assert torch.equal(results[1], results[2])


def test_what_is_not_finite_does_not_move_and_is_counted():
    x = torch.full((4, 4), 0.5)
    holes = torch.ones(4, 4)
    holes[1, 2], holes[2], holes[3] = math.nan, math.inf, 0.0

    def inner(v):
        return Holes.apply(v, holes) - 2.4, v[:, 0] < 0

    for norm in ("linf", "l2"):  # an l1 step leaves most elements where they are
        seen = []
        attack = FAB(norm=norm, steps=4)
        attack.approach(lambda v, seen=seen: seen.append(v.detach()) or inner(v), x, start=x)
        assert attack.bad_gradients == 2 * 4  # two samples, four gradients
        last = seen[-1]
        assert last.isfinite().all()
        assert (last[0] > 0.5).all()
        assert (last[1] > 0.5).tolist() == [True, True, False, True]
        assert torch.equal(last[2:], x[2:])
        attack.approach(
            lambda v, seen=seen: seen.append(v.detach()) or (inner(v)[0] * math.nan, v[:, 0] < 0),
            x,
            start=x,
        )
        assert torch.equal(seen[-1], x)


def test_empty_batch_returns_empty(model, balanced):
    x, y = balanced
    assert FAB()(model, x[:0], y[:0]).shape == (0, 3, 8, 8)


def test_bad_arguments_name_themselves(model, balanced):
    x, y = balanced

    def fails(match, *args, error=ValueError, net=model):
        with pytest.raises(error, match=match):
            FAB(EPS, steps=1)(net, *args)

    for match, arguments in {
        "eps is 8, must be .*did you mean 8/255": {"eps": 8},
        "norm is 'l0', must be": {"norm": "l0"},
        "steps is 0, must be at least 1": {"steps": 0},
        "restarts is 0, must be at least 1": {"restarts": 0},
        "target_classes is 0, must be at least 1": {"target_classes": 0},
    }.items():
        with pytest.raises(ValueError, match=match):
            FAB(**arguments)
    fails(r"x is in \[", x + 2, y)
    fails("x is torch.uint8, must be torch.float32", (x * 255).byte(), y, error=TypeError)
    fails("y has labels from", x, y + 10)
    fails("y is torch.float32", x, y.float())
    one = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    fails(r"logits has shape \(6, 1\), must be .* C >= 2", x, y * 0, net=one)
    fails("model returned probabilities", x, y, net=nn.Sequential(model, nn.Softmax(1)))
    fails("model returned shape", x, y, net=nn.Conv2d(3, 10, 1))
