"""What is reported of a record: the unit of eps, and rates over stages."""

import json

import pytest
import torch

from fastadv import evaluate
from fastadv.attacks.suite import stages
from fastadv.evaluate import Record, report, search


@pytest.mark.parametrize(
    ("eps", "norm", "text"),
    [
        (8 / 255, "linf", "8/255"),
        (0.031, "linf", "0.031"),
        (255 / 255, "linf", "255/255"),
        (0.3, "linf", "0.3"),
        (128 / 255, "l2", "0.501961"),
        (0.5, "l2", "0.5"),
    ],
)
def test_eps_is_said_in_the_unit_of_its_norm(eps, norm, text):
    assert report.fraction(eps, norm) == text


def record_of(broken):
    """Of four images; {stage: rows that it breaks}."""
    record = Record(4)
    for name, rows in broken.items():
        record.stage(name)[0][:] = 1
        record.stage(name)[0][rows] = 2
    return record


def test_the_worst_case_is_over_all_stages(monkeypatch):
    """Images that any stage breaks, whichever comes last."""
    suite = stages(["paper"], 0.1)
    broken = {"clean": [0], "fgsm": [0, 1], "pgd20": [0, 2], "pgd20_003": [0], "cw": [0]}
    record = record_of(broken)
    assert report.worst_case(record, suite).tolist() == [False, False, False, True]
    rates = report.rates(record, suite)
    assert (rates["clean"], rates["pgd20"], rates["worst case"]) == (0.75, 0.5, 0.25)
    monkeypatch.setattr(search, "run", lambda *args, **options: record)
    assert evaluate.correct(None, None, "paper", eps=0.1).tolist() == [False] * 3 + [True]
    assert evaluate.correct(None, None, "pgd20", eps=0.1).tolist() == [False, True, False, True]
    assert torch.equal(evaluate.correct(None, None, "clean", eps=0.1), record.right("clean"))


@pytest.mark.parametrize("count", [1, 40, 10_000])
def test_intervals_are_wilsons(count):
    from scipy.stats import binomtest

    for right in sorted({0, 1, count // 3, count}):
        expected = binomtest(right, count).proportion_ci(0.95, "wilson")
        found = report.interval(right / count, count)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-5)


def test_accuracies_have_intervals_and_classes():
    suite = stages(["clean", "fgsm"], 0.1)
    record = record_of({"clean": [0], "fgsm": [0, 1]})
    low, high = (100 * end for end in report.interval(0.5, 4))
    lines = report.describe(record, suite).splitlines()
    assert lines[0].split()[:4] == ["accuracy", "95", "%", "interval"]
    assert lines[2].split() == ["fgsm", "50.00%", f"{low:.2f}-{high:.2f}%", "0", "0.0", "0", "0"]
    assert lines[3].split() == ["worst", "case", "50.00%", f"{low:.2f}-{high:.2f}%"]
    settings = {"eps": 0.1, "norm": "linf"}
    text = report.as_json(record, suite, settings, [], torch.tensor([3, 0, 0, 0]))
    found = json.loads(text)
    assert found["attacks"]["fgsm"]["interval"] == [f"{low:.2f}", f"{high:.2f}"]
    assert found["by_class"]["clean"]["accuracy"] == {"0": "100.00", "3": "0.00"}
    assert found["by_class"]["clean"]["worst_class"] == 3
    assert found["by_class"]["worst case"]["accuracy"] == {"0": "66.67", "3": "0.00"}
    assert found["by_class"]["worst case"]["interval"] == [f"{low:.2f}", f"{high:.2f}"]
