"""What is reported of a record: the unit of eps, and rates over stages."""

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
