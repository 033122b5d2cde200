import pytest
import torch

from fastadv.attacks import APGD, FAB, PGD, Square, suite


def test_the_papers_protocols():
    """PGD_SAT, PGD_TRADES and CW_inf as the robust distillation papers have them, at 8/255."""
    eps = 8 / 255
    found = {
        stage.name: (
            stage.attack.steps,
            pytest.approx(stage.attack.step_size),
            stage.attack.init,
            stage.loss,
        )
        for stage in suite.stages(["paper"], eps)
    }
    assert found == {
        "clean": (0, 2 / 255, "zero", "ce"),
        "fgsm": (1, 8 / 255, "zero", "ce"),
        "pgd20": (20, 2 / 255, "uniform", "ce"),
        "pgd20_003": (20, 0.003, "uniform", "ce"),
        "cw": (30, 2 / 255, "zero", "cw"),
    }
    for stage in suite.stages(["paper"], eps):
        assert stage.attack.eps == eps
        assert stage.attack.norm == "linf"
        assert not stage.after


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_standard_suite_is_autoattacks(norm):
    clean, ce, targeted, *others = suite.stages(["aa"], 0.5, norm)
    assert [stage.name for stage in others] == ["aa:fab-t", "aa:square"]
    assert clean.name == "clean"
    for stage, loss in ((ce, "ce"), (targeted, "targeted")):
        expected = APGD(0.5, steps=100, restarts=1, loss=loss, target_classes=9, norm=norm)
        assert stage.attack == expected
    assert targeted.after == ("clean", "aa:apgd-ce")
    assert others[1].after == ("clean", "aa:apgd-ce", "aa:apgd-t", "aa:fab-t")
    assert suite.stages(["autoattack-standard"], 0.5, norm) == [clean, ce, targeted, *others]


def test_autoattacks_other_versions():
    plus = {stage.name: stage.attack for stage in suite.stages("aa-plus", 0.1)[1:]}
    assert plus == {
        "aa-plus:apgd-ce": APGD(0.1, restarts=5),
        "aa-plus:apgd-dlr": APGD(0.1, restarts=5, loss="dlr"),
        "aa-plus:fab": FAB(0.1, restarts=5, target_classes=None),
        "aa-plus:square": Square(0.1),
        "aa-plus:apgd-t": APGD(0.1, loss="targeted"),
        "aa-plus:fab-t": FAB(0.1),
    }
    rand = {stage.name: stage.attack for stage in suite.stages("aa-rand", 9, "l1")[1:]}
    assert rand == {
        "aa-rand:apgd-ce": APGD(9, eot_iter=20, norm="l1"),
        "aa-rand:apgd-dlr": APGD(9, loss="dlr", eot_iter=20, norm="l1"),
    }
    _, ce, targeted, fab, square = (stage.attack for stage in suite.stages("aa", 9, "l1"))
    assert ce == APGD(9, restarts=5, norm="l1")
    assert targeted == APGD(9, loss="targeted", target_classes=5, norm="l1")
    assert (fab, square) == (FAB(9, norm="l1"), Square(9, norm="l1"))


def test_names_spell_out_pgd():
    clean, stage = suite.stages(["pgd-50-10"], 0.1)
    assert clean.name == "clean"
    assert stage.after == ("clean",)
    assert stage.attack == PGD(0.1, 0.025, 50, restarts=10, keep="best")
    assert stage.loss == "ce"
    _, stage = suite.stages("transfer-pgd-margin-7", 0.1, "l2")
    assert stage.attack == PGD(0.1, 0.025, 7, norm="l2", keep="best")
    assert stage.loss == "margin"
    assert stage.transferred


def test_each_stage_comes_once():
    names = [stage.name for stage in suite.stages(["pgd20", "clean", "paper", "quick", "aa"], 0.1)]
    assert len(names) == len(set(names)) == 5 + 2 + 4
    assert names[:2] == ["pgd20", "clean"]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("squrae", "attack is 'squrae', must be one of .*did you mean 'square'"),
        ("pgd-", "attack is 'pgd-', must be one of"),
        ("pgd-ce", "attack is 'pgd-ce', must be one of"),
        ("transfer-aa", "attack is 'transfer-aa', must be a single attack after 'transfer-'"),
        ("transfer-square", "attack is 'transfer-square', must be fgsm, cw or a pgd after"),
        ("transfer-claen", "attack is 'claen', must be one of .*did you mean 'clean'"),
        ("", "attack is '', must be one of"),
        ("pgd-20-0", "restarts is 0, must be at least 1"),
    ],
)
def test_unknown_names_are_refused(name, match):
    with pytest.raises(ValueError, match=match):
        suite.stages([name], 0.1)


@pytest.mark.parametrize("eps", [0, -0.1, float("nan"), float("inf"), 8])
def test_a_radius_is_positive_and_in_the_unit_of_x(eps):
    with pytest.raises(ValueError, match=r"eps is .*, must be"):
        suite.stages(["pgd20"], eps)


def test_stages_know_the_classes_they_need():
    needs = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "pgd-dlr-9": 3, "pgd-kl-9": 2, "cw": 2}
    assert {name: suite.single(name, 1).classes for name in needs} == needs


@pytest.mark.parametrize("name", ["apgd-ce", "fab-t", "square"])
def test_an_index_of_another_length_is_refused(name, model):
    x, y = torch.rand(3, 3, 8, 8), torch.zeros(3, dtype=torch.int64)
    attack = suite.single(name, 8 / 255).attack
    with pytest.raises(ValueError, match=r"index has shape \(2,\), must be \(3,\)"):
        attack(model, x, y, index=torch.arange(2))


@pytest.mark.parametrize("name", ["pgd20", "pgd-kl-3", "square", "fgsm"])
def test_a_stage_hands_on_the_ids_of_its_images(name, model):
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    stage, ids = suite.single(name, 1e-4), torch.arange(60, 64)
    if name == "square":
        stage.attack.queries = 5
    found = []
    for rows, index in ((slice(None), ids), (slice(1, 3), ids[1:3]), (slice(None), ids + 9)):
        torch.manual_seed(3)
        found.append(stage(model, x[rows], y[rows], index))
    assert (found[0][1:3] - found[1]).abs().max() < 1e-7
    assert torch.equal(found[0], found[2]) == (name == "fgsm")
