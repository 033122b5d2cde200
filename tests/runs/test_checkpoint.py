"""Checkpoints: exact round trips, survival of failed writes, and damage that is noticed."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastadv.errors import UsageError
from fastadv.models import weight_files
from fastadv.runs import checkpoint


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "conv1.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn1.num_batches_tracked": torch.tensor(7),
    }


def same(left, right):
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def test_round_trip_keeps_values_types_and_metadata(tmp_path):
    tensors = {
        "f": torch.tensor([0.1, -0.0, float("inf")]),
        "b": torch.randn(3).bfloat16(),
        "i": torch.tensor([-1, 2**40]),
        "flag": torch.tensor(True),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    metadata = {"epoch": 3, "recipe": {"eps": 8 / 255}, "name": "Züge", "best": None}
    checkpoint.save(tmp_path / "a.safetensors", tensors, metadata)
    loaded, read = checkpoint.load(tmp_path / "a.safetensors")
    assert same(loaded, tensors)
    assert read == metadata


def test_strided_and_shared_tensors(tmp_path):
    base = torch.arange(24.0).reshape(1, 2, 3, 4)
    tensors = {
        "channels_last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "whole": base,
        "view": base[:, 1],
        "transposed": base.transpose(1, 3),
        "expanded": torch.ones(1).expand(5),
    }
    checkpoint.save(tmp_path / "a.safetensors", tensors, {})
    loaded, _ = checkpoint.load(tmp_path / "a.safetensors")
    assert same(loaded, tensors)
    assert all(tensor.is_contiguous() for tensor in loaded.values())
    assert not tensors["channels_last"].is_contiguous()  # the caller's tensors keep their layout


def test_loaded_tensors_do_not_follow_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"a": torch.ones(100)}, {})
    loaded, _ = checkpoint.load(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded["a"], torch.ones(100))


def test_bytes_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def spy_fsync(descriptor):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def spy_replace(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        assert Path(source).read_text() == "new"
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    checkpoint.atomic_write(tmp_path / "config.json", "new")
    assert calls == ["file", "rename", "folder"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_file_alone(tmp_path, monkeypatch, weights, call):
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, weights, {"epoch": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"cannot write.*No space left.*last\.safetensors") as caught:
        checkpoint.save(path, {"a": torch.zeros(9)}, {"epoch": 2})
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["last.safetensors"]
    tensors, metadata = checkpoint.load(path)
    assert same(tensors, weights)
    assert metadata == {"epoch": 1}


def test_a_write_cut_short_by_the_kernel(tmp_path, weights):
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, weights, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"last\.safetensors"):
            checkpoint.save(path, {"a": torch.zeros(1_000_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["last.safetensors"]
    assert same(checkpoint.load(path)[0], weights)


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.atomic_write(tmp_path / "a", b"1")
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_stored_is_said_before_anything_is_written(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(TypeError):
        checkpoint.save(path, {}, {"loss": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"a\.safetensors.*complex"):
        checkpoint.save(path, {"a": torch.zeros(1, dtype=torch.complex128)}, {})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.save(tmp_path / "nowhere" / "a.safetensors", {}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("read", [checkpoint.load, weight_files.read])
@pytest.mark.parametrize("length", [0, 3, 8, 30, 200, -1])
def test_truncated_safetensors(tmp_path, weights, read, length):
    path = tmp_path / "cut.safetensors"
    checkpoint.save(path, {f"model.{k}": v for k, v in weights.items()}, {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cut\.safetensors: truncated"):
        read(path)


@pytest.mark.parametrize("read", [checkpoint.load, weight_files.read])
def test_one_flipped_bit_is_noticed(tmp_path, weights, read):
    path = tmp_path / "bit.safetensors"
    checkpoint.save(path, {f"model.{k}": v for k, v in weights.items()}, {"epoch": 1})
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bit\.safetensors: damaged"):
        read(path)


@pytest.mark.parametrize("read", [checkpoint.load, weight_files.read])
@pytest.mark.parametrize("change", [(rb"\"epoch\": 1", rb"\"epoch\": 2"), (b"model.a", b"model.b")])
def test_metadata_and_names_are_in_the_checksum(tmp_path, read, change):
    path = tmp_path / "bit.safetensors"
    checkpoint.save(path, {"model.a": torch.ones(2), "model.c": torch.ones(3)}, {"epoch": 1})
    before = path.read_bytes()
    assert before.count(change[0]) == 1
    path.write_bytes(before.replace(*change))
    with pytest.raises(ValueError, match=r"bit\.safetensors: damaged: the contents do not match"):
        read(path)


def test_absent_and_foreign_files(tmp_path):
    for read in (checkpoint.load, weight_files.read):
        with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
            read(tmp_path / "gone.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"plain\.safetensors: not a fastadv checkpoint"):
        checkpoint.load(tmp_path / "plain.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "3", '"text"', "null"])
def test_metadata_is_an_object(tmp_path, text):
    """Also where the checksum of a foreign file is right."""
    path, tensors = tmp_path / "w.safetensors", {"model.a": torch.zeros(2)}
    save_file(tensors, path, {"fastadv": text, "crc32": checkpoint._crc32(tensors, text)})
    for read in (checkpoint.load, weight_files.read):
        with pytest.raises(UsageError, match="w.safetensors: .*its 'fastadv' entry is no object"):
            read(path)
