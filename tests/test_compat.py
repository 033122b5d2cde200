import copy
import types

import pytest
import torch
from stand_ins import Wrapped
from torch import nn

from fastadv import attacks, compat, evaluate
from fastadv.attacks.suite import CASCADES, cascade, stages
from fastadv.compat.autoattack import OWNERS, VERSIONS
from fastadv.data import ImageSet

EPS = 8 / 255


X = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    """Five classes about equally likely on X, and easy to leave."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    with torch.no_grad():
        net[-1].bias -= net(X).mean(0)
    return net.eval()


@pytest.fixture
def batch(model):
    with torch.no_grad():
        return X, model(X).argmax(1)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda m: compat.FGSM(m, 0.03), attacks.FGSM(0.03)),
        (lambda m: compat.PGD(m), attacks.PGD(EPS, 2 / 255, 10)),
        (lambda m: compat.PGD(m, 0.05, 0.01, 3, False), attacks.PGD(0.05, 0.01, 3, "zero")),
        (lambda m: compat.PGDL2(m, steps=4), attacks.PGD(1.0, 0.2, 4, norm="l2")),
        (lambda m: compat.APGD(m), attacks.APGD(EPS, 10)),
        (
            lambda m: compat.APGD(m, "L2", 0.5, 7, 2, seed=5, loss="dlr", rho=0.5),
            attacks.APGD(0.5, 7, 2, "dlr", norm="l2", rho=0.5),
        ),
        (
            lambda m: compat.APGD(m, "L1", 5.0, 4, eot_iter=2),
            attacks.APGD(5.0, 4, norm="l1", eot_iter=2),
        ),
    ],
)
def test_a_call_is_that_of_the_attack(model, batch, theirs, ours):
    x, y = batch
    bound = theirs(model)
    torch.manual_seed(bound.seed or 0)
    expected = ours(model, x, y)
    torch.manual_seed(0)
    assert bound.attack == ours
    assert torch.equal(bound(x, y), expected)
    assert not torch.equal(expected, x)


def test_a_seed_is_the_attacks_own(model, batch):
    x, y = batch
    attack = compat.APGD(model, steps=3, seed=1)
    before = torch.get_rng_state()
    assert torch.equal(attack(x, y), attack(x, y))
    assert torch.equal(torch.get_rng_state(), before)


def autoattack(model, **options):
    options = {"attacks_to_run": ["apgd-ce", "apgd-dlr"], "version": "custom", "seed": 2} | options
    attack = compat.AutoAttack(model, eps=2 / 255, device="cpu", verbose=False, **options)
    attack.apgd.n_restarts = 1  # of 5, for the time
    return attack


def test_autoattack_is_the_suite(model, batch, tmp_path, capsys):
    x, y = batch
    standard = compat.AutoAttack(model, eps=EPS, device="cpu")
    assert standard.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    y[0] = (y[0] + 1) % 5
    attack = autoattack(model, log_path=tmp_path / "log.txt")
    x_adv, labels = attack.run_standard_evaluation(x, y, bs=5, return_labels=True)
    assert "worst case" in (tmp_path / "log.txt").read_text()
    assert capsys.readouterr().out == ""
    with torch.no_grad():
        assert torch.equal(labels, model(x_adv).argmax(1))
    split = ImageSet(x, y, torch.arange(12))
    suite = cascade(["apgd-ce", "apgd-dlr"], 2 / 255)
    robust = evaluate.run(model, split, suite, seed=2).right("apgd-dlr")
    assert torch.equal(labels == y, robust)
    assert 0 < robust.sum() < 11
    moved = (x_adv - x).abs().flatten(1).amax(1)
    assert moved.max() <= 2 / 255 + 1e-6
    assert torch.equal(moved > 0, ~robust & (torch.arange(12) > 0))


def test_functions_are_models_too(model, batch):
    x, y = batch
    a, b = (autoattack(net).run_standard_evaluation(x, y) for net in (model, lambda v: model(v)))
    assert (a - b).abs().max() < 5 / 255
    with torch.no_grad():
        assert torch.equal(model(a).argmax(1) == y, model(b).argmax(1) == y)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda m: compat.APGD(m, eot_iter=0), "eot_iter is 0, must be at least 1"),
        (lambda m: compat.APGD(m, norm="L0"), "norm is 'L0', must be 'Linf', 'L2' or 'L1'"),
        (lambda m: compat.PGD(m, eps=8), "eps is 8, must be"),
        (
            lambda m: compat.AutoAttack(m, version="fast"),
            "version is 'fast', must be one of standard",
        ),
        (lambda m: compat.AutoAttack(m, is_tf_model=True), "is_tf_model is True, must be False"),
        (
            lambda m: compat.AutoAttack(m, attacks_to_run=["square"]),
            r"attacks_to_run is \['square'\], must be for version 'custom'",
        ),
        (
            lambda m: autoattack(m, attacks_to_run=["apgd"]),
            "attack is 'apgd', must be one of .*did you mean",
        ),
        (lambda m: compat.AutoAttack(m, device="cuda:9"), "device is 'cuda:9', which cannot be"),
    ],
)
def test_what_is_not_known_is_refused(model, build, match):
    with pytest.raises(ValueError, match=match):
        build(model)


def test_attacks_may_be_named_later_and_one_by_one(model, batch):
    x, y = batch
    attack = autoattack(model, attacks_to_run=[])
    with pytest.raises(ValueError, match=r"attacks_to_run is \[\], must name"):
        attack.run_standard_evaluation(x, y)
    attack.attacks_to_run = ["apgd-ce", "square"]
    found = attack.run_standard_evaluation_individual(x, y)
    assert attack.attacks_to_run == list(found) == ["apgd-ce", "square"]
    alone = autoattack(model, attacks_to_run=["apgd-ce"]).run_standard_evaluation(x, y)
    assert torch.equal(found["apgd-ce"], alone)
    assert not torch.equal(found["square"], alone)


def test_what_cannot_run_or_be_trusted_is_said(batch, capsys):
    x, _ = batch
    torch.manual_seed(0)
    two = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).train()
    with torch.no_grad():
        y = two(x).argmax(1)
    attack = compat.AutoAttack(two, eps=EPS, seed=0)
    attack.attacks_to_run = ["apgd-ce", "apgd-t"]
    x_adv = attack.run_standard_evaluation(x, y)
    said = capsys.readouterr().out
    assert "warning: apgd-t left out: needs 4 classes, not 2" in said
    assert "warning: the model was in train mode" in said
    assert two.training
    with torch.no_grad():
        assert (two(x_adv).argmax(1) != y).any()


def test_labels_leave_the_model_as_it_was(batch):
    x, y = batch
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5))
    net(x)
    mean = net[1].running_mean.clone()
    _, labels = autoattack(net).run_standard_evaluation(x, y, return_labels=True)
    assert net.training
    assert torch.equal(net[1].running_mean, mean)
    assert compat.PGD(lambda v: net(v), steps=1)(x, y).shape == x.shape
    assert len(labels) == 12


KINDS = [compat.FGSM, compat.PGD, compat.PGDL2, compat.APGD]


@pytest.mark.parametrize("kind", KINDS)
def test_models_may_wrap_their_logits_and_compute_in_any_dtype(model, batch, kind):
    x, y = batch
    torch.manual_seed(0)
    expected = kind(model)(x, y)
    torch.manual_seed(0)
    assert torch.equal(kind(Wrapped(model, lambda z: {"logits": z}))(x, y), expected)
    torch.manual_seed(0)
    assert torch.equal(kind(lambda v: (model(v),))(x, y.to(torch.uint8)), expected)
    for dtype in (torch.bfloat16, torch.float64):
        for of_x in (torch.float32, torch.float64):
            x_adv = kind(copy.deepcopy(model).to(dtype))(x.to(of_x), y)
            assert x_adv.dtype == of_x
            assert not torch.equal(x_adv, x.to(of_x))


@pytest.mark.parametrize("norm", ["Linf", "L1"])
@pytest.mark.parametrize(("version", "name"), VERSIONS.items())
def test_versions_are_the_suites(model, version, name, norm):
    attack = compat.AutoAttack(model, norm, 0.5, version=version)
    expected = [stage.attack for stage in stages(name, 0.5, norm.lower())]
    assert [stage.attack for stage in attack._stages()] == expected
    assert attack.attacks_to_run == [*CASCADES[name]]
    for other, of_other in VERSIONS.items():  # each sets all that another has set
        attack.set_version(other)
        expected = [stage.attack for stage in stages(of_other, 0.5, norm.lower())]
        assert [stage.attack for stage in attack._stages()] == expected


def test_settings_reach_the_attacks_and_others_are_refused(model):
    attack = compat.AutoAttack(model, eps=EPS, version="custom", attacks_to_run=[*OWNERS, "pgd20"])
    before = {stage.name: stage.attack for stage in attack._stages()}
    assert before["apgd-dlr"] == attacks.APGD(EPS, 100, 5, "dlr")  # the authors' defaults
    assert before["fab"] == attacks.FAB(EPS, 100, 5, None)
    assert before["fab-t"] == attacks.FAB(EPS, 100, 1, 9)
    attack.apgd.n_restarts, attack.apgd.n_iter, attack.apgd.eot_iter = 2, 7, 3
    attack.apgd_targeted.n_target_classes, attack.apgd_targeted.n_restarts = 3, 4
    attack.fab.n_restarts, attack.fab.n_target_classes, attack.fab.n_iter = 6, 5, 8
    attack.square.n_queries, attack.square.n_restarts = 9, 10
    found = {stage.name: stage.attack for stage in attack._stages()}
    assert found == {
        "clean": before["clean"],
        "apgd-ce": attacks.APGD(EPS, 7, 2, eot_iter=3),
        "apgd-dlr": attacks.APGD(EPS, 7, 2, "dlr", eot_iter=3),
        "apgd-t": attacks.APGD(EPS, 100, 4, "targeted", 3),
        "fab": attacks.FAB(EPS, 8, 6, None),
        "fab-t": attacks.FAB(EPS, 8, 1, 5),
        "square": attacks.Square(EPS, 9, restarts=10),
        "pgd20": before["pgd20"],
    }
    for name, value, error, match in (
        ("n_restart", 2, AttributeError, "n_restart is not known here, must be one of n_restarts"),
        ("n_restarts", 0, ValueError, "n_restarts is 0, must be at least 1"),
        ("eot_iter", 1.5, TypeError, "eot_iter is 1.5, must be a whole number"),
    ):
        with pytest.raises(error, match=match):
            setattr(attack.apgd, name, value)


def public_script(AutoAttack, model, x_test, y_test, args):
    """What the authors' eval.py does between loading and saving."""
    adversary = AutoAttack(
        model, norm=args.norm, eps=args.epsilon, log_path=args.log_path, version=args.version
    )
    if args.version == "custom":
        adversary.attacks_to_run = ["apgd-ce", "fab"]
        adversary.apgd.n_restarts = 2
        adversary.fab.n_restarts = 2
    with torch.no_grad():
        if args.individual:
            return adversary.run_standard_evaluation_individual(x_test, y_test, bs=args.batch_size)
        return adversary.run_standard_evaluation(
            x_test, y_test, bs=args.batch_size, state_path=args.state_path
        )


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_the_public_script_runs_with_its_import_changed(model, batch, tmp_path, norm):
    x, y = batch[0][:4], batch[1][:4]
    options = {"norm": norm, "epsilon": {"Linf": 0.05, "L2": 0.5, "L1": 5.0}[norm], "batch_size": 3}
    paths = {"log_path": tmp_path / "log.txt", "state_path": tmp_path / "state"}
    args = types.SimpleNamespace(version="custom", individual=False, **options, **paths)
    x_adv = public_script(compat.AutoAttack, model, x, y, args)
    adversary = compat.AutoAttack(model, verbose=False)
    assert adversary.clean_accuracy(x, y, bs=5) == 1
    assert adversary.clean_accuracy(x_adv, y) < 0.7
    assert "fab" in paths["log_path"].read_text()
    if norm != "Linf":
        return
    args.individual = True
    assert list(public_script(compat.AutoAttack, model, x, y, args)) == ["apgd-ce", "fab"]


