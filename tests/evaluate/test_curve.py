"""Accuracy as a function of the radius, from attacks that look for the nearest examples."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastadv import evaluate
from fastadv.attacks import FMN, suite
from fastadv.attacks.minimal import distance
from fastadv.data import ImageSet
from fastadv.evaluate import Record, curve, search
from fastadv.evaluate.__main__ import main
from fastadv.runs import checkpoint


class Threshold(nn.Module):
    """Of two pixels, the second class wins where their sum is above 1.2: the distances are known.
    Where the first pixel is below 0.05, nothing is ever adversarial."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x):
        sums = x.flatten(1).sum(1) + self.shift
        flat = x.flatten(1)[:, 0] < 0.05
        margin = torch.where(flat, -1 + 0 * sums, 10 * (sums - 1.2))
        return torch.stack((-margin, margin), 1)


@pytest.fixture
def split():
    """Images on a line; the fourth is misclassified, the fifth is never broken."""
    x = torch.tensor([[0.5, 0.5], [0.4, 0.4], [0.3, 0.3], [0.7, 0.7], [0.0, 0.2], [0.1, 0.3]])
    return ImageSet(x.view(6, 1, 1, 2), torch.zeros(6, dtype=torch.int64), torch.arange(6))


DISTANCES = {
    "linf": torch.tensor([0.1, 0.2, 0.3, 0.0, math.inf, 0.4]),
    "l2": torch.tensor([0.1, 0.2, 0.3, 0.0, math.inf, 0.4]) * math.sqrt(2),
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["fmn", "deepfool", "cw-l2", "ddn"])
def test_distances_and_verdicts_are_those_of_the_nearest_examples(split, norm, name):
    if norm == "linf" and name in ("ddn", "cw-l2"):
        with pytest.raises(ValueError, match="norm of (DDN|CW) is 'linf', must be one of l2"):
            suite.stages([name], 0.25, norm)
        return
    stages = suite.stages([name], 0.25, norm)
    stages[1].attack.steps = min(stages[1].attack.steps, 60)
    stages[1].attack.step_size = 0.1
    record = evaluate.run(Threshold(), split, stages, batch_size=4)
    (found,) = evaluate.distances(record, stages).values()
    torch.testing.assert_close(found, DISTANCES[norm].double(), rtol=0.05, atol=0)
    assert (found >= DISTANCES[norm] * (1 - 1e-6)).all()
    assert torch.equal(record.right(name), found > 0.25)
    assert record.costs[name].invalid == 0  # what is farther than eps is valid, but not broken
    assert record.costs[name].largest == found[found <= 0.25].max()
    assert record.costs[name].images == 5


def test_the_accuracy_at_eps_is_that_of_the_verdicts(split):
    stages = suite.stages("fmn,deepfool", 0.25, "linf")
    record = evaluate.run(Threshold(), split, stages)
    found = evaluate.distances(record, stages)
    assert list(found) == ["fmn", "deepfool", "nearest of all"]
    assert torch.equal(found["nearest of all"], torch.minimum(found["fmn"], found["deepfool"]))
    for name in ("fmn", "deepfool"):
        rate = record.right(name).double().mean().item()
        assert curve.accuracy(found[name], 0.25, "linf") == rate
        summary = curve.summary(found, 0.25, "linf")[name]
        assert summary["robust_acc"]["0.25"] == f"{100 * rate:.2f}"
        assert summary["found"] == "83.33"
        assert summary["median"] == found[name].sort().values[2:4].mean()
    assert evaluate.rates(record, stages)["worst case"] == pytest.approx(3 / 6)


def test_only_the_models_own_verdict_has_a_distance(split, monkeypatch):
    """A twin sees brighter images: what it alone misclassifies is attacked again on the model."""
    monkeypatch.setattr(search, "freeze", lambda model, dtype: Threshold(0.05))
    stages = suite.stages("fmn", 1.0)
    record = evaluate.run(Threshold(), split, stages)
    torch.testing.assert_close(
        record.distance("fmn"), DISTANCES["linf"].double(), rtol=0.02, atol=0
    )
    assert record.costs["fmn"].disputed == 4
    monkeypatch.setattr(search, "freeze", lambda model, dtype: Threshold(-0.05))  # and darker
    record = evaluate.run(Threshold(), split, stages)
    assert (record.distance("fmn") >= DISTANCES["linf"] * (1 - 1e-6)).all()


def test_rates_and_medians_are_counted():
    found = {"a": torch.tensor([0.0, 0.1, 0.3, math.inf]), "b": torch.tensor([0.2, math.inf, 0.1])}
    for eps, rate in ((0.0, 0.75), (0.1, 0.5), (0.2, 0.5), (0.3, 0.25), (9.0, 0.25)):
        assert curve.accuracy(found["a"], eps, "l2") == rate
    assert curve.summary(found, 0.2, "l2")["a"] == {
        "median": pytest.approx(0.2),
        "found": "75.00",
        "robust_acc": {"0.05": "75.00", "0.1": "50.00", "0.2": "50.00", "0.4": "25.00"},
    }
    assert curve.summary(found, 0.2, "l2")["b"]["median"] == pytest.approx(0.2)
    for values in ([0.1, math.inf], [math.inf, math.inf], [0.1, math.inf, math.inf]):
        few = {"a": torch.tensor(values)}
        assert curve.summary(few, 0.2, "l2")["a"]["median"] is None
        assert "infinite" in curve.describe(few, 0.2, "l2")
    lines = curve.describe(found, 8 / 255, "linf").splitlines()
    assert "2/255" in lines[1]
    assert lines[2].split() == ["a", "0.20000", "75.00%", "75.00%", "75.00%", "75.00%"]


