"""An evaluation that processes share out: the same as by one."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastadv import evaluate
from fastadv.attacks.suite import stages
from fastadv.data.dataset import ImageSet
from fastadv.evaluate.__main__ import main
from fastadv.evaluate.record import UNKNOWN, Cost
from fastadv.evaluate.shares import Shares
from fastadv.runs import checkpoint, parallel

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def second_of_two(monkeypatch):
    """This process as the second of two, whose other has found all zeros."""
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "total", lambda tensor: tensor.clone())
    monkeypatch.setattr(parallel, "least", lambda tensor: tensor.clone())


def test_a_batch_is_taken_apart_and_put_together(second_of_two):
    shares, alone = Shares(True), Shares(False)
    assert alone.of(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert shares.of(torch.arange(5)).tolist() == [1, 3]
    assert shares.of(torch.arange(1)).tolist() == []
    found = shares.together(torch.tensor([[7.0], [9.0]]), 5)
    assert found.tolist() == [[0], [7], [0], [9], [0]]
    assert alone.together(found, 5) is found
    known = torch.tensor([2, 1], dtype=torch.uint8)
    shares.begun(known)
    assert known.tolist() == [UNKNOWN, UNKNOWN]  # its own file does not count
    cost = Cost(images=2, seconds=0.25, forwards=7, largest=0.5)
    assert shares.cost(cost) == cost


def test_all_know_what_the_first_had_found(second_of_two, monkeypatch):
    """Verdicts, classes and confidences of its file; then nothing is left to do."""
    of_first = [torch.ones(4, dtype=torch.uint8), torch.full((4,), 3), torch.full((4,), 0.5)]

    def total(tensor):
        return tensor + of_first.pop(0) if of_first else tensor.clone()

    monkeypatch.setattr(parallel, "total", total)
    split = ImageSet(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    record = evaluate.run(model, split, stages("clean,fgsm", 0.1)[:1], shared=True)
    assert record.right("clean").all()
    predicted, confidence = record.outputs("clean")
    assert predicted.tolist() == [3] * 4
    assert confidence.tolist() == [0.5] * 4
    assert record.costs["clean"].images == 0


@pytest.mark.parametrize("further", ["", pytest.param(",corruptions", marks=pytest.mark.slow)])
def test_two_processes_find_what_one_does(npz, teacher, tmp_path, capsys, further):
    attacks = f"pgd20,apgd-ce-20,fmn{further}"
    common = f"--checkpoint {teacher} --attacks {attacks} --batch-size 11 --limit 37"
    common = [*common.split(), "--save-adversarial", "--out"]
    main([*common, str(tmp_path / "one")])
    capsys.readouterr()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (state,) = (tmp_path / "two").glob("*/state.safetensors")
    tensors, metadata = checkpoint.load(state)
    expected = {name: values.clone() for name, values in tensors.items()}
    assert all(len(expected[name].unique()) == 2 for name in ("clean", "pgd20", "apgd-ce-20"))
    assert len(expected["fmn/distance"].unique()) > 10
    for name, values in tensors.items():  # as a killed evaluation would have left it
        stage, _, output = name.partition("/")
        known = {"clean": 37, "pgd20": 15, "fmn": 20, "corruptions:fog-3": 20}.get(stage, 0)
        values[known:] = -1 if output == "predicted" else UNKNOWN
    checkpoint.save(state, tensors, metadata)
    line = [sys.executable, *TORCHRUN, "-m", "fastadv.evaluate", *common, str(tmp_path / "two")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images, drawn") == 1  # one process prints
    found, _ = checkpoint.load(state)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    reports, examples = [], []
    for out in ("one", "two"):
        (report,) = (tmp_path / out).glob("*/report.json")
        reports.append(json.loads(report.read_text()))
        examples.append(np.load(report.with_name("adversarial.npy")))
    assert np.array_equal(*examples)
    assert os.listdir(tmp_path / "one") == os.listdir(tmp_path / "two")
    assert reports[0].keys() == reports[1].keys()
