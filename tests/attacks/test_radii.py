"""A radius per sample in PGD and APGD: each sample's attack is the one with its own eps."""

import math
import warnings

import pytest
import torch

from fastadv import attacks, methods
from fastadv.attacks import APGD, FAB, FGSM, PGD, Square, suite

EPS = torch.tensor([0.0, 0.01, 0.05, 0.1, 0.2, 0.03])
INDEX = torch.arange(40, 46)


def pgd(eps, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # steps beyond the smaller balls
        return PGD(eps, 0.03, 4, **options)


def length(delta, norm):
    return delta.double().flatten(1).norm(math.inf if norm == "linf" else 2, dim=1)


def run(attack, model, x, y, rows=slice(None), **options):
    torch.manual_seed(3)
    return attack(model, x[rows], y[rows], index=INDEX[rows], **options)


KINDS = {
    "pgd": pgd,
    "zero": lambda eps, **o: pgd(eps, init="zero", **o),
    "gaussian": lambda eps, **o: pgd(eps, init="gaussian", **o),
    "restarts": lambda eps, **o: pgd(eps, restarts=3, **o),
    "best": lambda eps, **o: pgd(eps, keep="best", **o),
    "apgd": lambda eps, **o: APGD(eps, 6, **o),
    "apgd restarts": lambda eps, **o: APGD(eps / 8, 4, 3, **o),
    "apgd-t": lambda eps, **o: APGD(eps / 8, 5, loss="targeted", target_classes=3, **o),
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_has_its_own_radius(model, balanced, kind, norm):
    """In one batch what each gets by itself from the same attack with one number; in float64,
    where rounding decides nothing."""
    model.double()
    (x, y), eps = (balanced[0].double(), balanced[1]), EPS.double() * (1 if norm == "linf" else 5)
    together = run(KINDS[kind](eps, norm=norm), model, x, y)
    for i, one in enumerate(eps.tolist()):
        alone = run(KINDS[kind](one, norm=norm), model, x, y, slice(i, i + 1))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-9)
    distance = length(together - x, norm)
    assert (distance <= eps * (1 + 1e-5) + 1e-7).all()
    assert torch.equal(together[0], x[0])
    assert (distance[1:] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_radii_are_one_radius(model, balanced, kind):
    x, y = balanced
    expected = run(KINDS[kind](0.06), model, x, y)
    for eps in (
        torch.full((6,), 0.06),
        torch.full((6, 1, 1, 1), 0.06),
        torch.full((6, 1), 0.06, dtype=torch.float64),
        torch.tensor(0.06),
        torch.full((12,), 0.06)[::2],
        torch.full((6,), 0.06, requires_grad=True),
    ):
        assert torch.equal(run(KINDS[kind](eps), model, x, y), expected)


def test_compaction_keeps_each_samples_radius(model, balanced):
    """Where a round leaves some out, the others go on in the balls that they had."""
    x, y = balanced
    y = y.clone()
    y[1], y[4] = (y[1] + 1) % 10, (y[4] + 1) % 10  # wrong from the beginning
    x_adv = run(APGD(EPS.clone(), 4, 3), model, x, y)
    distance = length(x_adv - x, "linf")
    assert torch.equal(x_adv[[1, 4]], x[[1, 4]])
    assert (distance <= EPS + 1e-6).all()
    assert (distance[[2, 3, 5]] > EPS[[2, 3, 5]] / 2).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_takes_each_samples_whole_radius(model, balanced, norm):
    x, y = balanced
    x_adv = FGSM(EPS, norm)(model, x, y)
    for i, eps in enumerate(EPS.tolist()):
        alone = FGSM(eps, norm)(model, x[i : i + 1], y[i : i + 1])[0]
        assert ((x_adv[i] - alone).abs() < 1e-6).float().mean() > 0.98


def test_first_steps_are_twice_the_radius():
    """Of APGD: 2 eps, cut at the ball, against a slope that says up."""
    x = torch.full((3, 4), 0.5)
    attack, seen = APGD(torch.tensor([0.1, 0.2, 0.0]), 1), []

    def inner(v):
        seen.append(v.detach().clone())
        return v.sum(1), v[:, 0] < 0

    attack.ascend(inner, x, start=x - torch.tensor([[0.1], [0.2], [0.0]]))
    torch.testing.assert_close(seen[1][:, 0], torch.tensor([0.6, 0.7, 0.5]))


def test_ascend_and_methods_take_a_radius_per_sample(model, balanced):
    x, y = balanced

    def inner(v):
        return v.flatten(1).sum(1)

    x_adv = pgd(EPS, init="zero").ascend(inner, x)
    torch.testing.assert_close(x_adv, (x + EPS.clamp(max=0.12)[:, None, None, None]).clamp(max=1))
    attack = pgd(0.1, init="zero")
    torch.testing.assert_close(attack.ascend(inner, x, eps=EPS), x_adv)
    method = methods.get("at", attack=pgd(EPS))
    found = method.perturb(methods.Nets(model), methods.Batch(x, y), {})
    distance = length(found - x, "linf")
    assert (distance <= EPS + 1e-6).all()
    assert (distance[1:] > EPS[1:] / 2).all()


@pytest.mark.parametrize("attack", [pgd, lambda eps: APGD(eps, 3)])
def test_a_radius_is_checked_when_it_is_given(model, balanced, attack):
    x, y = balanced
    for eps, error, match in (
        (
            torch.tensor([0.1, 8.0]),
            ValueError,
            r"eps is 8.0, must be .*did you mean 8",
        ),
        (torch.tensor([0.1, -0.25]), ValueError, r"eps is -0.25, must be in \[0, 1.0\]"),
        (torch.tensor([math.nan, 0.1]), ValueError, r"eps is nan, must be in \[0, 1.0\]"),
        (torch.rand(6, 3), ValueError, r"eps has shape \(6, 3\), must be \[B\] or \[B, 1, ...\]"),
        (torch.rand(1, 6), ValueError, r"eps has shape \(1, 6\), must be \[B\]"),
        (
            torch.rand(6) > 0.5,
            TypeError,
            r"eps is a tensor \[6\] of torch.bool, must be a real",
        ),
        ([0.1] * 6, TypeError, "eps is a list, must be a number"),
        ("8/255", TypeError, "eps is '8/255', must be a number"),
        (None, TypeError, "eps is None, must be a number"),
        (True, TypeError, "eps is True, must be a number"),
        (1j, TypeError, "eps is 1j, must be a number"),
    ):
        with pytest.raises(error, match=match):
            attack(eps)
    for eps in (EPS[:5], EPS[:1], torch.rand(12) / 10):
        with pytest.raises(ValueError, match=f"eps has {len(eps)} values, must have 6, one per im"):
            attack(eps)(model, x, y)
    assert attack(EPS[:0])(model, x[:0], y[:0]).shape == (0, 3, 8, 8)


def test_restarts_do_not_hide_a_wrong_number_of_radii(model, balanced):
    """Three starts of two images are six rows, but two radii they must be."""
    x, y = balanced
    with pytest.raises(ValueError, match="eps has 6 values, must have 2, one per image of x"):
        pgd(EPS, restarts=3)(model, x[:2], y[:2])


def test_a_radius_is_as_it_was_when_given():
    eps = EPS.clone()
    attack = APGD(eps)
    eps += 1
    assert torch.equal(attack.eps, EPS)


def test_attacks_with_radii_compare_by_value():
    assert pgd(EPS) == pgd(EPS.clone())
    assert pgd(EPS) != pgd(EPS + 0.1)
    assert pgd(EPS) != pgd(0.1)
    assert APGD(EPS) == APGD(EPS[:, None])
    assert APGD(0.1) == APGD(0.1)
    assert APGD(0.1) != APGD(0.1, steps=3)
    assert APGD(0.1) != pgd(0.1)


def test_swapped_sizes_are_doubted_by_the_largest_radius():
    with pytest.warns(UserWarning, match="step_size 0.3 is larger than eps 0.2: are they swapped?"):
        PGD(EPS, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PGD(EPS, 0.15)


@pytest.mark.parametrize("make", [FAB, Square, lambda eps: suite.single("pgd20", eps)])
def test_others_take_one_number(make):
    with pytest.raises(TypeError, match=r"eps is a tensor \[6\].*, must be "):
        make(EPS)
    assert make(torch.tensor(0.25)) == make(0.25)


def test_a_step_size_is_one_number():
    with pytest.raises(TypeError, match=r"step_size is a tensor \[6\], must be a number"):
        PGD(0.1, EPS)
    assert attacks.PGD(0.1, torch.tensor(0.05)) == PGD(0.1, torch.tensor(0.05).item())
