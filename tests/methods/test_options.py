"""Options and states of the methods that the papers' default settings leave out."""

import pytest
import torch
import torch.nn.functional as F

from fastadv import UsageError, methods, models


@pytest.fixture
def setup():
    """(nets, batch) with float32 networks in the state of a few steps."""
    torch.manual_seed(0)
    student, *teachers = (models.get("resnet18", width=width) for width in (4, 6, 4))
    for net in (student, *teachers):
        net(torch.rand(64, 3, 8, 8))
    nets = methods.Nets(student.eval(), *(teacher.eval() for teacher in teachers))
    x = torch.rand(8, 3, 8, 8)
    return nets, methods.Batch(x, torch.randint(10, (8,)), x_adv=(x + 0.03).clamp(0, 1))


def outer(name, nets, batch, y=None, **options):
    """(loss, state) of a first step."""
    method = methods.get(name, **options)
    method.prepare(nets, batch.x)
    again = methods.Batch(batch.x, batch.y if y is None else y, x_adv=batch.x_adv)
    return method.outer(nets, again, method.init_state("cpu"))


SMOOTHED = {"natural": {}, "at": {}, "trades": {}, "ard": {"alpha": 0.5}, "iad2": {}}


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothing_of_labels_is_that_of_probabilities(setup, name):
    nets, batch = setup
    smoothed, _ = outer(name, nets, batch, label_smoothing=0.3, **SMOOTHED[name])
    y = 0.7 * F.one_hot(batch.y, 10).float() + 0.03
    expected, _ = outer(name, nets, batch, y, **SMOOTHED[name])
    torch.testing.assert_close(smoothed, expected, rtol=1e-5, atol=1e-6)
    plain, _ = outer(name, nets, batch, **SMOOTHED[name])
    assert (plain - smoothed).abs() > 1e-3


@pytest.mark.parametrize("name", methods.METHODS)
def test_constants_and_states_carry_no_graph(setup, name):
    nets, batch = setup
    method = methods.get(name)
    method.prepare(nets, batch.x)
    state = method.init_state("cpu")
    assert not any(target.requires_grad for target in method.targets(nets, batch, state))
    loss, state = method.outer(nets, batch, state)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in state.values())


def test_mtard_raises_relative_losses_to_a_power():
    for b, share in ((1.0, 2 / 3), (2.0, 0.8), (0.0, 0.5)):
        method = methods.get("mtard", b=b, weight_rate=1.0)
        state = method.balanced(torch.tensor([3.0, 5.0]), method.init_state("cpu"))
        assert state["weights"].tolist() == [0.5, 0.5]
        state = method.balanced(torch.tensor([6.0, 5.0]), state)
        assert state["weights"].tolist() == pytest.approx([share, 1 - share])
        assert state["first"].tolist() == [3.0, 5.0]


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.02), (1, 0.002), (2, 0.0002)])
def test_rates_of_bmtard_drop_both(setup, epoch, rate):
    nets, batch = setup
    method = methods.get("bmtard", temperature_rate=0.02, weight_rate=1.0, milestones=(1, 2))
    state = method.init_state("cpu") | {"epoch": torch.tensor(epoch)}
    state |= {"temperatures": torch.tensor([2.0, 2.0]), "first": torch.tensor([1.0, 3.0])}
    _, after = method.outer(nets, batch, state)
    moved = after["temperatures"] - 2
    assert sorted(moved.tolist()) == pytest.approx([-rate, rate], abs=1e-6)
    shares = method.balanced(torch.tensor([3.0, 1.0]), state)["weights"]
    assert float(shares[0]) == pytest.approx(0.5 + 0.4 * 0.1**epoch)


def test_temperatures_of_absld_stay_in_their_range():
    """Also where classes are alike, or none was seen."""
    method = methods.get("absld", temperature_rate=2.0)
    method.classes = 3
    state = method.init_state("cpu")
    state = method.end_epoch(state)
    assert state["temperatures"].tolist() == [[1.0] * 3] * 2
    state = method.end_epoch(state | {"errors": torch.ones(2, 3)})
    assert state["temperatures"].tolist() == [[1.0] * 3] * 2
    for _ in range(4):
        errors = torch.tensor([[9.0, 0.0, 0.0], [0.0, 6.0, 3.0]])
        state = method.end_epoch(state | {"errors": errors})
    assert state["temperatures"].tolist() == [[0.5, 5.0, 5.0], [5.0, 0.5, 1.0]]


@pytest.mark.parametrize("name", ["adaad", "advfunmatch"])
def test_a_clean_teacher_is_read_where_its_term_is(name):
    option = "alpha" if name == "adaad" else "clean_weight"
    for value in (0.0, 0.5, 1.0):
        read = methods.get(name, **{option: value}).cacheable()
        vanishes = value == (1.0 if name == "adaad" else 0.0)
        assert read == ({} if vanishes else {"teacher": ("logits",)})


def test_options_are_those_of_the_nearest_class():
    class Mine(methods.TRADES):
        def __init__(self, beta=1.0, gamma=2.0, **options):
            super().__init__(beta, **options)

    found = methods.options(Mine)
    assert found == {"beta": 1.0, "gamma": 2.0, "label_smoothing": 0.0, "parity": False}


@pytest.mark.parametrize("name", ["at", "vfd+at"])
def test_a_mode_of_batchnorm_is_one_of_two(name):
    method = methods.get(name)
    method.attack_bn = "train"
    for wrong in ("on", None, True, ""):
        with pytest.raises(UsageError, match=f"attack_bn is {wrong!r}, must be 'eval' or 'train'"):
            method.attack_bn = wrong
    assert method.attack_bn == "train"
    with pytest.raises(UsageError, match="attack_bn is '', must be 'eval' or 'train'"):
        methods.get(name, attack_bn="")


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_batch_without_adversarial_images_says_so(setup, name):
    """Also where it is a teacher that is asked of them."""
    nets, batch = setup
    method = methods.get(name)
    method.prepare(nets, batch.x)
    bare = methods.Batch(batch.x, batch.y)
    state = method.init_state("cpu")
    if method.adversarial:
        with pytest.raises(ValueError, match="^batch.x_adv is missing: set it to method.perturb"):
            method.outer(nets, bare, state)
        with pytest.raises(ValueError, match="^batch.x_adv is missing"):
            bare.teacher_logits(nets, on="x_adv")
    else:
        assert method.outer(nets, bare, state)[0].isfinite()
        assert method.perturb(nets, bare, state) is bare.x


def test_options_of_a_method_of_ones_own_may_be_of_any_kind(monkeypatch):
    """No kind is known of a default such as None; where one is, it is the value's too."""

    class Own(methods.Method):
        def __init__(self, scale=None, sizes=(1.0, 2.0), layers=("a",), **options):
            super().__init__(**options)
            self.given = scale, sizes, layers

    monkeypatch.setattr(methods, "OWN", {})
    methods.register("own", Own)
    given = {"scale": 3.0, "sizes": (2.0, 3.0), "layers": ["b", "c"]}
    assert methods.get("own", **given).given == (*given.values(),)
    with pytest.raises(UsageError, match="layers of method own is 3, must be a name, or names"):
        methods.get("own", layers=3)


@pytest.mark.parametrize("name", [*methods.METHODS, "vfd+at", "igdm+rslad"])
def test_every_default_may_be_given(name):
    parts, _ = methods.parts(name)
    kinds = [methods.named(name), *(methods.WRAPPERS[part] for part in parts)]
    given = {k: v for kind in kinds for k, v in methods.options(kind).items()}
    methods.get(name, **given)
