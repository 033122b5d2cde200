"""The l1 norm: its projection, starts and steps, and each attack in its ball."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import Calls
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastadv import freeze, models
from fastadv.attacks import APGD, FAB, FGSM, PGD, Square, l1

ATTACKS = {
    "pgd": lambda eps: PGD(eps, eps / 4, 5, norm="l1"),
    "gaussian": lambda eps: PGD(eps, eps / 4, 5, "gaussian", norm="l1"),
    "restarts": lambda eps: PGD(eps, eps / 4, 3, norm="l1", restarts=2),
    "fgsm": lambda eps: FGSM(eps, "l1"),
    "apgd": lambda eps: APGD(eps, 10, norm="l1"),
    "apgd-t": lambda eps: APGD(eps, 5, 2, "targeted", 2, norm="l1"),
    "fab": lambda eps: FAB(eps, 6, 2, target_classes=2, norm="l1"),
    "fab untargeted": lambda eps: FAB(eps, 6, 2, target_classes=None, norm="l1"),
    "square": lambda eps: Square(eps, 30, norm="l1"),
}


def length(delta):
    return delta.double().abs().flatten(1).sum(1)


def bisected(v, x, eps, lo=0.0, hi=1.0):
    """The projection in float64, its threshold by bisection."""
    v, x, eps = v.double(), x.double(), torch.as_tensor(eps, dtype=torch.float64)
    d = v - x
    room = torch.where(d > 0, hi - x, x - lo)

    def changed(t):
        return torch.minimum((d.abs() - t[:, None]).clamp(min=0), room)

    low, high = torch.zeros(len(x)).double(), d.abs().amax(1)
    for _ in range(60):
        middle = (low + high) / 2
        far = changed(middle).sum(1) > eps
        low, high = torch.where(far, middle, low), torch.where(far, high, middle)
    t = torch.where(changed(torch.zeros_like(low)).sum(1) > eps, high, 0.0)
    return x + d.sign() * changed(t)


@given(
    size=st.sampled_from([1, 2, 7, 64, 500]),
    eps=st.sampled_from([0.0, 1e-3, 0.5, 3.0, 30.0, 1e4]),
    scale=st.sampled_from([1e-3, 0.3, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    per_sample=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=25)
def test_the_projection_is_the_nearest_point(size, eps, scale, dtype, per_sample, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(6, size, generator=g, dtype=dtype)
    x[:3] = x[:3].round(decimals=1)  # at walls too
    v = x + scale * torch.randn(6, size, generator=g, dtype=dtype)
    v[2] = x[2] + scale * torch.randn(size, generator=g, dtype=dtype).round()  # ties
    v[5] = x[5]
    radius = eps * torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0], dtype=dtype) if per_sample else eps
    z = l1.project(v, x, radius, 0.0, 1.0)
    assert z.dtype == dtype
    rounding = torch.finfo(dtype).eps
    close = {"rtol": 0, "atol": 2 * rounding + 1e-13}
    torch.testing.assert_close(z.double(), bisected(v, x, radius), **close)
    most = torch.as_tensor(radius, dtype=torch.float64) + size * rounding + 1e-12
    assert (length(z.double() - x) <= most).all()
    assert z.min() >= 0
    assert z.max() <= 1
    again = l1.project(z, x, radius, 0.0, 1.0)
    torch.testing.assert_close(again, z, **close)
    other = bisected(torch.rand(6, size, generator=g), x, radius)  # any other feasible point
    slack = ((v.double() - z) * (other - z)).sum(1)  # is no nearer: Kolmogorov's criterion
    assert (slack <= 1e-5 * (1 + length(v - x)) * size * (rounding / 1e-7)).all()


@given(size=st.sampled_from([3072, 150528]), eps=st.floats(1, 4000), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=10)
def test_many_roundings_do_not_leave_the_ball(size, eps, seed):
    g = torch.Generator().manual_seed(seed)
    x, v = torch.rand(2, 2, size, generator=g)
    z = l1.project(v, x, eps, 0.0, 1.0)
    assert (length(z.double() - x) <= eps * (1 + 1e-12)).all()


def test_a_box_may_be_another_one_and_without_walls():
    x, v = torch.zeros(1, 3), torch.tensor([[5.0, -4.0, 1.0]])
    assert torch.equal(l1.project(v, x, 3.0, -math.inf, math.inf), torch.tensor([[2.0, -1.0, 0.0]]))
    assert torch.equal(l1.project(v, x, 3.0, -0.5, 2.0), torch.tensor([[2.0, -0.5, 0.5]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_are_uniform_in_the_ball(dtype):
    x, index = torch.full((20000, 3), 0.5, dtype=dtype), torch.arange(50, 20050)
    delta = l1.random_start(x, 0.4, seed=1, index=index) - x
    assert delta.dtype == dtype
    share = length(delta) / 0.4
    assert share.max() <= 1 + 1e-6
    for radius in (0.3, 0.6, 0.9):  # the volume of a smaller ball; 4 standard deviations
        assert (share < radius).double().mean().item() == pytest.approx(radius**3, abs=0.015)
    first = (delta.abs() / length(delta)[:, None])[:, 0]  # Dirichlet(1, 1, 1): Beta(1, 2)
    assert (first < 0.5).double().mean().item() == pytest.approx(0.75, abs=0.015)
    octants = (delta > 0).long() @ torch.tensor([1, 2, 4])
    assert octants.bincount().min() > 2300
    some = l1.random_start(x[7:9], 0.4, seed=1, index=index[7:9]) - x[7:9]
    assert torch.equal(some, delta[7:9])
    for other in ({"seed": 2, "index": index}, {"seed": 1, "index": index, "restart": 1}):
        assert not torch.equal(l1.random_start(x, 0.4, **other) - x, delta)
    boxed = l1.random_start(x, 0.4, seed=1, index=index, lo=0.45, hi=0.5)
    assert torch.equal(boxed, (x + delta).clamp(0.45, 0.5))


def test_directions_have_the_largest_elements():
    grad = torch.tensor([[3.0, -5.0, 1.0, 0.0], [2.0, -2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    found = l1.direction(grad, torch.tensor([2, 1, 4]))
    third = 1 / 3
    expected = [[0.5, -0.5, 0, 0], [third, -third, third, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected))
    everything = l1.direction(grad, torch.tensor([0, 9, 9]))  # one at the least, all at most
    torch.testing.assert_close(everything[0], torch.tensor([0, -1.0, 0, 0]))
    torch.testing.assert_close(everything[1], grad[1].sign() / 4)


def test_a_pgd_step_follows_the_largest_percent():
    x = torch.full((2, 250), 0.5)
    grad = torch.linspace(0, 1, 250).repeat(2, 1)
    grad[1, 249], grad[0, 0] = math.nan, -3.0
    x_adv = x.clone()
    assert l1.pgd_step_(x_adv, grad, x, 0.3, 0.2, 0.0, 1.0) is x_adv
    delta = x_adv - x
    assert [row.nonzero()[:, 0].tolist() for row in delta] == [[0, 249], [247, 248]]
    torch.testing.assert_close(delta[0, [0, 249]], torch.tensor([-0.1, 0.1]))
    for _ in range(3):
        l1.pgd_step_(x_adv, grad, x, 0.3, 0.2, 0.0, 1.0)
    torch.testing.assert_close(length(x_adv - x), torch.full((2,), 0.3).double())


@pytest.mark.parametrize("name", ATTACKS)
def test_examples_are_in_the_ball_and_break_what_they_can(model, balanced, name):
    """In a batch what a sample gets by itself; nothing from an eps of 0."""
    (x, y), index = balanced, torch.arange(70, 76)
    for eps in (0.0, 40.0):
        torch.manual_seed(2)
        x_adv = ATTACKS[name](eps)(model, x, y, index=index)
        distance = length(x_adv - x)
        if name != "gaussian" or eps:
            assert (distance <= eps * (1 + 1e-6) + 1e-6).all()
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        torch.manual_seed(2)
        alone = ATTACKS[name](eps)(model, x[2:3], y[2:3], index=index[2:3])
        assert length(alone - x_adv[2:3]) <= 0.02 * eps + 1e-5
    with torch.no_grad():
        assert (model(x_adv).argmax(1) != y).sum() >= (3 if name != "square" else 1)


@pytest.mark.parametrize("name", ["pgd", "restarts", "apgd", "apgd-t"])
def test_a_radius_per_sample(model, balanced, name):
    (x, y), eps = balanced, torch.tensor([0.0, 0.2, 1.0, 3.0, 0.1, 9.0])
    make = {"apgd-t": 8.0}.get(name, 1.0)

    def attack(radius, rows):
        torch.manual_seed(3)
        made = ATTACKS[name](1.0)
        made.eps = radius
        return made(model, x[rows].double(), y[rows], index=torch.arange(6)[rows])

    model.double()
    together = attack(eps / make, slice(None))
    for i, one in enumerate((eps / make).tolist()):
        alone = attack(one, slice(i, i + 1))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-6)
    assert (length(together - x) <= eps / make + 1e-6).all()


def test_apgd_shrinks_its_ball_and_its_steps_as_the_paper_has_it():
    """Every iterate, followed from those before it: three balls, sparse steps, checkpoints."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    x = torch.rand(8, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y, eps, seen = net(x).argmax(1), 0.6, []

    def inner(v, y):
        logits = net(v)
        loss = nn.functional.cross_entropy(logits, y, reduction="none")
        leaf = v.detach().requires_grad_()
        grad = torch.autograd.grad(
            nn.functional.cross_entropy(net(leaf), y, reduction="sum"), leaf
        )[0]
        seen.append((v.detach().clone(), loss.detach(), grad, logits.argmax(1) != y))
        return loss, logits.argmax(1) != y

    start = x + torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    found = APGD(eps, 100, norm="l1").ascend_l1(inner, x, y, start=start)
    assert len(seen) == 31 + 31 + 41
    steps, anew = iter(seen), 0
    for i in range(len(x)):
        steps, end = iter(seen), start[i]
        for radius, count in ((3 * eps, 30), (2 * eps, 30), (eps, 40)):
            end = bisected(end[None], x[i : i + 1], radius)[0]
            here, loss, grad, _ = (part[i] for part in next(steps))
            torch.testing.assert_close(here, end, rtol=0, atol=1e-9)
            top, size, sparsity = (here, loss, grad), radius, int((here != x[i]).sum())
            for _ in range(count):
                kept = max(math.ceil(2 * sparsity / 3), 1)
                least = grad.abs().sort(descending=True).values[kept - 1]
                sign = torch.where(grad.abs() >= least, grad.sign(), 0.0)
                expected = bisected(
                    (here + size * sign / sign.abs().sum())[None], x[i : i + 1], radius
                )
                here, loss, grad, _ = (part[i] for part in next(steps))
                torch.testing.assert_close(here, expected[0], rtol=0, atol=1e-9)
                top = (here, loss, grad) if loss > top[1] else top
                before, sparsity = sparsity, int((top[0] != x[i]).sum())
                if sparsity < 0.95 * before:  # 4 % of 30 and of 40 steps: after each
                    size, (here, loss, grad) = radius, top
                    anew += 1
                else:
                    size = max(size / 1.5, radius / 10)
            end = top[0]
        last = [(bool(wrong[i]), float(loss[i]), v[i]) for v, loss, _, wrong in seen[-41:]]
        best = max(last, key=lambda visit: visit[:2])
        assert torch.equal(found[0][i], best[2])
        assert bool(found[2][i]) == best[0]
    assert anew > 10


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_any_number_of_steps_is_taken(model, balanced, steps):
    calls = Calls(model)
    x_adv = APGD(0.05, steps, norm="l1")(calls, *balanced)
    assert len(calls.inputs) == 1 + steps + 3
    assert (length(x_adv - balanced[0]) > 0.01).all()


