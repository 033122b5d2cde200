import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from fastadv import freeze, models, ops
from fastadv.attacks import Square, l1, square

EPS = 8 / 255
NORMS = ("linf", "l2", "l1")
ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}


class Rows(nn.Module):
    """Float64 logits [B, 4] far from linear in [B, C, H, W]; a row has the same bits in any batch.
    Notes what it is asked, and in which mode."""

    def __init__(self, shape, wild=0.3):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        weight = torch.randn(4, math.prod(shape), generator=g, dtype=torch.float64)
        self.weight = wild * weight  # no parameter or buffer, whose dtype images would take
        self.inputs, self.modes = [], []

    def forward(self, x):
        self.inputs.append(x.clone())
        self.modes.append((self.training, torch.is_grad_enabled()))
        rows = [(self.weight * (v.double().flatten() - 0.5)).sum(1).sin() for v in x]
        return torch.stack(rows) if rows else x.new_zeros(0, 4)


def images(count, shape, seed=4):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def eta(h, turned, norm):
    """The paper's equation 2 pixel by pixel, the halves of equal norm; l1 falls off faster."""
    power, order = {"l2": (2, 2), "l1": (4, 1)}[norm]

    def bump(h1, h2):
        n = max(h1, h2) // 2
        values = torch.zeros(h1, h2, dtype=torch.float64)
        for r in range(1, h1 + 1):
            for s in range(1, h2 + 1):
                m = n - max(abs(r - h1 // 2 - 1), abs(s - h2 // 2 - 1))
                values[r - 1, s - 1] = sum(1 / (n + 1 - k) ** power for k in range(m + 1))
        return values / values.norm(order)

    k = h // 2
    whole = torch.cat([bump(k, h), -bump(h - k, h)])
    return (whole.T if turned else whole) / whole.norm(order)


def start_of_one(x, eps, norm, u):
    """The paper's initialisation from the numbers u; those of tiles go row by row."""
    c, h, w = x.shape
    delta = torch.zeros_like(x)
    if norm == "linf":
        for i in range(c):
            for column in range(w):
                delta[i, :, column] = eps if u[i * w + column] >= 0.5 else -eps
        return (x + delta).clamp(0, 1)
    side = min(h, w) // 5
    top, left = (h - 5 * side) // 2, (w - 5 * side) // 2
    for tile in range(25):
        r, s = top + tile // 5 * side, left + tile % 5 * side
        for i in range(c):
            sign = 1 if u[25 + 25 * i + tile] >= 0.5 else -1
            delta[i, r : r + side, s : s + side] = sign * eta(side, u[tile] >= 0.5, norm)
    if norm == "l1":
        return l1.project((x + delta)[None], x[None], eps, 0, 1)[0]
    return (x + eps * delta / delta.norm()).clamp(0, 1)


def window_of_one(x_adv, x, eps, norm, h, u):
    """Algorithms 2 and 3: the next query from the numbers u."""
    c, height, width = x.shape
    rows, columns = max(height - h, 1), max(width - h, 1)  # the paper has one more of each
    r, s = int(u[0] * rows), int(u[1] * columns)
    if norm == "linf":
        delta = torch.zeros_like(x)
        for i in range(c):
            delta[i, r : r + h, s : s + h] = 2 * eps if u[2 + i] >= 0.5 else -2 * eps
        moved = torch.maximum(torch.minimum(x_adv + delta, x + eps), x - eps)
        return moved.clamp(0, 1)
    r2, s2 = int(u[2] * rows), int(u[3] * columns)
    nu = x_adv - x
    new = nu.clone()
    either = torch.zeros(height, width, dtype=torch.bool)
    either[r : r + h, s : s + h] = either[r2 : r2 + h, s2 : s2 + h] = True
    for i in range(c):
        rho = 1 if u[5 + i] >= 0.5 else -1
        inside = nu[i, r : r + h, s : s + h]
        temp, p = rho * eta(h, u[4] >= 0.5, norm), ORDERS[norm]
        if inside.norm() > 0:
            temp += inside / inside.norm(p)
        if norm == "l1":
            available = c * nu[i][either].norm(1) + max(eps - nu.norm(1), 0)
        else:
            available = (nu[i][either].norm() ** 2 + max(eps**2 - nu.norm() ** 2, 0) / c).sqrt()
        new[i, r2 : r2 + h, s2 : s2 + h] = 0
        new[i, r : r + h, s : s + h] = temp / temp.norm(p) * available
    if norm == "l1":
        return l1.project((x + new)[None], x[None], eps, 0, 1)[0]
    return (x + new * min(1, eps / new.norm())).clamp(0, 1)


def algorithm_1(net, x, y, eps, norm, queries, sides, uniforms):
    """Every point one sample asks about after x itself, and the one it ends at."""

    def ask(v):
        visited.append(v)
        logits = net(v[None])[0]
        other = torch.cat([logits[:y], logits[y + 1 :]]).max()
        return float(logits[y] - other), bool(logits[y] < other)

    visited, count = [], len(x) + (2 if norm == "linf" else 5)
    best = start_of_one(x, eps, norm, uniforms(0, 1000))
    loss, wrong = ask(best)
    for i in range(queries):
        if wrong:
            break
        u = uniforms(1 + i // 16, 16 * count)[i % 16 * count :]
        new = window_of_one(best, x, eps, norm, sides[i], u)
        new_loss, wrong = ask(new)
        if new_loss < loss or wrong:
            best, loss = new, new_loss
    return visited, best


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3, 12, 11), (1, 5, 7)])
def test_every_query_is_that_of_the_paper(norm, shape):
    eps, queries, lengths = {"linf": 0.02, "l2": 0.2, "l1": 0.8}[norm], 70, []
    x = images(6, shape).double()
    net = Rows(shape)
    y = net(x).argmax(1)
    attack = Square(eps, queries=queries, norm=norm)
    for i in range(len(x)):
        net.inputs.clear()
        torch.manual_seed(i)
        x_adv = attack(net, x[i : i + 1], y[i : i + 1], index=torch.tensor([100 + i]))[0]
        asked = torch.cat(net.inputs[1:])
        torch.manual_seed(i)
        seed = torch.randint(2**63 - 1, (), device="cpu")

        def uniforms(step, count, seed=seed, i=i):
            middle, index = torch.full((1, count), 0.5), torch.tensor([100 + i])
            return ops.random_start(middle, 0.5, seed=seed, index=index, step=step)[0]

        with torch.no_grad():
            expected, best = algorithm_1(
                net, x[i], int(y[i]), eps, norm, queries, attack._sides(*shape[1:]), uniforms
            )
        assert len(asked) >= len(expected)
        torch.testing.assert_close(asked[: len(expected)], torch.stack(expected))
        torch.testing.assert_close(x_adv, best)
        lengths.append(len(expected))
    assert max(lengths) == 1 + queries
    assert any(1 < length < queries for length in lengths)


