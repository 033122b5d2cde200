"""Training by two processes on the CPU: the same as by one, one record, and a quick end. Two nodes
are two `torchrun` here."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastadv import UsageError, evaluate
from fastadv.runs import checkpoint, log, parallel
from fastadv.runs.config import Config
from fastadv.train import train
from fastadv.train.__main__ import main
from fastadv.train.cli import parse

JOB = Path(__file__).with_name("parallel_job.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SETTINGS = {
    "data": "npz",
    "student": "digits_net",
    "student_width": 3,  # the network without BatchNorm of parallel_job.py
    "eps": 0.1,
    "steps": 2,
    "epochs": 2,
    "batch_size": 32,
    "lr": 0.05,
    "milestones": (1,),
}
# What two processes must agree on: attack starts, AWP's move, averages, clipping, a projector,
# the weights and temperatures of methods, BatchNorm.
EQUAL = {
    "at": {"method": "at", "awp_gamma": 0.01, "ema": 0.9, "clip_grad": 0.5},
    "mtard": {"method": "mtard", "lr": 0.5},
    "bmtard": {"method": "bmtard", "lr": 0.5, "swa_start": 1},
    "absld": {"method": "absld", "lr": 0.5},
    "vfd": {"method": "vfd+rslad", "mixup": 0.8},
}
BATCHNORM = {"method": "iad1", "student_width": 4, "ema": 0.9, "batch_size": 30}


def start(*line, cwd=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, line)]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=cwd)


def end(process):
    """(exit status, stdout, stderr); the process does not outlive a test that it hangs."""
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes then
        out, err = process.communicate(timeout=60)
        raise AssertionError(f"timeout: {err}") from None
    return process.returncode, out, err


def succeed(process):
    status, out, err = end(process)
    assert status == 0, err
    return out


@pytest.fixture(scope="module")
def teacher(npz, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    settings = SETTINGS | {"student_width": 8, "data_dir": str(npz), "out": str(out)}
    train(Config(method="at", teacher_cache="off", **settings))
    return str(out / "best.safetensors")


@pytest.fixture(scope="module")
def odd(npz, tmp_path_factory):
    """The images of `npz` but for some: 131 remain to train on, 14 to validate."""
    path = tmp_path_factory.mktemp("odd") / "odd.npz"
    with np.load(npz) as file:
        np.savez(path, **{k: v[:145] if k.startswith("train") else v for k, v in file.items()})
    return str(path)


def jobs(folder, npz, teacher, runs):
    """The file that lists `runs`, {name: settings}; all methods but at have both teachers."""
    entries = []
    common = SETTINGS | {"data_dir": str(npz), "teacher_cache": str(folder / "cache")}
    for name, settings in runs.items():
        given = common | {"out": str(folder / name)} | settings
        fault = given.pop("fault", None)
        if given["method"] != "at":
            given["teacher_checkpoint"] = teacher
        if given["method"] in ("mtard", "bmtard", "vfd+rslad"):
            given["clean_teacher_checkpoint"] = teacher
        entries.append({"config": given, "fault": fault})
    (folder / "jobs.json").write_text(json.dumps(entries))
    return folder / "jobs.json"


@pytest.fixture(scope="module")
def folders(npz, odd, teacher, tmp_path_factory):
    """Those with the runs by one process and by two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    others = {"whole": BATCHNORM | {"data_dir": odd}, "nan": {"method": "at", "fault": "nan"}}
    processes = [
        start(JOB, jobs(one, npz, teacher, EQUAL)),
        start(*TORCHRUN, JOB, jobs(two, npz, teacher, EQUAL | others)),
    ]
    for process in processes:
        succeed(process)
    return one, two


def held(folder, name, rank):
    return checkpoint.load(folder / f"{name}.rank{rank}.safetensors")[0]