def test_ascend_waits_for_nothing():
    net = models.get("digits_net", in_channels=1, width=4).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, y = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)

        def inner(v):
            return net(v).sum(1), net(v).argmax(1) != y

        assert APGD(0.1, 7, norm="l1").ascend_l1(inner, x, start=x)[0].shape == x.shape
        assert PGD(0.1, 0.1, 2, norm="l1").ascend(lambda v: net(v).sum(1), x).shape == x.shape
        assert FAB(0.1, 2, norm="l1").approach(inner, x, start=x)[0].shape == x.shape


def test_bad_gradients_do_not_move_and_are_counted():
    x = torch.full((2, 4), 0.5)

    def inner(v):
        return (v * torch.tensor([[1.0, 2.0, 3.0, math.nan], [4.0, 3.0, 2.0, 1.0]])).sum(1), v[
            :, 0
        ] < 0

    attack = APGD(0.3, 10, norm="l1")
    x_adv = attack.ascend_l1(inner, x, start=x)[0]
    assert attack.bad_gradients == 13
    assert x_adv[0, 3] == 0.5
    assert x_adv.isfinite().all()


def test_a_twin_is_attacked_as_its_network(model, balanced):
    x, y = balanced
    for name in ("pgd", "apgd", "fab untargeted"):
        torch.manual_seed(1)
        expected = ATTACKS[name](2.0)(model, x, y)
        torch.manual_seed(1)
        assert length(ATTACKS[name](2.0)(freeze(model), x, y) - expected).mean() < 0.2


def test_pgd_begins_in_the_ball():
    x, index = torch.full((5, 3, 4, 4), 0.5), torch.arange(5) + 9
    attack = PGD(0.4, 0.1, 1, norm="l1")
    start = attack.start(x, index, seed=4)
    expected = l1.random_start(x, 0.4, seed=4, index=index, lo=0.0, hi=1.0)
    assert torch.equal(start, expected)
    assert (length(start - x) <= 0.4 + 1e-6).all()
    assert torch.equal(PGD(0.4, 0.1, 1, "zero", norm="l1").start(x), x)
    assert not torch.equal(PGD(0.4, 0.1, 1, "gaussian", norm="l1").start(x), x)
