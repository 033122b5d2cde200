"""VFD-Adv as a wrapper: layers, distances, projectors, and what it adds to its base."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stand_ins import Wrapped
from torch import nn

from fastadv import methods, models
from fastadv.attacks import PGD
from fastadv.engine.features import forward_features
from fastadv.engine.frozen import InPrecision
from fastadv.errors import UsageError


@pytest.fixture
def setup():
    torch.manual_seed(0)
    student, narrow, wide = (models.get("resnet18", width=w) for w in (4, 4, 6))
    for net in (student, narrow, wide):
        net(torch.rand(64, 3, 8, 8))
    x = torch.rand(6, 3, 8, 8)
    batch = methods.Batch(x, torch.randint(10, (6,)), x_adv=(x + 0.03).clamp(0, 1))
    return student, narrow.eval(), wide.eval(), batch


def prepared(name, student, teacher, batch, **options):
    method = methods.get(name, **options)
    nets = methods.Nets(student, teacher=teacher, clean_teacher=teacher)
    method.prepare(nets, batch.x)
    return method, nets


def alone(student, clean_teacher, batch, **options):
    """The alignment terms by themselves: vfd+natural less its base."""
    method, nets = prepared("vfd+natural", student, clean_teacher, batch, **options)
    total, _ = method.outer(nets, batch, {})
    return total - method.base.outer(nets, batch, {})[0]


def features(net, x, layer):
    return forward_features(net, x, (layer,))[1][layer].flatten(1)


@pytest.mark.parametrize("distance", ["mse", "l2", "cosine"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("layer", ["penultimate", "layer4", "logits"])
def test_the_terms_are_distances_to_the_teacher_at_clean_x(setup, distance, normalise, layer):
    student, teacher, _, batch = setup
    student.eval()  # so that a second forward pass gives the same
    options = {"distance": distance, "normalise": normalise, "layers": layer}
    term = alone(student, teacher, batch, lambda_adv=2.0, lambda_clean=0.5, **options)
    expected = 0.0
    for x, weight in ((batch.x_adv, 2.0), (batch.x, 0.5)):
        a, b = features(student, x, layer), features(teacher, batch.x, layer)
        if normalise:
            a, b = (v / v.norm(dim=1, keepdim=True) for v in (a, b))
        by_hand = {
            "mse": lambda a, b: ((a - b) ** 2).mean(1),
            "l2": lambda a, b: (a - b).norm(dim=1),
            "cosine": lambda a, b: 1 - F.cosine_similarity(a, b),
        }[distance]
        expected = expected + weight * by_hand(a, b).mean()
    torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-5)


def test_layers_add_up(setup):
    student, teacher, _, batch = setup
    student.eval()
    one, two = (alone(student, teacher, batch, layers=name) for name in ("layer3", "penultimate"))
    both = alone(student, teacher, batch, layers=("layer3", "penultimate"))
    torch.testing.assert_close(both, one + two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layer", "kind"), [("penultimate", "Linear"), ("layer4", "Conv2d")])
def test_a_projector_joins_where_widths_differ(setup, layer, kind):
    student, same, wide, batch = setup
    method, _ = prepared("vfd+at", student, same, batch, layers=layer)
    assert list(method.parameters()) == []
    method, nets = prepared("vfd+at", student, wide, batch, layers=layer)
    (weight,) = method.parameters()
    assert type(method.projectors[0]).__name__ == kind
    assert weight.shape[:2] == (48, 32)
    loss, _ = method.outer(nets, batch, {})
    loss.backward()
    assert weight.grad.abs().max() > 0
    assert all(p.grad is None for p in wide.parameters())


def test_the_attack_is_the_bases(setup):
    student, teacher, _, batch = setup
    start = batch.x + 1e-3
    results = []
    for name in ("rslad", "vfd+rslad"):
        method, nets = prepared(name, student, teacher, batch)
        results.append(method.perturb(nets, batch, {}, start=start))
    assert torch.equal(*results)


@pytest.mark.parametrize("base", [name for name in methods.METHODS if name != "natural"])
def test_no_image_passes_the_student_twice(setup, base):
    student, teacher, _, batch = setup
    method, nets = prepared(f"vfd+{base}", student, teacher, batch)
    state = method.init_state("cpu")
    before = int(student.bn1.num_batches_tracked)
    loss, _ = method.outer(nets, batch, state)
    assert torch.isfinite(loss)
    passed = 3 if base == "saad" else 2  # x_adv, x - d and x
    assert student.bn1.num_batches_tracked == before + passed


def test_state_options_and_teachers_are_those_of_both():
    method = methods.get("vfd+mtard", lambda_adv=3.0, weight_rate=0.5, milestones=(4,))
    assert method.teachers == ("teacher", "clean_teacher")
    assert method.base.weight_rate == 0.5
    assert method.base.milestones == (4,)
    assert method.init_state("cpu").keys() == {"epoch", "weights", "first"}
    assert method.end_epoch(method.init_state("cpu"))["epoch"] == 1
    assert methods.get("vfd+at").teachers == ("clean_teacher",)


class Noted(torch.nn.Module):
    """An attack that counts its calls, and is a module."""

    def __init__(self):
        super().__init__()
        self.bad_gradients = 0

    def ascend(self, inner, x, *targets, start=None, index=None):
        self.bad_gradients += 1
        assert inner(x, *targets).shape == (len(x),)
        return x + self.bad_gradients


@pytest.mark.parametrize("side", ["wrapper", "base"])
@pytest.mark.parametrize("kind", [Noted, PGD])
@pytest.mark.parametrize("base", methods.METHODS)
def test_one_attack_seen_from_both(setup, base, kind, side):
    student, teacher, _, batch = setup
    method, nets = prepared(f"vfd+{base}", student, teacher, batch)
    state, attack = method.init_state("cpu"), kind()
    assert method.attack is method.base.attack is not attack
    (method if side == "wrapper" else method.base).attack = attack
    assert method.attack is method.base.attack is attack
    if kind is Noted and method.adversarial:
        for count in (1, 2):
            assert torch.equal(method.perturb(nets, batch, state), batch.x + count)
            assert method.attack.bad_gradients == method.base.attack.bad_gradients == count
    copied = copy.deepcopy(method)
    assert copied.attack is copied.base.attack is not attack


@pytest.mark.parametrize("side", ["wrapper", "base"])
@pytest.mark.parametrize("base", methods.METHODS)
def test_one_mode_and_one_schedule_seen_from_both(setup, base, side):
    student, teacher, _, batch = setup
    method, nets = prepared(f"vfd+{base}", student, teacher, batch, milestones=(2, 4))
    assigned = method if side == "wrapper" else method.base
    assert method.milestones == method.base.milestones == (2, 4)
    assert method.decayed(1.0, {"epoch": 3}) == method.base.decayed(1.0, {"epoch": 3}) == 0.1
    assigned.milestones = (5,)
    assert method.decayed(1.0, {"epoch": 3}) == method.base.decayed(1.0, {"epoch": 3}) == 1.0
    for mode in ("train", "eval"):
        assigned.attack_bn = mode
        assert method.attack_bn == method.base.attack_bn == mode
        seen = method.queried(nets).student
        assert (seen is nets.student) == (mode == "train")


@pytest.mark.parametrize("base", ["at", "trades", "rslad", "adaad"])
def test_the_inner_problem_is_the_bases(setup, base):
    student, teacher, _, batch = setup
    method, nets = prepared(f"vfd+{base}", student, teacher, batch)
    student.eval()
    ours = method.targets(nets, batch, {})
    theirs = method.base.targets(nets, batch, {})
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    values = (part.inner(nets, batch.x_adv, *ours) for part in (method, method.base))
    assert torch.equal(*values)


def test_errors_name_what_is_wrong(setup):
    student, teacher, _, batch = setup
    with pytest.raises(ValueError, match="distance is 'l1', must be one of mse, l2, cosine"):
        methods.get("vfd+at", distance="l1")
    for layers in ((), [], ("fc", "layer4", "fc"), "", ("fc", ""), ":fc", ("fc", "fc:fc")):
        with pytest.raises(ValueError, match="layers is .*, must be one name or more, each once"):
            methods.get("vfd+at", layers=layers)
    for layers in (("fc", 1.0), 3.0, {"fc": 1}):
        with pytest.raises(ValueError, match="layers of method vfd.at is .*, must be a name"):
            methods.get("vfd+at", layers=layers)
    with pytest.raises(ValueError, match="layers of the student: layer is 'layer9', must be"):
        prepared("vfd+at", student, teacher, batch, layers="layer9")
    with pytest.raises(ValueError, match="layers of the clean_teacher: layer is 'layer9', must be"):
        prepared("vfd+at", student, teacher, batch, layers="layer4:layer9")
    pair = Wrapped(nn.Flatten(), lambda h: (h, h)), Wrapped(nn.Identity(), lambda pair: pair[0])
    paired = nn.Sequential(*pair, nn.Linear(192, 10))
    with pytest.raises(UsageError, match="layers of the student: layer '0' returns a tuple"):
        prepared("vfd+at", paired, teacher, batch, layers="0:layer4")
    with pytest.raises(ValueError, match="layer3 of the student is .*, layer4 of the .*channels"):
        prepared("vfd+at", student, teacher, batch, layers="layer3:layer4")


def test_features_keep_their_names_through_twins_and_precisions(setup):
    student, _, _, batch = setup
    student.eval()
    logits, found = forward_features(student, batch.x, ("layer4", "penultimate", "logits"))
    assert torch.equal(found["logits"], logits)
    torch.testing.assert_close(found["layer4"].mean((2, 3)), found["penultimate"])
    torch.testing.assert_close(student.linear(found["penultimate"]), logits)
    low, half = forward_features(InPrecision(student, torch.bfloat16), batch.x, ("penultimate",))
    assert half["penultimate"].dtype == low.dtype == torch.float32
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


@pytest.mark.parametrize("weight", ["lambda_adv", "lambda_clean"])
def test_a_term_of_weight_zero_asks_nothing(setup, weight):
    student, teacher, _, batch = setup
    before = int(student.bn1.num_batches_tracked)
    method, nets = prepared("vfd+at", student, teacher, batch, **{weight: 0.0})
    method.outer(nets, batch, {})
    passes = 2 if weight == "lambda_adv" else 1  # the base's own, of x_adv, is one
    assert student.bn1.num_batches_tracked == before + passes


@pytest.mark.parametrize(("base", "on"), [("ard", "lambda_clean"), ("at", "lambda_adv")])
def test_features_of_a_pass_without_gradient_are_not_aligned(setup, base, on):
    """That of parity, which moves BatchNorm's statistics alone."""
    student, teacher, _, batch = setup
    student.eval()
    gradients = []
    for parity in (False, True):
        weights = {"lambda_adv": 0.0, "lambda_clean": 0.0} | {on: 1e4}
        method, nets = prepared(f"vfd+{base}", student, teacher, batch, parity=parity, **weights)
        loss, _ = method.outer(nets, batch, {})
        gradients.append(torch.autograd.grad(loss, student.layer1[0].conv1.weight)[0])
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-2
