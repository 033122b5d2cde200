"""A run that torchrun starts again by itself after a process has died."""

import subprocess
import sys

import pytest
import torch

from fastadv.errors import UsageError
from fastadv.runs import checkpoint, parallel
from fastadv.train.__main__ import restarted
from fastadv.train.cli import parse

# Kills the process of this number, such as 1 of "dies1", at its seventh update, in the middle of
# the second epoch, unless restarted.
JOB = """
import os, signal, sys, torch
from fastadv.train.__main__ import main
step, count = torch.optim.SGD.step, 0

def dies(self, *args, **kwargs):
    global count
    count += 1
    rank, restarts = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    if (count, f"dies{rank}", restarts) == (7, name, "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

name, torch.optim.SGD.step = sys.argv.pop(1), dies
main(sys.argv[1:])
"""
FLAGS = "--method at --data npz --student digits_net --student-width 4 --eps 0.1 --steps 2 "
FLAGS += "--epochs 3 --milestones 2 --batch-size 32 --lr 0.05 --save-every 0.00001"


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    return monkeypatch


def test_a_restart_goes_on_with_its_own_run_alone(npz, tmp_path, environment):
    line = [*FLAGS.split(), "--data-dir", str(npz), "--out", str(tmp_path / "run")]
    config, resume = parse(line)
    assert not resume
    assert not restarted(config)  # died before it had a folder
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(config.to_json())
    assert restarted(config)
    assert restarted(parse([*line, "--teacher-cache", "off"])[0])  # a place, which may be another
    assert not restarted(parse([*line, "--lr", "0.1"])[0])  # another run, which train refuses
    environment.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not restarted(config)


def test_a_restart_must_find_the_folder(npz, environment):
    with pytest.raises(UsageError, match="^--out is missing, must be given with --max-restarts"):
        parse([*FLAGS.split(), "--data-dir", str(npz)])


def test_a_restart_sees_no_keys_of_the_start_before(environment):
    kept, seen = torch.distributed.HashStore(), []  # as torchrun keeps its store
    environment.setenv("WORLD_SIZE", "2")
    environment.setattr(parallel.dist, "rendezvous", lambda *_, **__: iter([(kept, 0, 2)]))
    environment.setattr(parallel.dist, "destroy_process_group", lambda: None)
    environment.setattr(
        parallel.dist, "init_process_group", lambda *_, store, **__: seen.append(store.add("k", 1))
    )
    for count in "011":
        environment.setenv("TORCHELASTIC_RESTART_COUNT", count)
        with parallel.group():
            pass
    assert seen == [1, 1, 2]


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_ends_bit_for_bit(npz, tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    launch += ["--nproc-per-node", "2", "job.py"]
    errors = {}
    for name in ("dies0", "dies1", "lives"):
        line = [*launch, name, *FLAGS.split(), "--data-dir", str(npz), "--out", name]
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr
        errors[name] = done.stderr
    expected, _ = checkpoint.load(tmp_path / "lives/last.safetensors")
    assert "exitcode" not in errors.pop("lives")
    for name, error in errors.items():
        assert "exitcode: -9" in error
        found, _ = checkpoint.load(tmp_path / name / "last.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
