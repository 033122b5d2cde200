"""A run from another machine: evaluated, exported, taught from and gone on with on this one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import config

from fastadv import evaluate, export, models
from fastadv.evaluate.__main__ import main as evaluate_main
from fastadv.runs import checkpoint, log
from fastadv.teacher_cache.__main__ import main as cache_main
from fastadv.train import train
from fastadv.train.__main__ import main
from fastadv.train.cli import parse

PLACES = {"device": "cuda:99", "teacher_cache": "/nowhere/cache"}


def moved(run, places):
    """Rewrites a run's record and checkpoints to be those of a machine with other `places`."""
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(record | places))
    for path in run.glob("*.safetensors"):
        tensors, metadata = checkpoint.load(path)
        metadata["config"] |= places
        checkpoint.save(path, tensors, metadata)
    return run


@pytest.fixture
def foreign(teacher, tmp_path):
    """A robust run that was trained where there are more GPUs."""
    return moved(shutil.copytree(teacher.parent, tmp_path / "foreign"), PLACES)


def test_it_is_evaluated_and_exported(foreign, npz, tmp_path, capsys):
    model, read = evaluate.from_run(foreign)
    assert read.device == "cuda:99"
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    evaluate_main(["--checkpoint", str(foreign), "--attacks", "fgsm", "--limit", "8"])
    assert "fgsm" in capsys.readouterr().out
    out = tmp_path / "model.pt"
    export.main(["--checkpoint", str(foreign / "best.safetensors"), "--out", str(out)])
    loaded, x = models.load("digits_net", out, 3, 1, 8), torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded(x), model(x))
    moved(foreign, {"data_dir": "/gone/set.npz"})
    with pytest.raises(
        FileNotFoundError, match=r"^data_dir is '/gone/set\.npz', which does not exist"
    ):
        evaluate_main(["--checkpoint", str(foreign)])
    evaluate_main(
        ["--checkpoint", str(foreign), "--attacks", "fgsm", "--limit", "8", "--data-dir", str(npz)]
    )


def test_it_teaches(foreign, npz, tmp_path):
    taught = {"method": "rslad", "teacher_checkpoint": str(foreign), "epochs": 1}
    (row,) = train(config(npz, tmp_path / "run", **taught))
    assert row["loss"] > 0


def test_its_device_is_asked_for_where_it_is_used(foreign, tmp_path, npz):
    message = r"device is 'cuda:99', which cannot be used here \(.*\): give another, such as cpu"
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    with pytest.raises(ValueError, match=message):
        main(["--resume", str(foreign)])
    assert {path.name: path.read_bytes() for path in foreign.iterdir()} == before
    with pytest.raises(ValueError, match=message):
        train(config(npz, tmp_path / "new", device="cuda:99"))
    assert not (tmp_path / "new").exists()
    done = subprocess.run(
        [sys.executable, "-m", "fastadv.train", "--resume", str(foreign)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: device is 'cuda:99', which cannot be used here (")
    assert len(done.stderr.splitlines()) == 1


def test_it_goes_on_with_the_places_of_this_machine(npz, teacher, tmp_path):
    """Bit for bit as if it had never been elsewhere."""
    settings = {"method": "rslad", "teacher_checkpoint": str(teacher)}
    train(config(npz, tmp_path / "whole", **settings))
    run = tmp_path / "run"
    train(config(npz, run, epochs=1, **settings, milestones=()))
    gone = {"data_dir": "/gone/set.npz", "teacher_checkpoint": "/gone/best.safetensors"}
    moved(run, PLACES | gone | {"epochs": 3, "milestones": [2]})
    record = (run / "config.json").read_text()
    line = ["--resume", str(run), "--device", "cpu", "--data-dir", str(npz)]
    with pytest.raises(FileNotFoundError, match=r"/gone/best\.safetensors: no such file"):
        main(line)
    main([*line, "--teacher-checkpoint", str(teacher), "--teacher-cache", "memory"])
    assert [row["epoch"] for row in log.read(run / "metrics.jsonl")] == [0, 1, 2]
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "run"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    _, metadata = checkpoint.load(run / "last.safetensors")
    assert metadata["config"]["device"] == "cpu"
    assert metadata["config"]["data_dir"] == str(npz)
    assert (run / "config.json").read_text() == record  # how it began


def test_only_places_go_with_resume(foreign):
    there = ["--resume", str(foreign), "--device", "cpu", "--teacher-cache", "off"]
    there += ["--data-dir", "x", "--clean-teacher-checkpoint", "y"]
    got, resume = parse(there)
    assert resume
    assert (got.device, got.teacher_cache, got.out) == ("cpu", "off", str(foreign))
    assert (got.data_dir, got.clean_teacher_checkpoint) == (
        str(Path("x").resolve()),
        str(Path("y").resolve()),
    )
    others = ["--lr 1", "--epochs 9", "--seed 1", "--precision bf16", "--set a=1", "--out x"]
    others += ["--teacher resnet18", "--recipe rslad-cifar10-resnet18", "--method at"]
    for flags in others:
        with pytest.raises(ValueError, match=f"{flags.split()[0]} cannot go with it, only .* --da"):
            parse([*there, *flags.split()])


def test_its_teacher_fills_a_cache(npz, teacher, tmp_path, capsys):
    settings = {"method": "rslad", "teacher_checkpoint": str(teacher), "epochs": 1}
    run = tmp_path / "run"
    train(config(npz, run, **settings))
    moved(run, PLACES)
    line = ["fill", str(tmp_path / "cache"), "--run", str(run), "--views", "1"]
    with pytest.raises(ValueError, match="device is 'cuda:99', which cannot be used here"):
        cache_main(line)
    with pytest.raises(ValueError, match="--run takes the run's own settings: --seed cannot go"):
        cache_main([*line, "--device=cpu", "--seed", "1"])
    cache_main([*line, "--device", "cpu"])
    assert "1 of 9 views filled, 144 rows computed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "config is a list, must be an object of fields"),
        ('{"epochs": 0}', "epochs is 0, must be at least 1"),
        ('{"lr": "fast"}', "lr is 'fast', must be a number, positive and finite"),
        ('{"milestones": 3}', "milestones is 3, must be whole numbers of epochs"),
        ('{"data_dir": 3}', "data_dir is 3, must be text"),
        ('{"rate": 1}', "config has unknown fields: rate"),
    ],
)
def test_a_record_that_is_none(tmp_path, text, reason):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json is not the record of a run: .*{reason}"):
        parse(["--resume", str(tmp_path)])
