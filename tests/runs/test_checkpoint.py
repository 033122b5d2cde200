"""Checkpoints: exact round trips, survival of failed writes, and files that are refused unread."""

import errno
import os
import pickle
import resource
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastadv.errors import UsageError
from fastadv.runs import checkpoint


class Dropper:
    """Pickles into a call that creates the file at `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


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


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.read_weights])
@pytest.mark.parametrize("length", [0, 3, 8, 30, 200, -1])
def test_truncated_safetensors(tmp_path, weights, read, length):
    path = tmp_path / "cut.safetensors"
    checkpoint.save(path, {f"model.{k}": v for k, v in weights.items()}, {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cut\.safetensors: truncated"):
        read(path)


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.read_weights])
def test_one_flipped_bit_is_noticed(tmp_path, weights, read):
    path = tmp_path / "bit.safetensors"
    checkpoint.save(path, {f"model.{k}": v for k, v in weights.items()}, {"epoch": 1})
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bit\.safetensors: damaged"):
        read(path)


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.read_weights])
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
    for read in (checkpoint.load, checkpoint.read_weights):
        with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
            read(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.pt"):
        checkpoint.read_weights(tmp_path / "gone.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"plain\.safetensors: not a fastadv checkpoint"):
        checkpoint.load(tmp_path / "plain.safetensors")


def test_read_weights_takes_only_the_model_of_a_checkpoint(tmp_path, weights):
    path = tmp_path / "a.safetensors"
    tensors = {f"model.{k}": v for k, v in weights.items()}
    checkpoint.save(path, tensors | {"optimizer.0": torch.zeros(2)}, {})
    assert same(checkpoint.read_weights(path), weights)
    checkpoint.save(path, {"optimizer.0": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="no model weights"):
        checkpoint.read_weights(path)


def test_read_weights_of_plain_safetensors(tmp_path, weights):
    save_file({f"module.{k}": v for k, v in weights.items()}, tmp_path / "a.safetensors")
    assert same(checkpoint.read_weights(tmp_path / "a.safetensors"), weights)


@pytest.mark.parametrize("suffix", ["pt", "pth", "pth.tar"])
@pytest.mark.parametrize("zipped", [True, False])
def test_read_weights_of_torch_files(tmp_path, weights, suffix, zipped):
    path = tmp_path / f"a.{suffix}"
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    assert same(checkpoint.read_weights(path), weights)


@pytest.mark.parametrize("box", checkpoint.CONTAINERS)
def test_containers_are_opened(tmp_path, weights, box):
    optimizer = {"state": {0: torch.zeros(3)}}
    torch.save({"epoch": 9, "optimizer": optimizer, box: weights}, tmp_path / "a.pt")
    assert same(checkpoint.read_weights(tmp_path / "a.pt"), weights)
    torch.save({"model": {box: weights}}, tmp_path / "nested.pt")
    assert same(checkpoint.read_weights(tmp_path / "nested.pt"), weights)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (["module.conv.weight", "module.fc.bias"], ["conv.weight", "fc.bias"]),
        (["module.model.a", "module.model.b"], ["a", "b"]),
        (["model.module.module.a", "model.module.module.b"], ["a", "b"]),
        (["module.a", "b"], ["module.a", "b"]),
        (["module.a", "model.b"], ["a", "b"]),
        (["module.a", "model.a"], ["module.a", "model.a"]),
        (["net.a", "net.b"], ["a", "b"]),
        (["module.model.a", "module.mu"], ["a", "mu"]),
        (["model.a", "normalize.mean"], ["a", "normalize.mean"]),
        (["mu", "sigma"], ["mu", "sigma"]),
        (["a.module.x", "b.model.y"], ["a.module.x", "b.model.y"]),
        (["module.submodule.a", "module.model.b"], ["submodule.a", "model.b"]),
        (["mymodule.a", "mymodule.b"], ["mymodule.a", "mymodule.b"]),
        (["modules.a", "model_b"], ["modules.a", "model_b"]),
        (["_orig_mod.a", "_orig_mod.b"], ["a", "b"]),
        (["model._orig_mod.module.a", "module.net.network.b"], ["a", "b"]),
        (["module.normalizer.new_mean", "module.model.a"], ["normalizer.new_mean", "a"]),
        (["0.mean", "1.a"], ["0.mean", "a"]),
        (["module.0.mean", "module.1.module.a"], ["0.mean", "a"]),
        (["0.weight", "1.a"], ["0.weight", "1.a"]),
        (["1.a", "1.b"], ["1.a", "1.b"]),
        (["0.mean", "2.a"], ["0.mean", "2.a"]),
        (["0.mean", "0.std"], ["0.mean", "0.std"]),
        (["ema.a", "model_ema.b"], ["ema.a", "model_ema.b"]),
    ],
)
def test_prefixes_go_only_where_all_keys_share_them(tmp_path, stored, expected):
    torch.save({name: torch.tensor(i) for i, name in enumerate(stored)}, tmp_path / "a.pt")
    read = checkpoint.read_weights(tmp_path / "a.pt")
    assert list(read) == expected
    assert [int(value) for value in read.values()] == [0, 1]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("copy", ["attacker.model.a", "ema.a", "model_ema.a", "ema_model.module.a"])
def test_copies_of_the_network_beside_it_go(tmp_path, prefix, copy):
    """Also where they would be the ones that fit."""
    outer = prefix.removesuffix("module.")
    weights = {f"{outer}{copy}": torch.zeros(1), f"{prefix}a": torch.ones(1)}
    torch.save(weights | {f"{outer}n_averaged": torch.tensor(3)}, tmp_path / "a.pt")
    read = checkpoint.read_weights(tmp_path / "a.pt")
    assert {name: float(value) for name, value in read.items()} == {"a": 1.0}


def test_every_name_that_weights_may_go_by(tmp_path):
    torch.save({"module.model.a": torch.ones(1), "module.ema.a": torch.zeros(1)}, tmp_path / "a.pt")
    names = [list(form) for form in checkpoint.read_forms(tmp_path / "a.pt")]
    assert names == [["module.model.a", "module.ema.a"], ["model.a", "ema.a"], ["a"]]


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
def test_pickled_code_is_refused_and_not_run(tmp_path, weights, writer):
    bait, path = tmp_path / "bait", tmp_path / "evil.pt"
    content = {"state_dict": weights, "epoch": Dropper(bait)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Dropper(bait), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(ValueError, match=r"evil\.pt: refused: it holds pickled code") as caught:
        checkpoint.read_weights(path)
    assert "weights_only" not in str(caught.value)  # torch's own text suggests running the code
    assert not bait.exists()


def test_refusal_names_the_class_it_found(tmp_path, weights):
    torch.save({"net": weights, "momentum": Fraction(9, 10)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"pickled code \(fractions\.Fraction\), not only tensors"):
        checkpoint.read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("length", [0, 1, 2, 10, 100, 600, -1])
def test_truncated_torch_files(tmp_path, weights, zipped, length):
    path = tmp_path / "cut.pt"
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cut\.pt: truncated"):
        checkpoint.read_weights(path)


@pytest.mark.parametrize("page", ["<!DOCTYPE html><html>Quota exceeded</html>", "\n <html></html>"])
def test_a_web_page_is_called_one(tmp_path, page):
    (tmp_path / "page.pt").write_text(page)
    with pytest.raises(ValueError, match=r"page\.pt: a web page"):
        checkpoint.read_weights(tmp_path / "page.pt")


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [torch.zeros(1)], {"state_dict": {}}, 5])
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"none\.pt: no model weights"):
        checkpoint.read_weights(tmp_path / "none.pt")


def test_a_container_that_holds_itself(tmp_path):
    loop = {}
    loop["state_dict"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    with pytest.raises(ValueError, match=r"loop\.pt: no model weights"):
        checkpoint.read_weights(tmp_path / "loop.pt")


def test_an_entry_that_is_no_named_tensor(tmp_path, weights):
    torch.save(weights | {"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: entry 'epoch' is int"):
        checkpoint.read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("text", ["{", "[]", "3", '"text"', "null"])
def test_metadata_is_an_object(tmp_path, text):
    """Also where the checksum of a foreign file is right."""
    path, tensors = tmp_path / "w.safetensors", {"model.a": torch.zeros(2)}
    save_file(tensors, path, {"fastadv": text, "crc32": checkpoint._crc32(tensors, text)})
    for read in (checkpoint.load, checkpoint.read_weights):
        with pytest.raises(UsageError, match="w.safetensors: .*its 'fastadv' entry is no object"):
            read(path)
