"""benchmarks/equivalence.py: what makes a pair, and the statistics of its verdict."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import equivalence

from fastadv import data
from fastadv.evaluate import accuracies
from fastadv.runs.config import Config
from fastadv.train import train

TINY = {"data": "npz", "student": "digits_net", "student_width": 4, "eps": 0.1}
TINY |= {"batch_size": 16, "epochs": 3, "milestones": (2,), "eval_every": 3}
STUDENT = {"method": "rslad", "lr": 1.0, "steps": 2, "ema": 0.5}


@pytest.fixture(scope="module")
def fields(npz, tmp_path_factory):
    """Fields of a student's Config, a teacher's checkpoint among them."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    train(Config(**TINY, data_dir=str(npz), method="at", steps=2, lr=0.05, out=str(out)))
    checkpoint = str(out / "best.safetensors")
    return TINY | STUDENT | {"data_dir": str(npz), "teacher_checkpoint": checkpoint}


def gap(a, b):
    """The largest difference between two models' parameters and statistics."""
    tensors = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((u.double() - v.double()).abs().max()) for u, v in tensors)


@pytest.mark.parametrize("method", ["rslad", "at"])
@pytest.mark.parametrize(("steps", "rounding"), [(0, 1e-5), (2, 1e-3)])
def test_the_arms_differ_in_precision_alone(fields, tmp_path, steps, rounding, method):
    """In fp32 and without the cache's half precision the engine repeats the plain loop: without
    steps from the same starts, with them up to a few flipped signs."""
    dataset = data.load(fields["data"], fields["data_dir"])
    fields = fields | {"steps": steps, "epochs": 1}
    if method == "at":
        fields |= {"method": "at", "lr": 0.1, "teacher_checkpoint": None}
    ours = {"teacher_cache": "off", "out": str(tmp_path / "engine")}
    twin = equivalence.engine(Config(**fields | ours, seed=3), dataset)
    same, other = (equivalence.plain(Config(**fields, seed=seed), dataset) for seed in (3, 4))
    assert gap(same, twin) < rounding
    assert gap(same, other) > 0.1


def test_the_plain_arm_has_torchs_batchnorm(fields, monkeypatch):
    dataset = data.load(fields["data"], fields["data_dir"])
    monkeypatch.setattr(sys.modules["fastadv.ops.batch_norm"], "_batch_norm", None)
    equivalence.plain(Config(**fields | {"steps": 0, "epochs": 1}), dataset)


def test_the_judge_is_the_evaluation(fields):
    """Plain PGD-20 against fastadv.evaluate's on the same network; the starts are others."""
    config = Config(**fields)
    dataset = data.load(config.data, config.data_dir)
    split = equivalence.held_out(dataset)
    assert len(split) == len(dataset.val) + len(dataset.test)
    model = equivalence.plain(config, dataset)
    theirs = accuracies(model, split, equivalence.ATTACKS, eps=config.eps)
    for attack, steps in equivalence.ATTACKS.items():
        ours = equivalence.accuracy(model, split, config, steps)
        assert ours == pytest.approx(theirs[attack], abs=0.05 if steps else 0), attack
    assert theirs["pgd20"] < theirs["clean"] - 0.1


@pytest.mark.slow
def test_pairs_and_their_table(fields, tmp_path):
    teacher = TINY | {"method": "at", "steps": 1, "data_dir": fields["data_dir"]}
    student = {k: v for k, v in fields.items() if k != "teacher_checkpoint"}
    rows = [
        {"data": "digits"} | row for row in equivalence.pairs(teacher, student, (0, 1), tmp_path)
    ]
    runs = [(row["arm"], row["seed"]) for row in rows]
    assert runs == [("plain", 0), ("engine", 0), ("plain", 1), ("engine", 1)]
    assert all(0 <= row["pgd20"] <= row["clean"] <= 1 for row in rows)
    results = tmp_path / "equivalence.jsonl"
    outdated = rows[0] | {"clean": -1.0}
    results.write_text("".join(json.dumps(row) + "\n" for row in (outdated, *rows)))
    lines = equivalence.table("digits", equivalence.newest(results)["digits"])
    assert sum(line.startswith("| digits | clean |") for line in lines) == 3
    assert lines[2].split(" | ")[3] == f"{100 * rows[0]['clean']:.2f}"
    assert lines[-1].startswith("digits pgd20, 2 pairs: mean difference")


def test_the_interval_is_students():
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), t of 2 degrees of freedom 4.303."""
    mean, half = equivalence.interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2)
    assert half == pytest.approx(4.302653 / 3**0.5)
    assert equivalence.interval([1.0]) == (1, float("inf"))


def test_the_verdict_asks_for_the_whole_interval():
    assert "-0.20 to +1.40, inside +-1.5" in equivalence.verdict(0.6, 0.8)
    assert "not inside" in equivalence.verdict(0.6, 1.0)
    assert "not inside" in equivalence.verdict(-0.6, 1.0)
    assert "not inside" in equivalence.verdict(0.0, float("inf"))
