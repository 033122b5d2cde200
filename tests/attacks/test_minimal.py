"""Attacks that look for the nearest adversarial point: DeepFool, CW, DDN and FMN."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from stand_ins import Calls, Holes, smooth
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastadv import freeze, models
from fastadv.attacks import CW, DDN, FMN, DeepFool
from fastadv.attacks.fab import to_hyperplane
from fastadv.attacks.fmn import project
from fastadv.attacks.minimal import ORDERS, distance
from fastadv.ops._reference import per_sample

FMN_NORMS = ("linf", "l2", "l1", "l0")
SHORT = {
    **{f"fmn {norm}": FMN(20, norm=norm) for norm in FMN_NORMS},
    "ddn": DDN(20),
    "deepfool linf": DeepFool(10),
    "deepfool l2": DeepFool(10, norm="l2"),
    "cw": CW(20, 2, 0.4, 10.0),
}
each = pytest.mark.parametrize("name", SHORT)


def linear(seed, corners):
    """(net, x, y) in float64: a linear classifier of two classes, and points in [0, 1]^9 that it
    classifies right, not too near to its boundary; most of their elements are at the walls if
    `corners`."""
    g = torch.Generator().manual_seed(seed)
    net = nn.Linear(9, 2, dtype=torch.float64).requires_grad_(False)
    net.weight.normal_(generator=g)
    x = torch.rand(60, 9, generator=g, dtype=torch.float64)
    x = (3 * x - 1).clamp(0, 1) if corners else 0.3 + 0.4 * x
    net.bias -= net(x).mean(0)
    margin = net(x).diff(dim=1)[:, 0]
    x = x[margin.abs() > 0.05 * net.weight.diff(dim=0).norm()]
    return net, x, net(x).argmax(1)


def nearest(net, x, y, norm):
    """[B]: the exact distances to the other class. In linf and l2 those of a projection that is
    tested with FAB; in l1 and l0 the elements of most effect change one after the other."""
    w = net.weight[1 - y] - net.weight[y]
    value = (w * x).sum(1) + net.bias[1 - y] - net.bias[y]
    if norm in ("linf", "l2"):
        return distance(to_hyperplane(x, w, value, norm, 0.0, 1.0), norm)
    room = torch.where(w > 0, 1 - x, x)
    order = (w.abs() * (room if norm == "l0" else 1)).argsort(1, descending=True)
    room, w = room.gather(1, order), w.abs().gather(1, order)
    gain = room * w
    share = ((-value[:, None] - (gain.cumsum(1) - gain)) / gain).nan_to_num(0).clamp(0, 1)
    return (share > 0).sum(1).double() if norm == "l0" else (share * room).sum(1)


LONG = {
    **{f"fmn {norm}": (FMN(norm=norm), 1.01) for norm in FMN_NORMS},
    "ddn": (DDN(), 1.04),
    "cw": (CW(100, 7, 0.04, 0.1), 1.04),
    "deepfool linf": (DeepFool(), 1.03),
    "deepfool l2": (DeepFool(norm="l2"), 1.03),
}


@pytest.mark.parametrize("name", LONG)
def test_of_linear_classifiers_the_nearest_point_is_found(name):
    (net, x, y), (attack, factor) = linear(0, corners=False), LONG[name]
    x_adv = attack(net, x, y)
    least, found = nearest(net, x, y, attack.norm), distance(x_adv - x, attack.norm)
    if attack.norm in ("linf", "l2"):  # no wall is near: the margin over the dual norm
        w = net.weight.diff(dim=0)[0]
        dual = w.norm(p=1 if attack.norm == "linf" else 2)
        torch.testing.assert_close(net(x).diff(dim=1)[:, 0].abs() / dual, least)
    assert len(x) > 20
    assert (net(x_adv).argmax(1) != y).all()
    assert (found >= least * (1 - 1e-9)).all()
    assert (found <= least * factor + 2e-4).all()


@pytest.mark.parametrize("name", [n for n in LONG if not n.startswith(("deepfool", "cw"))])
def test_the_walls_of_the_box_are_no_obstacle(name):
    """Nor do they make x_adv leave it."""
    (net, x, y), attack = linear(1, corners=True), LONG[name][0]
    assert ((x == 0) | (x == 1)).double().mean() > 0.6
    x_adv = attack(net, x, y)
    least, found = nearest(net, x, y, attack.norm), distance(x_adv - x, attack.norm)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (net(x_adv).argmax(1) != y).all()
    assert (found >= least * (1 - 1e-9)).all()
    assert (found <= least * 1.06).all()


def test_cw_leaves_the_walls_when_it_has_the_steps():
    """At a wall w is 7.25, from where each of Adam's steps is step_size."""
    net, x, y = linear(1, corners=True)
    x_adv = CW(120, 3, 0.2, 1.0)(net, x, y)
    assert (net(x_adv).argmax(1) != y).all()
    found = distance(x_adv - x, "l2") / nearest(net, x, y, "l2")
    assert found.median() < 1.25
    assert found.max() < 1.6