def test_no_curve_for_images_that_were_not_attacked(split):
    stages = suite.stages("fmn", 0.1)
    with pytest.raises(ValueError, match="fmn: 6 of 6 images were not attacked yet"):
        evaluate.distances(Record(6), stages)
    assert evaluate.distances(Record(6), stages[:1]) == {}


def test_suites_know_the_attacks_and_give_each_right_image_a_distance():
    stages = suite.stages("pgd20,fmn,quick", 0.1)
    assert [stage.minimal for stage in stages] == [False, False, True, False, False]
    assert stages[2].after == ("clean",)
    assert stages[2].attack == FMN()
    cascade = suite.cascade(["pgd20", "fmn", "apgd-ce"], 0.1)
    assert cascade[2].after == ("clean",)
    assert cascade[3].after == ("clean", "pgd20", "fmn")
    with pytest.raises(ValueError, match="attack is 'fnm', must be one of .*did you mean 'fmn'"):
        suite.single("fnm", 0.1)
    with pytest.raises(ValueError, match="attack is 'transfer-fmn', must be fgsm, cw or a pgd"):
        suite.single("transfer-fmn", 0.1)


def test_a_record_is_of_one_radius(split):
    record = evaluate.run(Threshold(), split, suite.stages("fmn", 0.1))
    with pytest.raises(ValueError, match="record has fmn .* within 0.1, must .* within 0.2"):
        evaluate.run(Threshold(), split, suite.stages("fmn", 0.2)[1:], record=record)


@pytest.mark.parametrize("norm", ["l1", "l0"])
def test_the_judge_knows_the_other_norms(norm):
    x = torch.full((2, 1, 2, 2), 0.5)
    x_adv = x.clone()
    x_adv[0, 0, 0, 0] += 0.3
    x_adv[1] += 0.1
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(wrong[1].weight), wrong[1].bias.data.copy_(torch.tensor([0.0, 2.0]))
    y = torch.zeros(2, dtype=torch.int64)
    right, valid, found, *_ = search.judge(wrong, x, x_adv, y, {"l1": 0.35, "l0": 1}[norm], norm)
    assert found.tolist() == pytest.approx([0.3, 0.4] if norm == "l1" else [1, 4])
    assert valid.tolist() == [True, False]
    assert not right.any()
    assert torch.equal(found, distance(x_adv.double() - x, norm))
    assert search.judge(wrong, x, x_adv, y, math.inf, norm).valid.all()


KILLED = """
import os, signal, sys
from fastadv.evaluate import record
from fastadv.evaluate.__main__ import main

record.SAVE_EVERY = 0
save, saves = record.checkpoint.save, []

def save_or_die(*args):
    saves.append(save(*args))
    if len(saves) == 6:
        os.kill(os.getpid(), signal.SIGKILL)

record.checkpoint.save = save_or_die
main(sys.argv[1:])
"""


def test_the_command_reports_a_curve_and_goes_on_where_it_was(teacher, tmp_path, capsys):
    line = ["--checkpoint", str(teacher), "--attacks", "deepfool,fmn", "--batch-size", "16"]
    line += ["--eps", "0.1"]
    whole, killed = (["--out", str(tmp_path / name)] for name in ("whole", "killed"))
    main([*line, *whole])
    shown = capsys.readouterr().out
    assert "distance of the nearest adversarial example (linf), accuracy at radius" in shown
    done = subprocess.run([sys.executable, "-c", KILLED, *line, *killed], check=False)
    assert done.returncode == -9
    (state,) = (tmp_path / "killed").rglob("state.safetensors")
    tensors, _ = checkpoint.load(state)
    assert (tensors["deepfool/distance"] > 0).any()
    assert (tensors["deepfool"] == 0).any()  # some are still to be attacked
    main([*line, *killed])
    reports = []
    for name in ("whole", "killed"):
        (path,) = (tmp_path / name).glob("*/report.json")
        assert path.with_name("minimal_norm.png").read_bytes()[:4] == b"\x89PNG"
        reports.append((json.loads(path.read_text()), checkpoint.load(path.parent / state.name)[0]))
    (report, tensors), (again, tensors_again) = reports
    assert report["minimal_norm"] == again["minimal_norm"]
    assert list(report["minimal_norm"]) == ["deepfool", "fmn", "nearest of all"]
    for name in ("deepfool", "fmn"):
        rate = report["minimal_norm"][name]["robust_acc"]["0.1"]
        assert rate == report["attacks"][name]["accuracy"]
    assert tensors.keys() == tensors_again.keys()
    assert all(torch.equal(tensors[name], tensors_again[name]) for name in tensors)
    assert not report["unreliable"]
    main(["--checkpoint", str(teacher), "--attacks", "fgsm", "--out", str(tmp_path / "other")])
    assert not list((tmp_path / "other").rglob("minimal_norm.png"))
    assert "nearest" not in capsys.readouterr().out.split("fgsm:")[-1]


def test_a_curve_is_drawn_of_whatever_was_found(tmp_path):
    for k, values in enumerate(([0.1, 0.2, math.inf], [math.inf, math.inf], [0.0, 0.0])):
        path = tmp_path / f"{k}.png"
        curve.plot(path, {"fmn": torch.tensor(values, dtype=torch.float64)}, 0.1, "l2")
        assert os.stat(path).st_size > 1000