@pytest.mark.parametrize("queries", [1000, 5000, 10000])
def test_sides_follow_the_schedule(queries):
    """CIFAR's shape: p is halved after 10, 50, ... of 10000."""
    marks = 0, 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000
    for norm, expected in (
        ("linf", [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]),
        ("l2", [29, 21, 15, 11, 7, 5, 5, 3, 3, 3]),
    ):
        sides = Square(norm=norm, queries=queries)._sides(32, 32)
        assert len(sides) == queries
        for i in range(queries):
            assert sides[i] == expected[sum(i > mark for mark in marks[1:])]
    assert set(Square(norm="l2", queries=20)._sides(4, 2)) == {2}
    assert Square(p_init=0.01, queries=20)._sides(4, 4) == [1] * 20


@given(
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 1),
    shape=st.sampled_from([(1, 3, 4), (3, 6, 5), (2, 1, 1)]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_every_query_is_in_ball_and_box(norm, eps, shape, seed):
    x = images(1, shape, seed).round(decimals=1)  # corners of the box too
    net = Rows(shape)
    torch.manual_seed(seed)
    x_adv = Square(eps, queries=40, norm=norm)(net, x, net(x).argmax(1))
    visited = torch.cat([*net.inputs, x_adv])
    assert visited.dtype == torch.float32
    distance = (visited - x).double().flatten(1).norm(ORDERS[norm], dim=1)
    assert distance.max() <= eps * (1 + 1e-6) + (1e-6 if norm == "l1" else 6e-8)
    assert visited.min() >= 0
    assert visited.max() <= 1


def test_l2_spends_the_whole_budget():
    x = 0.5 * torch.ones(4, 3, 10, 10)
    net = Rows((3, 10, 10))
    Square(0.3, queries=40, norm="l2")(net, x, net(x).argmax(1))
    for v in net.inputs[2:]:
        torch.testing.assert_close((v - 0.5).flatten(1).norm(dim=1), torch.full((len(v),), 0.3))


@pytest.mark.parametrize("norm", NORMS)
def test_samples_do_not_depend_on_their_batch(norm):
    shape, eps = (3, 8, 8), {"linf": 0.03, "l2": 0.3, "l1": 2.5}[norm]
    x, net = images(12, shape), Rows((3, 8, 8))
    y, index = net(x).argmax(1), torch.arange(100, 112)
    y[3] = (y[3] + 1) % 4
    attack = Square(eps, queries=90, restarts=2, norm=norm)
    net.inputs.clear()
    torch.manual_seed(5)
    together = attack(net, x, y, index=index)
    sizes = {len(v) for v in net.inputs}
    assert len(sizes) > 3  # samples left on several occasions, and not all of them
    assert (net(together).argmax(1) == y).any()
    for rows in (torch.arange(12).flip(0), torch.arange(0, 12, 2), *torch.arange(12).split(1)):
        torch.manual_seed(5)
        assert torch.equal(attack(net, x[rows], y[rows], index=index[rows]), together[rows])
    torch.manual_seed(5)
    assert not torch.equal(attack(net, x, y), together)  # other ids, other draws


@pytest.mark.parametrize("norm", NORMS)
def test_keeps_the_wrong_point_else_the_one_of_highest_margin(norm):
    """Of the margins of a function that has no order, over three restarts."""
    shape, fell = (1, 6, 6), 0
    net = Rows(shape, wild=1e5)
    net.forward = lambda v: spiky(Rows.forward(net, v))

    def spiky(logits):
        """Class 0 is the largest but for one point in a hundred or so."""
        return logits + torch.tensor([1.9, 0, -9, -9])

    for i, x in enumerate(images(12, shape).split(1)):
        y = torch.zeros(1, dtype=torch.int64)
        net.inputs.clear()
        torch.manual_seed(i)
        x_adv = Square(0.1, queries=20, restarts=3, norm=norm)(net, x, y)
        asked, margins = torch.cat(net.inputs), []
        for logits in net(asked).detach():
            margins.append(float(logits[1:].max() - logits[0]))
        fallen = [k for k, margin in enumerate(margins) if margin > 0]
        fell += bool(fallen)
        best = fallen[0] if fallen else max(range(len(margins)), key=lambda k: margins[k])
        assert torch.equal(x_adv[0], asked[best])
        assert len(asked) <= 1 + 3 * 21
    assert 0 < fell < 12


def test_a_tie_that_breaks_is_taken():
    class Ties(nn.Module):
        """Class 1 level with class 2 at x and at the start, which is right, then with class 0."""

        def forward(self, v):
            asked.append(v)
            later = float(len(asked) > 2)
            return torch.tensor([[later, 1.0, 1 - later, -1.0]]).expand(len(v), 4)

    asked, x = [], images(2, (1, 6, 6))
    x_adv = Square(EPS, queries=3)(Ties(), x, torch.ones(2, dtype=torch.int64))
    assert torch.equal(x_adv, asked[2])


def test_restarts_start_apart_on_robust_samples_alone():
    x, y = images(4, (3, 8, 8)), torch.tensor([0, 1, 0, 0])

    class Falls(nn.Module):
        """Class 0 for all, but sample 2 and 3, alone above 0.5 in the first pixel, fall in the
        second restart: calls 1 to 18 are x, its start and 16 windows."""

        def forward(self, v):
            asked.append(v)
            falls = (v[:, 0, 0, 0] > 0.5) & (len(asked) > 18)
            return torch.stack([0.5 - falls.float(), v.mean((1, 2, 3)) - 0.7], 1)

    asked, x[:2, 0, 0, 0], x[2:, 0, 0, 0] = [], 0.2, 0.8
    x_adv = Square(EPS, queries=16, restarts=3)(Falls(), x, y)
    assert [len(v) for v in asked] == [4] + [3] * 17 + [3] + [1] * 16 + [1] * 17
    assert torch.equal(x_adv[1], x[1])
    assert torch.equal(x_adv[2:], asked[18][1:])
    for one, other in ((1, 18), (18, 35), (1, 35)):
        assert (asked[one][0] - asked[other][0]).abs().max() > EPS


def test_stops_when_nothing_is_robust(model, batch):
    x, y = batch
    calls = []
    model.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
    assert torch.equal(Square(EPS)(model, x, (y + 1) % 10), x)
    assert calls == [6]
    net = Rows((3, 8, 8), wild=100)
    x_adv = Square(0.6, restarts=5)(net, x, net(x).argmax(1))
    assert (net(x_adv).argmax(1) != net(x).argmax(1)).all()
    assert len(net.inputs) < 200


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
def test_a_block_waits_for_nothing(norm, targeted):
    """Fake tensors have no values: whatever reads one, or depends on how many there are, raises."""
    net = models.get("digits_net", in_channels=1, width=4).eval()
    attack = Square(0.1, norm=norm)

    def run(net):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            x, y = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
            found = x.clone(), x[:, 0, 0, 0], y > 0
            u = torch.rand(3, 4, 3 if norm == "linf" else 6)
            windows = attack._windows(x, u, [3] * 4, {3: torch.rand(2, 4, 4)})
            query = functools.partial(square._query, net, targeted)
            return attack._block(query, x, y, found, windows)

    x_adv, loss, wrong = run(net)
    assert (x_adv.shape, loss.shape, wrong.dtype) == ((3, 1, 8, 8), (3,), torch.bool)
    with pytest.raises(DynamicOutputShapeException):
        run(lambda v: net(v[v[:, 0, 0, 0] > 0]))


def test_is_a_black_box_and_leaves_the_model_as_it_was(model, batch):
    x, y = batch
    net = Rows((3, 8, 8))
    Square(EPS, queries=20)(net, x.requires_grad_(), net(x).argmax(1))
    assert set(net.modes[1:]) == {(False, False)}
    model.train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    Square(EPS / 8, queries=2)(model, x, y)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert all(p.grad is None for p in (x, *model.parameters()))
    model.linear.forward = lambda v: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Square(EPS)(model, x, y)
    assert [m.training for m in model.modules()] == modes


def test_frozen_twin_is_refreshed_and_inference_mode_changes_nothing(model, batch):
    x, y = batch
    twin = freeze(model)
    with torch.no_grad():
        for p in model.parameters():
            p.data = p * 1.1
    attack, results = Square(EPS / 8, queries=4), []
    modes = torch.no_grad, torch.enable_grad, torch.inference_mode
    for net, mode in zip((twin, model, model), modes, strict=True):
        torch.manual_seed(6)
        with mode():
            results.append(attack(net, x.clone(), y.clone()))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not results[2].is_inference()  # so that training may use it


def test_empty_batch_returns_empty(model, batch):
    x, y = batch
    assert Square()(model, x[:0], y[:0]).shape == (0, 3, 8, 8)


def test_bad_arguments_name_themselves(model, batch):
    x, y = batch

    def fails(match, *args, error=ValueError, net=model):
        with pytest.raises(error, match=match):
            Square(EPS, queries=1)(net, *args)

    for match, arguments in {
        "eps is 8, must be .*did you mean 8/255": {"eps": 8},
        "norm is 'l0', must be": {"norm": "l0"},
        "queries is 0, must be at least 1": {"queries": 0},
        "restarts is 0, must be at least 1": {"restarts": 0},
        "p_init is 0, must be in": {"p_init": 0},
        "p_init is 1.5, must be in": {"p_init": 1.5},
    }.items():
        with pytest.raises(ValueError, match=match):
            Square(**arguments)
    fails(r"x has shape \(6, 192\), must be \[B, C, H, W\]", x.flatten(1), y)
    fails(r"x is in \[", x + 2, y)
    fails("x is torch.uint8, must be torch.float32", (x * 255).byte(), y, error=TypeError)
    fails("y has labels from", x, y + 10)
    fails("y is torch.float32", x, y.float())
    fails("model returned probabilities", x, y, net=nn.Sequential(model, nn.Softmax(1)))
    fails("model returned shape", x, y, net=nn.Conv2d(3, 10, 1))