class Stops(nn.Module):
    """A network that is interrupted at its call number `left`."""

    def __init__(self, net, left):
        super().__init__()
        self.net, self.left = net, [left]

    def forward(self, x):
        self.left[0] -= 1
        if not self.left[0]:
            raise KeyboardInterrupt
        return self.net(x)


def test_a_run_without_a_seed_goes_on_too(model, batch, tmp_path):
    x, y = batch
    with pytest.raises(KeyboardInterrupt):
        autoattack(Stops(model, 60).eval(), seed=None).run_standard_evaluation(
            x, y, bs=3, state_path=tmp_path / "state"
        )
    found = [
        autoattack(model, seed=seed).run_standard_evaluation(x, y, bs=3, state_path=folder)
        for seed, folder in ((None, tmp_path / "state"), (0, tmp_path / "whole"))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stopped_run_goes_on_with_what_it_found(model, batch, tmp_path, monkeypatch, dtype):
    x, y = batch[0].to(dtype), batch[1]
    monkeypatch.setattr("fastadv.evaluate.search._twin", lambda model, dtype: model)
    expected = autoattack(model).run_standard_evaluation(x, y, bs=3)
    state = tmp_path / "state"

    def run(left, **options):
        net = Stops(model, left).eval()
        attack = autoattack(net, **options)
        return net, attack.run_standard_evaluation(x, y, bs=3, state_path=state)

    with pytest.raises(KeyboardInterrupt):
        run(300)
    net, x_adv = run(10**6)
    assert torch.equal(x_adv, expected)
    assert 10**6 - net.left[0] > 100
    net, x_adv = run(10**6)  # nothing is left to do
    assert torch.equal(x_adv, expected)
    assert 10**6 - net.left[0] < 10
    with pytest.raises(ValueError, match="has an evaluation with attacks .* choose another folder"):
        run(10**6, attacks_to_run=["apgd-ce"])
    with pytest.raises(ValueError, match="has an evaluation with images .* choose another folder"):
        autoattack(model).run_standard_evaluation(1 - x, y, state_path=state)
    with pytest.raises(ValueError, match="has an evaluation with seed 2, this one has 7: choose"):
        run(10**6, seed=7)
    with pytest.raises(ValueError, match="must be None for a model without weights of its own"):
        autoattack(lambda v: model(v)).run_standard_evaluation(batch[0], y, state_path=state)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="state_path is .*file, a file, must be a folder"):
        autoattack(model).run_standard_evaluation(x, y, state_path=tmp_path / "file")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_x", [torch.float32, torch.float64])
