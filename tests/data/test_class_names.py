"""A network knows its classes by number: wherever a checkpoint meets a data set, the names that
both have must be the same, in the same order."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from pictures import tree

from fastadv import data, models
from fastadv.data import Dataset, ImageSet
from fastadv.errors import UsageError
from fastadv.evaluate import check_names
from fastadv.evaluate.__main__ import main as evaluate_main
from fastadv.runs import Config, checkpoint
from fastadv.teacher_cache.__main__ import main as cache_main
from fastadv.train import train
from fastadv.train.__main__ import main

OTHERS = {  # classes of the folder: what is said of them
    ("cat", "wolf"): "class 1 of pets is 'wolf', must be 'dog' as in ",
    ("dog", "pony"): "class 0 of pets is 'dog', must be 'cat' as in ",
}


def config(root, out, **changed):
    settings = {
        "method": "at",
        "data": "folder",
        "data_dir": str(root),
        "image_size": 8,
        "student": "digits_net",
        "steps": 1,
        "epochs": 1,
        "batch_size": 8,
        "milestones": (),
        "teacher_cache": "memory",
        "out": str(out),
    }
    return Config(**(settings | changed))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on cats and dogs."""
    where = tmp_path_factory.mktemp("named")
    train(config(tree(where / "pets", per_class=8, size=8), where / "run"))
    return where / "run"


@pytest.fixture(params=OTHERS, ids=" ".join)
def other(request, tmp_path):
    """(a folder of other classes, what is said of it)"""
    root = tree(tmp_path / "pets", per_class=8, size=8, classes=request.param)
    return root, OTHERS[request.param]


def copied(run, tmp_path, **metadata):
    """The run, in whose checkpoints the header has other `metadata`."""
    made = shutil.copytree(run, tmp_path / "run")
    for path in made.glob("*.safetensors"):
        tensors, before = checkpoint.load(path)
        checkpoint.save(path, tensors, before | metadata)
    return made


def test_evaluation(run, other, monkeypatch):
    root, said = other
    monkeypatch.setattr(models.zoo, "OWN", {})
    monkeypatch.syspath_prepend(root.parent)
    (root.parent / "own_pets.py").write_text(
        "from fastadv import models\ndef net(): return models.get('digits_net', 2, 3)\n"
    )
    best, place = str(run / "best.safetensors"), ["--data-dir", str(root), "--image-size", "8"]
    place += ["--data", "folder", "--attacks"]
    network = ["--model", "digits_net"]
    own = ["--model-from", "own_pets:net"]
    for line in (
        ["clean", "--checkpoint", str(run)],
        ["clean", "--checkpoint", best],
        ["clean", "--checkpoint", best, *network],
        ["clean", "--checkpoint", best, *own],
        ["transfer-fgsm", *own, "--source", best],
        ["transfer-fgsm", *own, "--source", str(run)],
    ):
        with pytest.raises(UsageError, match=f"^{said}.*best.safetensors, which was trained on "):
            evaluate_main([*place, *line])


def test_the_same_names_are_evaluated(run, capsys):
    root = run.with_name("pets")
    line = ["--checkpoint", str(run), "--source", str(run), "--attacks", "transfer-fgsm"]
    evaluate_main([*line, "--data-dir", str(root)])
    assert "transfer-fgsm" in capsys.readouterr().out


def test_going_on(run, other, tmp_path):
    root, said = other
    before = copied(run, tmp_path)
    files = {path.name: path.read_bytes() for path in before.iterdir()}
    with pytest.raises(UsageError, match=f"^{said}.*last.safetensors, which was trained on "):
        main(["--resume", str(before), "--data-dir", str(root)])
    assert {path.name: path.read_bytes() for path in before.iterdir()} == files


