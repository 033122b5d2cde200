"""The commands as a user runs them, in processes of their own: minutes long."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastadv import UsageError, demo
from fastadv.runs import checkpoint, log, parallel
from fastadv.train.__main__ import main

TRAIN = [sys.executable, "-m", "fastadv.train"]


@pytest.mark.parametrize("command", [main, demo.main])
def test_two_commands_run_it(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    folders = []
    monkeypatch.setattr(demo, "demo", folders.append)
    command([])
    assert folders == [Path("runs/digits")]
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(UsageError, match="the demo runs in one process, not 2: give flags"):
        command([])


@pytest.mark.parametrize(
    "wrong",
    [
        "--student resnet81",
        "--method rslat",
        "--set betta=1",
        "--method vfd+at --set layers=foo",
        "--cutout 99",
        "--eps 8",
        "--device gpu",
    ],
)
def test_no_teacher_is_trained_for_a_run_that_is_refused(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("a teacher is trained"))
    with pytest.raises(UsageError, match=wrong.split()[-1].partition("=")[0]):
        main(["--data", "digits", "--method", "rslad", *wrong.split()])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rslad --clean-teacher resnet18", "clean_teacher is given, but method rslad has no"),
        ("rslad --clean-teacher-checkpoint x.pt", "clean_teacher_checkpoint is given, but"),
        ("mtard --teacher resnet18", "teacher_checkpoint is missing"),
        ("mtard --teacher-checkpoint x.pt", "x.pt: no such file"),
        ("rslad --out taken", "out is taken, which holds a run: go on with it .--resume taken"),
    ],
)
def test_no_teacher_is_trained_beside_one_that_is_refused(tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("a teacher is trained"))
    Path("taken").mkdir()
    Path("taken/config.json").touch()
    with pytest.raises((UsageError, OSError), match=said):
        main(["--data", "digits", "--method", *line.split()])


@pytest.mark.slow
def test_demo_makes_students_robust(tmp_path):
    done = subprocess.run(TRAIN, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "run folder: runs/digits" in done.stdout
    report = json.loads((tmp_path / "runs/digits/report.json").read_text())
    rates = report["accuracy"]
    assert rates["natural teacher"]["clean"] > 0.95
    assert rates["natural teacher"]["pgd20"] < 0.1
    assert rates["PGD-AT teacher"]["pgd20"] > 0.5
    for label in demo.STUDENTS:
        assert rates[label]["clean"] > 0.6
        assert rates[label]["pgd20"] > 0.2
    assert all(line in done.stdout for line in report["comparisons"])
    assert (tmp_path / "runs/digits/tradeoff.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "said"), [(1.0, "better"), (-1.0, "worse"), (0.0, "no clear change")]
)
def test_a_comparison_is_paired_by_image(change, said):
    """25 of 500 images more, or fewer, are right under all attacks."""
    base = torch.zeros(3, 5, 500, dtype=torch.float64)
    base[:, :, :250] = 1
    ours = base.clone()
    ours[:, :, 240:265] = (change + 1) / 2 if change else ours[:, :, 240:265]
    line = demo.compare("RSLAD", ours, base)
    points = ours.mean().sub(base.mean()).item() * 100
    assert line.startswith(f"RSLAD         {points:+5.1f} +- ")
    assert f"  {said}  (by seed" in line


@pytest.mark.slow
def test_sigkill_and_resume_give_the_same_bits(tmp_path):
    settings = "--method trades --data digits --student digits_net --student-width 4 --eps 0.1"
    command = [*TRAIN, *settings.split(), "--epochs", "12", "--lr", "0.05", "--out"]
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True)
    cut = subprocess.Popen([*command, "cut"], cwd=tmp_path)
    while len(log.read(tmp_path / "cut/metrics.jsonl")) < 3:
        time.sleep(0.01)
    cut.send_signal(signal.SIGKILL)
    assert cut.wait() == -signal.SIGKILL
    assert len(log.read(tmp_path / "cut/metrics.jsonl")) < 12
    subprocess.run([*TRAIN, "--resume", "cut"], cwd=tmp_path, check=True)
    a, b = (checkpoint.load(tmp_path / run / "last.safetensors")[0] for run in ("whole", "cut"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_kills_within_epochs_change_no_bit(tmp_path):
    settings = "--method at --data digits --student-width 4 --epochs 30 --save-every 1e-3 --out"
    command = [*TRAIN, *settings.split()]
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True)
    cut, moments, within = subprocess.Popen([*command, "cut"], cwd=tmp_path), random.Random(0), 0
    for _ in range(20):
        while not (tmp_path / "cut/last.safetensors").exists():
            time.sleep(0.01)
        time.sleep(moments.uniform(4, 8))  # it takes about four seconds to start
        cut.kill()
        cut.wait()
        within += checkpoint.load(tmp_path / "cut/last.safetensors")[1]["step"] > 0
        cut = subprocess.Popen([*TRAIN, "--resume", "cut"], cwd=tmp_path)
    assert cut.wait() == 0
    assert within > 2
    a, b = (checkpoint.load(tmp_path / run / "last.safetensors")[0] for run in ("whole", "cut"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    drop = ("images_per_s", "teacher_cached")
    a, b = (
        [{k: v for k, v in row.items() if k not in drop} for row in log.read(path)]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "cut/metrics.jsonl")
    )
    assert a == b