def test_autoattack_takes_them_too(model, batch, dtype, of_x):
    x, y = batch[0].to(of_x), batch[1]
    net = Wrapped(copy.deepcopy(model).to(dtype), lambda z: {"logits": z}).eval()
    with torch.no_grad():
        y = net(x.to(dtype))["logits"].argmax(1).to(torch.int32)
    x_adv, labels = autoattack(net).run_standard_evaluation(x, y, bs=5, return_labels=True)
    assert x_adv.dtype == of_x
    with torch.no_grad():
        assert torch.equal(labels, net(x_adv.to(dtype))["logits"].argmax(1))
    assert torch.equal((x_adv != x).flatten(1).any(1), labels != y)
    assert (labels != y).any()


def test_arguments_of_the_wrong_kind_are_named(model, batch):
    x, y = batch
    attack = autoattack(model)
    for call, error, match in (
        (lambda: compat.PGD(None), TypeError, "model is None, must be a torch.nn.Module or a func"),
        (lambda: compat.PGD(model, eps="8/255"), TypeError, "eps is '8/255', must be a number"),
        (lambda: compat.PGD(model, steps=2.5), TypeError, "steps is 2.5, must be a whole number"),
        (lambda: compat.PGD(model)(x.numpy(), y), TypeError, "inputs is a ndarray, must be"),
        (lambda: compat.PGD(model)(x, y.tolist()), TypeError, "labels is a list, must be a te"),
        (lambda: compat.FGSM(model)(x, y + 5), ValueError, "y has labels from"),
        (lambda: compat.APGD(model, seed=0.5), TypeError, "seed is 0.5, must be a whole number"),
        (
            lambda: compat.APGD(model, norm=["Linf"]),
            ValueError,
            r"norm is \['Linf'\], must be 'Linf",
        ),
        (lambda: autoattack(3), TypeError, "model is 3, must be a torch.nn.Module or a function"),
        (
            lambda: autoattack(model, attacks_to_run="square"),
            TypeError,
            "attacks_to_run is 'square', must be a list of names",
        ),
        (
            lambda: autoattack(model, precision="fp16"),
            ValueError,
            "precision is 'fp16', must",
        ),
        (lambda: attack.run_standard_evaluation(x.numpy(), y), TypeError, "x is a ndarray"),
        (lambda: attack.run_standard_evaluation(x, y.tolist()), TypeError, "y is a list"),
        (lambda: attack.run_standard_evaluation(x, y, bs=2.5), TypeError, "bs is 2.5, must be a w"),
        (lambda: attack.run_standard_evaluation(x[:0], y[:0]), ValueError, "x has no images"),
        (
            lambda: compat.AutoAttack(model, eps=torch.rand(12)),
            TypeError,
            r"eps is a tensor \[12\], must be a number",
        ),
    ):
        with pytest.raises(error, match=match):
            call()