@pytest.mark.parametrize("which", ["teacher", "clean_teacher"])
@pytest.mark.parametrize("network", ["digits_net", None])
def test_teaching(run, other, tmp_path, which, network):
    """With the teacher's network named or not; the other of two teachers has no names."""
    root, said = other
    models.export(models.get("digits_net", 2, 3), tmp_path / "elsewhere.pt")
    unnamed = {"teacher": "digits_net", "teacher_checkpoint": str(tmp_path / "elsewhere.pt")}
    unnamed |= {f"clean_{field}": value for field, value in unnamed.items()}
    fields = unnamed | {which: network, f"{which}_checkpoint": str(run / "best.safetensors")}
    with pytest.raises(UsageError, match=f"^{said}.*best.safetensors, which was trained on "):
        train(config(root, tmp_path / "taught", method="mtard", **fields))
    assert not (tmp_path / "taught").exists()
    train(config(root, tmp_path / "taught", method="mtard", **unnamed))


def test_filling_a_cache(run, other, tmp_path):
    root, said = other
    line = ["--teacher-checkpoint", str(run / "best.safetensors"), "--data", "folder"]
    line += ["--data-dir", str(root), "--image-size", "8"]
    with pytest.raises(UsageError, match=f"^{said}"):
        cache_main(["fill", str(tmp_path / "cache"), *line])


def test_the_same_names_teach(run, tmp_path):
    fields = {"method": "rslad", "teacher_checkpoint": str(run)}
    (row,) = train(config(run.with_name("pets"), tmp_path / "taught", **fields))
    assert row["loss"] > 0


@pytest.mark.parametrize("classes", [[], None, "before names were kept"])
def test_a_run_without_names_is_not_compared(run, other, tmp_path, classes):
    made = copied(run, tmp_path, classes=classes)
    if classes not in ([], None):
        path = made / "best.safetensors"
        tensors, metadata = checkpoint.load(path)
        del metadata["classes"]
        checkpoint.save(path, tensors, metadata)
    evaluate_main(["--checkpoint", str(made), "--data-dir", str(other[0]), "--attacks", "clean"])


def test_data_without_names_are_not_compared(run, tmp_path):
    labels, images = np.arange(20) % 2, np.zeros((20, 8, 8, 3), np.uint8)
    splits = {f"{split}_labels": labels for split in ("train", "test")}
    np.savez(tmp_path / "x.npz", train_images=images, test_images=images, **splits)
    line = ["--checkpoint", str(run), "--attacks", "clean", "--data", "npz", "--data-dir"]
    evaluate_main([*line, str(tmp_path / "x.npz")])


def test_the_first_class_that_differs_is_named(run, tmp_path):
    """And one too many or too few is one as well."""
    one = ImageSet(torch.zeros(1, 3, 8, 8).byte(), torch.zeros(1).long(), torch.zeros(1).long())
    made = Dataset("own", 2, 1, 1, one, one, one, ("cat", "dog"))
    check_names(run, made)
    for classes, said in {
        ("cat",): "class 1 of own is missing, must be 'dog' as in ",
        ("cat", "dog", "emu"): "class 2 of own is 'emu', must be left out as in ",
        ("emu", "fox"): "class 0 of own is 'emu', must be 'cat' as in ",
        ("dog", "cat"): "class 0 of own is 'dog', must be 'cat' as in ",
        ("cat", "Dog"): "class 1 of own is 'Dog', must be 'dog' as in ",
    }.items():
        with pytest.raises(UsageError, match=f"^{said}"):
            check_names(run, dataclasses.replace(made, classes=classes))
    for classes in (3, "cat", {"cat": 0}):
        wrong = copied(run, tmp_path / json.dumps(classes), classes=classes)
        with pytest.raises(UsageError, match="its header is not that of a run .classes is "):
            check_names(wrong, made)
    models.export(models.get("digits_net", 2, 3), tmp_path / "elsewhere.pt")
    check_names(tmp_path / "elsewhere.pt", made)
    checkpoint.save(tmp_path / "plain.safetensors", {"a": torch.zeros(1)}, {})
    check_names(tmp_path / "plain.safetensors", made)
    assert data.load("folder", run.with_name("pets"), image_size=8).classes == ("cat", "dog")