def same_in_both(folder, name):
    first, second = held(folder, name, 0), held(folder, name, 1)
    assert first.keys() == second.keys()
    return all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_train_as_one_does(folders, name):
    one, two = folders
    assert same_in_both(two, name)
    expected, got = held(one, name, 0), held(two, name, 0)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)
    rows = [log.read(folder / name / "metrics.jsonl") for folder in folders]
    for a, b in zip(*rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert (b["clean_acc"], b["robust_acc"]) == (a["clean_acc"], a["robust_acc"])
        assert b.get("teacher_cached") == a.get("teacher_cached")
        assert b["bad_gradients"] == 3 * a["bad_gradients"] == 3 * 5  # 1 and 2 in each of 5 steps


def test_batchnorm_statistics_and_averages_are_the_same_in_both(folders):
    _, two = folders
    assert same_in_both(two, "whole")
    names = {path.name for path in (two / "whole").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "best.safetensors", "last.safetensors"}
    model, _ = evaluate.from_run(two / "whole/last.safetensors")
    average = {k: v for k, v in held(two, "whole", 1).items() if k.startswith("2.module.")}
    state = model.state_dict()
    assert average.keys() == {f"2.module.{k}" for k in state}
    assert all(torch.equal(average[f"2.module.{k}"], state[k]) for k in state)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_train_as_two_processes_of_one_do(folders, npz, odd, teacher, tmp_path):
    _, expected = folders
    runs = {"at": EQUAL["at"], "whole": BATCHNORM | {"data_dir": odd}}
    job = jobs(tmp_path, npz, teacher, runs)
    first = f"--master-addr 127.0.0.1 --master-port {free_port()}".split()
    node = ("-m", "torch.distributed.run", *first, "--nnodes", "2", "--nproc-per-node", "1")
    for process in [start(*node, "--node-rank", rank, JOB, job) for rank in (0, 1)]:
        succeed(process)
    for name in runs:
        assert same_in_both(tmp_path, name)
        for key, value in held(expected, name, 0).items():
            torch.testing.assert_close(held(tmp_path, name, 0)[key], value, rtol=1e-5, atol=1e-6)
        one, two = (log.read(folder / name / "metrics.jsonl") for folder in (expected, tmp_path))
        for a, b in zip(one, two, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)


def test_divergence_in_one_is_an_error_in_both(folders):
    _, two = folders
    errors = {path.read_text() for path in two.glob("nan.rank*.error")}
    assert errors == {"loss is nan in epoch 1: training diverged; lower lr"}
    assert len(list(two.glob("nan.rank*.error"))) == 2


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_killed_process_ends_the_job_which_resumes_bit_for_bit(folders, odd, teacher, tmp_path):
    settings = BATCHNORM | {"data_dir": odd, "fault": "kill"}
    begin = time.monotonic()
    status, _, err = end(start(*TORCHRUN, JOB, jobs(tmp_path, odd, teacher, {"cut": settings})))
    assert time.monotonic() - begin < 60
    assert status != 0
    assert "SIGKILL" in err
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    assert all(map(gone, pids))
    assert [row["epoch"] for row in log.read(tmp_path / "cut/metrics.jsonl")] == [0]

    alone = shutil.copytree(tmp_path / "cut", tmp_path / "alone")
    command = (*TORCHRUN, "-m", "fastadv.train", "--resume", "cut")
    out = succeed(start(*command, cwd=tmp_path)).splitlines()
    assert out[-2].startswith("cut epoch 2/2")
    assert out[-1] == "run folder: cut"
    whole, cut = (folders[1] / "whole", tmp_path / "cut")
    for name in ("last.safetensors", "best.safetensors"):
        (a, _), (b, _) = checkpoint.load(whole / name), checkpoint.load(cut / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    rows = train(*parse(["--resume", str(alone)]))  # any number of processes goes on
    assert [row["epoch"] for row in rows] == [0, 1]


@pytest.mark.slow
def test_a_fresh_folder_is_one_for_all(npz, tmp_path):
    line = "-m fastadv.train --method natural --data npz --student digits_net --student-width 4"
    line = [*line.split(), "--epochs", "1", "--batch-size", "32", "--data-dir", npz]
    out = succeed(start(*TORCHRUN, *line, cwd=tmp_path)).splitlines()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["natural-npz"]
    assert out[1:] == ["run folder: runs/natural-npz"]
    names = {path.name for path in (tmp_path / "runs/natural-npz").iterdir()}
    files = {"config.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "curves.png"}
    assert names == files
    again = start(*TORCHRUN, *line, "--out", "runs/natural-npz", cwd=tmp_path)
    status, _, err = end(again)
    assert status != 0
    assert "error: out is runs/natural-npz, which holds a run" in err


def test_what_several_processes_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    parallel.check_device("cpu")
    parallel.check_device("cuda")
    for name, rank in (("cuda:0", "0"), ("cuda", "1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(ValueError, match=f"device is '{name}', must be cpu, or cuda with"):
            parallel.check_device(name)
    with pytest.raises(ValueError, match="the demo runs in one process, not 2: give flags"):
        main([])


def test_processes_that_share_no_folder_do_not_go_on(npz, tmp_path, monkeypatch):
    """Each would go on from what its own machine has, and gradients would be of two networks."""
    settings = SETTINGS | {"method": "at", "data_dir": str(npz), "out": str(tmp_path / "run")}
    train(Config(**settings))
    other = torch.tensor([1, 0])  # of the process that is one epoch behind
    monkeypatch.setattr(parallel, "least", lambda mine: torch.minimum(mine, mine.sign() * other))
    with pytest.raises(UsageError, match="ends at step 0 of epoch 3 here .* must share the run"):
        train(Config(**settings | {"epochs": 3}), resume=True)


def test_means_reach_tensors_of_any_strides_and_dtype(monkeypatch):
    added = torch.arange(28) / 7
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda tensor: tensor.add_(added))
    whole = torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    tensors = [whole, torch.ones(()), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(0)]
    parallel.mean_(tensors)
    assert torch.equal(whole, added[:24].view(2, 3, 2, 2) / 2)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(tensors[1], (1 + added[24]) / 2)
    assert torch.equal(tensors[2], (added[25:] / 2).bfloat16())
