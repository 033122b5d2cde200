"""Bars for what takes long, and hashes of tensors that are larger than memory."""

import hashlib
import time

import numpy as np
import pytest
import torch
from small_runs import config

from fastadv.evaluate.__main__ import digest
from fastadv.evaluate.__main__ import main as evaluate_main
from fastadv.evaluate.record import open_examples
from fastadv.runs import parallel, progress
from fastadv.runs.progress import bar, pieces
from fastadv.teacher_cache.identity import _digest
from fastadv.train import train

TENSORS = {
    "images": torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5),
    "number": torch.tensor(2.5),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "empty": torch.empty(0, 3),
    "whole": torch.arange(6),
}
OTHERS = {
    "bfloat16": torch.arange(40).bfloat16().reshape(20, 2),
    "channels last": TENSORS["images"].to(memory_format=torch.channels_last),
    "expanded": torch.arange(3).expand(7, 3),
    "one row": torch.arange(100)[None],
    "empty rows": torch.empty(3, 0),
    "parameter": torch.nn.Parameter(torch.arange(9.0)),
    "every second": torch.arange(90)[::2],
    "bool": torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("piece", [1, 16, 50, progress.PIECE])
def test_hashes_stay_what_they_are(monkeypatch, piece):
    """Caches and evaluations on the disk are found by them."""
    monkeypatch.setattr(progress, "PIECE", piece)
    known = "0b8aaf499ec4fa3f7b5ecf1d8eaa94acef2157e28e474d31c0b86cc52637a8c1"
    assert _digest(zip("abcde", TENSORS.values(), strict=True)) == known
    assert digest(TENSORS.values()) == "19a918d5dac3b9f4"


@pytest.mark.parametrize("piece", [1, 16, 50, progress.PIECE])
@pytest.mark.parametrize("name", TENSORS | OTHERS)
def test_pieces_are_all_bytes_in_order(monkeypatch, name, piece):
    monkeypatch.setattr(progress, "PIECE", piece)
    tensor = (TENSORS | OTHERS)[name]
    whole = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    total = hashlib.sha256()
    for one in pieces(tensor):
        total.update(one)
    assert total.digest() == hashlib.sha256(whole.tobytes()).digest()


def test_a_large_tensor_is_not_copied(tmp_path, monkeypatch):
    """Images that are mapped from a file are hashed in place, others in parts."""
    monkeypatch.setattr(progress, "PIECE", 1000)
    np.arange(9600, dtype=np.uint8).tofile(tmp_path / "images")
    mapped = np.memmap(tmp_path / "images", np.uint8, "c", shape=(100, 96))
    images = torch.from_numpy(mapped)
    found = list(pieces(images))
    assert [len(one) for one in found] == [960] * 10
    assert all(np.shares_memory(one, mapped) for one in found)
    turned = list(pieces(images.reshape(100, 8, 12).transpose(1, 2)))
    assert [len(one) for one in turned] == [960] * 10


def test_a_bar_is_for_those_who_wait(monkeypatch, terminal):
    assert list(bar(range(3), "long")) == [0, 1, 2]
    shown = terminal.getvalue()
    assert "long:   0%" in shown
    assert shown.endswith(" \r")  # nothing is left of it
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    assert list(bar(range(3), "elsewhere")) == [0, 1, 2]
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    monkeypatch.setattr(terminal, "isatty", lambda: False, raising=False)
    assert list(bar(range(3), "unwatched")) == [0, 1, 2]
    assert terminal.getvalue() == shown


def test_short_work_has_none(monkeypatch, terminal):
    monkeypatch.setattr(progress, "DELAY", 0.3)
    assert list(bar(range(3), "quick")) == [0, 1, 2]
    with bar(text="quick", total=3) as shown:
        shown.update(3)
    assert terminal.getvalue() == ""
    for _ in bar(range(2), "slow"):
        time.sleep(0.4)
    assert "slow: " in terminal.getvalue()


def test_validation_within_training_has_bars(npz, tmp_path, terminal, capsys):
    train(config(npz, tmp_path / "run", epochs=1))
    assert "clean:   0%" in terminal.getvalue()
    assert "pgd20:   0%" in terminal.getvalue()
    assert "right" not in capsys.readouterr().out  # the lines of an evaluation


def test_each_attack_of_an_evaluation_has_a_bar_at_once(teacher, monkeypatch, terminal):
    """A batch may take minutes, for which a delayed bar would wait."""
    monkeypatch.setattr(progress, "DELAY", 1000)
    evaluate_main(["--checkpoint", str(teacher), "--attacks", "fgsm,aa", "--limit", "4"])
    for name in ("clean", "fgsm", "aa:apgd-ce", "aa:square"):
        assert f"{name}: " in terminal.getvalue()


def test_hashes_and_examples_have_bars(tmp_path, terminal):
    list(pieces(TENSORS["images"]))
    assert "hash:   0%|          | 0.00/120 " in terminal.getvalue()
    open_examples(tmp_path / "x.npy", TENSORS["images"], begun=False)
    assert "examples:   0%" in terminal.getvalue()
