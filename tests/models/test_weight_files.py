"""Weight files: the names that weights go by, what they lie in, and files that are refused."""

import pickle
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file
from small_weights import WEIGHTS, read, same
from stand_ins import Dropper

from fastadv.models import weight_files
from fastadv.runs import checkpoint


def test_an_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pt"):
        read(tmp_path / "gone.pt")


def test_only_the_model_of_a_checkpoint_is_taken(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {f"model.{k}": v for k, v in WEIGHTS.items()}
    checkpoint.save(path, tensors | {"optimizer.0": torch.zeros(2)}, {})
    assert same(read(path))
    checkpoint.save(path, {"optimizer.0": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="no model weights"):
        read(path)


def test_plain_safetensors(tmp_path):
    save_file({f"module.{k}": v for k, v in WEIGHTS.items()}, tmp_path / "a.safetensors")
    assert same(read(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("suffix", ["pt", "pth", "pth.tar"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, suffix, zipped):
    path = tmp_path / f"a.{suffix}"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    assert same(read(path))


@pytest.mark.parametrize("box", weight_files.CONTAINERS)
def test_containers_are_opened(tmp_path, box):
    optimizer = {"state": {0: torch.zeros(3)}}
    torch.save({"epoch": 9, "optimizer": optimizer, box: WEIGHTS}, tmp_path / "a.pt")
    assert same(read(tmp_path / "a.pt"))
    torch.save({"model": {box: WEIGHTS}}, tmp_path / "nested.pt")
    assert same(read(tmp_path / "nested.pt"))


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
    found = read(tmp_path / "a.pt")
    assert list(found) == expected
    assert [int(value) for value in found.values()] == [0, 1]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("copy", ["attacker.model.a", "ema.a", "model_ema.a", "ema_model.module.a"])
def test_copies_of_the_network_beside_it_go(tmp_path, prefix, copy):
    """Also where they would be the ones that fit."""
    outer = prefix.removesuffix("module.")
    weights = {f"{outer}{copy}": torch.zeros(1), f"{prefix}a": torch.ones(1)}
    torch.save(weights | {f"{outer}n_averaged": torch.tensor(3)}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert {name: float(value) for name, value in found.items()} == {"a": 1.0}


def test_every_name_that_weights_may_go_by(tmp_path):
    torch.save({"module.model.a": torch.ones(1), "module.ema.a": torch.zeros(1)}, tmp_path / "a.pt")
    names = [list(form) for form in weight_files.read(tmp_path / "a.pt")]
    assert names == [["module.model.a", "module.ema.a"], ["model.a", "ema.a"], ["a"]]


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
def test_pickled_code_is_refused_and_not_run(tmp_path, writer):
    bait, path = tmp_path / "bait", tmp_path / "evil.pt"
    content = {"state_dict": WEIGHTS, "epoch": Dropper(bait)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Dropper(bait), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(ValueError, match=r"evil\.pt: refused: it holds pickled code") as caught:
        read(path)
    assert "weights_only" not in str(caught.value)  # torch's own text suggests running the code
    assert not bait.exists()


def test_refusal_names_the_class_it_found(tmp_path):
    torch.save({"net": WEIGHTS, "momentum": Fraction(9, 10)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"pickled code \(fractions\.Fraction\), not only tensors"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("length", [0, 1, 2, 10, 100, 600, -1])
def test_truncated_torch_files(tmp_path, zipped, length):
    path = tmp_path / "cut.pt"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cut\.pt: truncated"):
        read(path)


@pytest.mark.parametrize("content", [b"junk", b"junk\n", b"\n", bytes(range(256))])
def test_what_was_never_a_torch_file(tmp_path, content):
    (tmp_path / "junk.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"junk\.pt: truncated, damaged or not a ") as caught:
        read(tmp_path / "junk.pt")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("page", ["<!DOCTYPE html><html>Quota exceeded</html>", "\n <html></html>"])
def test_a_web_page_is_called_one(tmp_path, page):
    (tmp_path / "page.pt").write_text(page)
    with pytest.raises(ValueError, match=r"page\.pt: a web page"):
        read(tmp_path / "page.pt")


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [torch.zeros(1)], {"state_dict": {}}, 5])
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"none\.pt: no model weights"):
        read(tmp_path / "none.pt")


def test_a_container_that_holds_itself(tmp_path):
    loop = {}
    loop["state_dict"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    with pytest.raises(ValueError, match=r"loop\.pt: no model weights"):
        read(tmp_path / "loop.pt")


def test_an_entry_that_is_no_named_tensor(tmp_path):
    torch.save(WEIGHTS | {"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: entry 'epoch' is int"):
        read(tmp_path / "a.pt")
