"""benchmarks/study.py: all networks of a preset, and going on from the rows that there are."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from fastadv import data
from fastadv.data.dataset import Dataset, image_set

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The command with a preset of seconds, on random images, whose rows go to tmp_path."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("study")
    small = {"student": "digits_net", "student_width": 2, "epochs": 1, "steps": 1, "lr": 0.1}
    small |= {"weight_decay": 0.0, "milestones": (), "batch_size": 16}
    preset = {"train": 40, "teachers": small, "students": small, "seeds": (0, 1), "device": "cpu"}
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (80, 3, 8, 8), dtype=np.uint8)
    part = image_set(images, np.arange(80) % 4)
    cifar = Dataset("cifar10", 4, 1, 1, part, part, part)
    monkeypatch.setitem(data.READERS, "cifar10", lambda *_: cifar)
    monkeypatch.setattr(module, "PRESETS", {"cpu": preset})
    monkeypatch.setattr(module, "IMAGES", 12)
    monkeypatch.setattr(module, "ATTACKS", ("clean", "pgd20", "quick"))
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "replace_between", lambda *_: None)
    monkeypatch.setattr(module, "PLOT", tmp_path / "study.png")
    yield module
    sys.modules.pop("study")


def run(study, tmp_path, only):
    study.main(
        [
            "--preset",
            "cpu",
            "--data-dir",
            str(tmp_path),
            "--out",
            f"{tmp_path}/runs",
            "--only",
            only,
        ]
    )
    return study.results()


def test_it_goes_on_and_puts_equal_rows_together(study, tmp_path, capsys):
    rows = run(study, tmp_path, "at")
    names = ["teacher (trades)", "clean_teacher (natural)", "at", "at"]
    assert [row["method"] for row in rows] == names
    assert all(row["quick"] <= row["clean"] for row in rows)
    again = run(study, tmp_path, "at,vfd+trades")
    assert again[:4] == rows
    assert [row["method"] for row in again[4:]] == ["vfd+trades"] * 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| vfd+trades | 2 |") for line in lines)
    assert (tmp_path / "study-cpu.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "study.jsonl").write_text(
        (tmp_path / "study.jsonl").read_text().replace(again[-1]["teachers"], "others", 1)
    )
    assert len(study.newest("cpu")["at"]) == 1  # the other is of other teachers


def test_the_published_table_is_that_of_the_rows(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    study = importlib.import_module("study")
    page = study.PAGE.read_text()
    for preset in study.PRESETS:
        start, end = study.marks(preset)
        shown = page.split(start)[1].split(end)[0].strip()
        lines = study.table(preset)
        assert shown.startswith("\n".join(lines)) if len(lines) > 2 else not shown