def test_cw_takes_the_steps_of_torchs_adam_on_its_objective():
    net = smooth()
    x = torch.rand(8, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    y, rows, calls = net(x).argmax(1), torch.arange(8), Calls(net)
    CW(12, 1, 0.1, 0.5)(calls, x, y)
    w = ((2 * x - 1) * (1 - 1e-6)).atanh().requires_grad_()
    adam = torch.optim.Adam([w], lr=0.1)
    for seen in calls.inputs[1:]:
        x_adv = (w.tanh() + 1) / 2
        torch.testing.assert_close(seen, x_adv, rtol=0, atol=1e-9)
        z = net(x_adv)
        ahead = z[rows, y] - z.scatter(1, y[:, None], -math.inf).amax(1)
        loss = (x_adv - x).square().sum() + 0.5 * ahead.clamp(min=0).sum()
        adam.zero_grad()
        loss.backward(inputs=[w])
        adam.step()
    assert len(calls.inputs) == 13


def test_cw_searches_the_constant_of_each_sample(monkeypatch):
    """Tenfold until an adversarial point is found, then by halving."""
    tried, falls_at = [], torch.tensor([0.3, 5e-3, 1e9])

    def minimise(self, model, x, y, c):
        tried.append(c)
        broken = c >= falls_at
        return x + per_sample(c, x) * 1e-3, torch.where(broken, c.double(), math.inf)

    monkeypatch.setattr(CW, "_minimise", minimise)
    x = torch.full((3, 2), 0.5, dtype=torch.float64)
    steady = nn.Linear(2, 2, dtype=torch.float64)
    x_adv = CW(1, 6, constant=0.01)(steady, x, steady(x).argmax(1))
    found = torch.stack(tried, 1)
    expected = [
        [0.01, 0.1, 1.0, 0.55, 0.325, 0.2125],
        [0.01, 0.005, 0.0025, 0.00375, 0.004375, 0.0046875],
        [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0],
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    nearest = x + 1e-3 * torch.tensor([[0.325], [0.005], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(x_adv, nearest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", FMN_NORMS)
def test_the_projection_is_the_nearest_point_of_the_ball(norm, dtype):
    g = torch.Generator().manual_seed(0)
    delta = torch.randn(20, 2, 3, 4, generator=g).to(dtype)
    delta[0] = 0
    eps = (3 * torch.rand(20, generator=g)).double() * (3 if norm == "l0" else 1)
    eps = eps.ceil() if norm == "l0" else eps
    eps[1] = 1000
    projected = project(delta, eps, norm)
    assert (distance(projected, norm) <= eps * (1 + 1e-6)).all()
    assert torch.equal(projected[:2], delta[:2])
    assert not torch.equal(projected[2:], delta[2:])
    apart = (projected - delta).double().flatten(1).norm(dim=1)
    for scale in (1e-3, 0.1, 1.0):  # nothing else in the ball is nearer
        for _ in range(30):
            other = projected + scale * torch.randn(delta.shape, generator=g).to(dtype)
            if norm == "l0":
                other = delta * torch.rand(delta.shape, generator=g).argsort(3).eq(0)
            inside = distance(other, norm) <= eps
            other_apart = (other - delta).double().flatten(1).norm(dim=1)
            assert (apart <= other_apart + 1e-6)[inside].all()
    surface = distance(projected, norm)[2:]
    torch.testing.assert_close(
        surface, torch.minimum(eps, distance(delta, norm))[2:], rtol=1e-6, atol=0
    )


def test_of_equal_elements_the_first_stay():
    delta = torch.tensor([[1.0, -2.0, 2.0, 2.0, 0.0]])
    kept = [project(delta, torch.tensor([k]), "l0").tolist()[0] for k in (1.0, 2.0, 4.0)]
    assert kept == [[0, -2, 0, 0, 0], [0, -2, 2, 0, 0], [1, -2, 2, 2, 0]]


class RowByRow(nn.Module):
    """A classifier of 8 features, each of whose rows is computed alike in any batch."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(16, 8, generator=g, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(5, 16, generator=g, dtype=torch.float64))

    def forward(self, v):
        hidden = (v[:, None] * self.a).sum(2)
        return ((hidden * hidden)[:, None] * self.b).sum(2)


@pytest.fixture
def rows():
    net = RowByRow()
    x = torch.rand(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (2 * x - 0.5).clamp(0, 1)
    with torch.no_grad():
        y = net(x).argmax(1)
    y[3] = (y[3] + 1) % 5  # wrong from the beginning
    return net, x, y


@each
def test_samples_do_not_depend_on_their_batch(rows, name):
    net, x, y = rows
    whole = SHORT[name](net, x, y)
    assert torch.equal(whole[3], x[3])
    assert (whole != x).any(1).sum() >= 8
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    again = SHORT[name](net, x[order], y[order], index=order)
    torch.testing.assert_close(again, whole[order], rtol=0, atol=1e-9)
    for i in (0, 7):
        alone = SHORT[name](net, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-9)


@each
def test_what_is_found_is_adversarial_in_the_box_and_else_x(rows, name):
    net, x, y = rows
    attack = SHORT[name]
    for dtype in (torch.float64, torch.float32):
        x_adv = attack(net.to(dtype), x.to(dtype), y)
        assert x_adv.dtype == dtype
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        moved = (x_adv != x.to(dtype)).any(1)
        assert torch.equal(net(x_adv).argmax(1) != y, moved | (torch.arange(12) == 3))
        steady = nn.Linear(8, 5, dtype=dtype)
        nn.init.zeros_(steady.weight), nn.init.ones_(steady.bias)
        nn.init.constant_(steady.bias[2:3], 3)
        assert torch.equal(attack(steady, x.to(dtype), y * 0 + 2), x.to(dtype))
        assert attack.bad_gradients == 0
        nn.init.ones_(steady.bias)  # on the boundary, without a gradient: 0 / 0
        calls = Calls(steady)
        assert torch.equal(attack(calls, x.to(dtype), y * 0), x.to(dtype))
        assert all(v.isfinite().all() for v in calls.inputs)


@each
def test_another_box_changes_nothing(rows, name):
    net, x, y = rows

    class Rescaled(nn.Module):
        def forward(self, v):
            return net((v + 1) / 4)

    attack = SHORT[name]
    fields = {f: getattr(attack, f) for f in attack.__dataclass_fields__ if f != "bad_gradients"}
    wide = type(attack)(**fields | {"lo": -1.0, "hi": 3.0})
    expected = attack(net, x, y)
    torch.testing.assert_close(wide(Rescaled(), 4 * x - 1, y), 4 * expected - 1, rtol=0, atol=1e-3)


class Holed(nn.Module):
    """Two classes: the second wins where the sum is above 2.4. Its gradient is ours to choose."""

    def __init__(self, holes):
        super().__init__()
        self.holes = holes

    def forward(self, v):
        total = Holes.apply(v, self.holes)
        return torch.stack((4.8 - total, total), 1)


@each
def test_what_is_not_finite_does_not_move_and_is_counted(name):
    x, y = torch.full((4, 4), 0.5), torch.zeros(4, dtype=torch.int64)
    holes = torch.ones(4, 4)
    holes[1, 2], holes[2], holes[3] = math.nan, math.inf, 0.0

    class Chosen(Holed):
        def forward(self, v):
            self.holes = holes[-len(v) :] if len(v) < 4 else holes  # what is found is left out
            return super().forward(v)

    attack = SHORT[name]
    x_adv = attack(Chosen(holes), x, y)
    assert (x_adv[:2] != x[:2]).any(1).all()
    assert x_adv[1, 2] == 0.5 or name == "cw"  # whose points are not x's own
    assert (x_adv[1, 2] - 0.5).abs() < 1e-6
    assert torch.equal(x_adv[2:], x[2:])
    assert x_adv.isfinite().all()
    if name.startswith(("fmn", "ddn")):
        assert attack.bad_gradients == 2 * attack.steps
    else:
        assert attack.bad_gradients > 2
    attack(Holed(torch.ones(4, 4)), x, y)
    assert attack.bad_gradients == 0  # of the last call alone


def test_deepfool_ends_at_the_first_adversarial_iterate():
    """A sample is asked of again until its block of three steps ends, and then no more."""
    w = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    sizes = []

    class Slow(nn.Module):
        """The first row falls in one step; of the second the gradient is five times too large."""

        def forward(self, v):
            sizes.append(len(v))
            slow = v[:, 1:] > 0.5
            steep = torch.where(slow, 5.0, 1.0) * (v[:, :1] - 0.9)
            return (steep + (0.8 * steep).neg().detach() * slow + 0.2 * slow * 0) @ w[:, :1].T

    x = torch.tensor([[0.95, 0.0], [0.95, 1.0]], dtype=torch.float64)
    calls = Calls(Slow())
    x_adv = DeepFool(20, norm="l2")(calls, x, torch.zeros(2, dtype=torch.int64))
    assert sizes[:7] == [2] * 7  # at x, then a gradient and a look in each of three steps
    assert sizes[7:] == [1] * len(sizes[7:])
    assert torch.equal(calls.inputs[2][0], x_adv[0])
    assert x_adv[0, 0].item() == pytest.approx(0.95 - 1.02 * (0.05 + 1e-4))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_goes_to_the_nearest_hyperplane(norm):
    """Of three, and only `target_classes` of them are looked at."""
    net = smooth()
    x = torch.rand(10, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = 0.3 + 0.4 * x
    logits, y = net(x), net(x).argmax(1)
    for count in (1, 2, 4):
        calls = Calls(net)
        DeepFool(1, count, norm=norm)(calls, x, y)
        for i in range(10):
            best = None
            for c in logits[i].argsort(descending=True)[1 : count + 1]:
                v = x[i].clone().requires_grad_()
                out = net(v)
                (w,) = torch.autograd.grad(out[c] - out[y[i]], v)
                away = (out[y[i]] - out[c]).detach() / w.norm(p=1 if norm == "linf" else 2)
                way = w.sign() if norm == "linf" else w / w.norm()
                if best is None or away < best[0]:
                    best = away, x[i] + 1.02 * (away + 1e-4) * way
            expected = best[1].clamp(0, 1)
            torch.testing.assert_close(calls.inputs[2][i], expected, rtol=0, atol=1e-9)


def test_ddn_goes_round_x_on_spheres_that_follow_the_verdicts():
    net = smooth()
    x = 0.4 + 0.2 * torch.rand(10, 8, generator=torch.Generator().manual_seed(4)).double()
    y = net(x).argmax(1)
    calls = Calls(net)
    x_adv = DDN(40)(calls, x, y)
    iterates = torch.stack(calls.inputs[1:])
    assert iterates.shape == (41, 10, 8)
    eps = torch.ones(10, dtype=torch.float64)
    free = torch.ones(10, dtype=torch.bool)
    for before, after in itertools.pairwise(iterates):
        eps = torch.where(net(before).argmax(1) != y, 0.95, 1.05) * eps
        inside = ((after > 0) & (after < 1)).all(1)
        free &= eps < distance(torch.maximum(x, 1 - x), "l2")
        torch.testing.assert_close(distance(after - x, "l2")[inside & free], eps[inside & free])
    assert inside.sum() > 5
    wrong = torch.stack([net(v).argmax(1) != y for v in iterates])
    lengths = torch.stack([distance(v - x, "l2") for v in iterates])
    least = torch.where(wrong, lengths, math.inf).amin(0)
    assert torch.equal(distance(x_adv - x, "l2"), torch.where(least.isfinite(), least, 0.0))


def iterates_of_fmn(net, x, y, norm, steps):
    """Pintor et al. 2021, algorithm 1, for one sample in [0, 1], with our differences."""
    order = ORDERS[norm]
    v, eps, least, seen = x.clone(), float(norm == "l0"), math.inf, []
    for k in range(steps):
        seen.append(v.clone())
        leaf = v.clone().requires_grad_()
        z = net(leaf)
        margin = z[torch.arange(5) != y].max() - z[y]
        (g,) = torch.autograd.grad(margin, leaf)
        g = torch.where(((v <= 0) & (g < 0)) | ((v >= 1) & (g > 0)), 0.0, g)
        away = float((v - x).norm(p=order))
        half = (1 + math.cos(math.pi * k / steps)) / 2
        gamma, alpha = 0.001 + 0.049 * half, 0.01 + 0.99 * half
        if margin > 0:
            least = min(least, away)
            shrunk = math.floor(eps * (1 - gamma)) if norm == "l0" else eps * (1 - gamma)
            eps = min(shrunk, least)
            eps = max(eps, 1) if norm == "l0" else eps
        elif norm == "l0":
            eps = max(eps + 1, math.floor(eps * (1 + gamma)))
        else:
            dual = {"linf": 1, "l2": 2, "l1": math.inf}[norm]
            eps *= 1 + gamma
            if least == math.inf:
                eps = max(eps, away + float(-margin / g.norm(p=dual)))
        eps = min(eps, float(torch.maximum(x, 1 - x).norm(p=order)))
        delta = v - x + alpha * g / g.norm()
        if norm == "linf":
            delta = delta.clamp(-eps, eps)
        elif norm == "l2":
            delta = delta * min(1, eps / float(delta.norm()))
        elif norm == "l0":
            delta[delta.abs().argsort()[: len(x) - int(eps)]] = 0
        elif delta.norm(p=1) > eps:
            low, high = 0.0, float(delta.abs().max())
            for _ in range(60):
                cut = (low + high) / 2
                over = (delta.abs() - cut).clamp(min=0).sum() > eps
                low, high = (cut, high) if over else (low, cut)
            delta = delta.sign() * (delta.abs() - high).clamp(min=0)
        v = (x + delta).clamp(0, 1)
    return torch.stack([*seen, v])


@pytest.mark.parametrize("norm", FMN_NORMS)
def test_every_iterate_of_fmn_is_that_of_algorithm_1(norm):
    net = smooth()
    x = torch.rand(8, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x = (1.5 * x - 0.25).clamp(0, 1)
    y = net(x).argmax(1)
    calls = Calls(net)
    x_adv = FMN(15, norm=norm)(calls, x, y)
    iterates = torch.stack(calls.inputs[1:])
    for i in range(8):
        expected = iterates_of_fmn(net, x[i], y[i], norm, 15)
        torch.testing.assert_close(iterates[:, i], expected, rtol=0, atol=1e-7)
        wrong = net(expected).argmax(1) != y[i]
        least = distance(expected - x[i], norm)[wrong].min() if wrong.any() else torch.tensor(0.0)
        torch.testing.assert_close(distance(x_adv - x, norm)[i], least.double())
    assert (x_adv != x).any(1).sum() > 5


@pytest.mark.parametrize("attack", [FMN(2, norm=norm) for norm in FMN_NORMS] + [DDN(2)], ids=repr)
def test_steps_wait_for_nothing(attack):
    """Fake tensors have no values: whatever reads one raises."""
    net = models.get("digits_net", in_channels=1, width=4).eval()
    attack.bad_gradients = 0
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x, y = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
        assert attack._search(net, x, y).shape == (3, 1, 8, 8)


@each
def test_leaves_the_model_as_it_was(model, balanced, name):
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
    SHORT[name](calls, x, y)
    assert not any(training for training, _ in calls.modes)
    assert any(graph for _, graph in calls.modes)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    model.linear.forward = lambda v: 1 / 0
    with pytest.raises(ZeroDivisionError):
        SHORT[name](model, x, y)
    assert [m.training for m in model.modules()] == modes


@each
def test_frozen_twin_is_refreshed_and_inference_mode_changes_nothing(model, balanced, name):
    x, _ = balanced
    twin = freeze(model)
    with torch.no_grad():
        for p in model.parameters():
            p.data = p * 1.1
        y = model(x).argmax(1)
    results = []
    modes = torch.no_grad, torch.enable_grad, torch.inference_mode
    for net, mode in zip((twin, model, model), modes, strict=True):
        with mode():
            results.append(SHORT[name](net, x.clone(), y.clone()))
    assert (results[1] != x).any()
    lengths = [distance(x_adv - x, SHORT[name].norm) for x_adv in results]
    torch.testing.assert_close(lengths[0].median(), lengths[1].median(), rtol=0.05, atol=0)
    assert torch.equal(results[1], results[2])


def test_bad_arguments_name_themselves():
    for kind, options, match in (
        (FMN, {"norm": "l3"}, "norm of FMN is 'l3', must be one of linf, l2, l1, l0"),
        (DDN, {"norm": "linf"}, "norm of DDN is 'linf', must be one of l2"),
        (CW, {"norm": "linf"}, "norm of CW is 'linf', must be one of l2"),
        (DeepFool, {"norm": "l1"}, "norm of DeepFool is 'l1', must be one of linf, l2"),
        (FMN, {"step_size": 0}, "step_size is 0.0, must be positive and finite"),
        (CW, {"step_size": math.inf}, "step_size is inf, must be positive and finite"),
        (CW, {"constant": -1}, "constant is -1.0, must be positive and finite"),
        (CW, {"searches": 0}, "searches is 0, must be at least 1"),
        (DeepFool, {"target_classes": 0}, "target_classes is 0, must be at least 1"),
        *((k, {"steps": 0}, "steps is 0, must be at least 1") for k in (FMN, DDN, CW, DeepFool)),
        *((k, {"hi": math.inf}, "hi is inf, must be finite") for k in (FMN, DDN, CW, DeepFool)),
        *((k, {"lo": 1.0}, "lo is 1.0, must be below hi") for k in (FMN, DDN, CW, DeepFool)),
    ):
        with pytest.raises(ValueError, match=match):
            kind(**options)
    for kind, name in (
        (FMN, "steps"),
        (CW, "searches"),
        (DeepFool, "target_classes"),
        (FMN, "step_size"),
        (CW, "constant"),
        (DDN, "lo"),
    ):
        with pytest.raises(TypeError, match=f"{name} is '3', must be a (whole )?number"):
            kind(**{name: "3"})
