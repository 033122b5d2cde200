"""Students that start from weights: --student-checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import config
from torch import nn

from fastadv import UsageError, models
from fastadv.runs import Config, log
from fastadv.train import train
from fastadv.train.__main__ import main

TUNED = {"epochs": 1, "student_width": 8, "lr": 1e-9}


def net(classes=3):
    torch.manual_seed(7)
    return models.get("digits_net", classes, 1, 8)


def weights(run):
    tensors = load_file(run / "last.safetensors")
    return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}


@pytest.mark.parametrize("form", ["folder", "file", "wrapped.pth", "net.safetensors"])
def test_the_student_starts_from_a_file(npz, teacher, tmp_path, form, capsys):
    expected = models.load("digits_net", teacher, 3, 1, 8).state_dict()
    path = {"folder": teacher.parent, "file": teacher}.get(form, tmp_path / form)
    if form == "wrapped.pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in expected.items()}}, path)
    elif form == "net.safetensors":
        save_file(expected, path)
    train(config(npz, tmp_path / "run", student_checkpoint=path, **TUNED))
    got = weights(tmp_path / "run")
    for name, _ in net().named_parameters():
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["student_checkpoint"] == str(path)
    assert "starts afresh" not in capsys.readouterr().out


def test_a_classifier_of_other_classes_starts_afresh(npz, tmp_path, capsys):
    path, before = tmp_path / "100.pth", net(100).state_dict()
    torch.save(before, path)
    train(config(npz, tmp_path / "run", student_checkpoint=path, **TUNED))
    train(config(npz, tmp_path / "fresh", **TUNED))
    got, fresh = weights(tmp_path / "run"), weights(tmp_path / "fresh")
    torch.testing.assert_close(got["conv1.weight"], before["conv1.weight"], rtol=0, atol=1e-5)
    torch.testing.assert_close(got["fc.weight"], fresh["fc.weight"], rtol=0, atol=1e-5)
    said = f"student: {path} has another number of classes, so fc starts afresh"
    assert capsys.readouterr().out.count(said) == 1


class Heads(nn.Module):
    """Two classifiers, one of them a convolution, behind a hidden layer."""

    def __init__(self, classes, hidden=5, other=None, bias=True):
        super().__init__()
        self.hidden = nn.Linear(6, hidden)
        self.first = nn.Linear(hidden, classes, bias)
        self.second = nn.Conv2d(hidden, other or classes, 1)


def test_all_classifiers_are_found():
    def other(model, file, classes=5):
        return models.weights._other_classifier(model, file.state_dict(), classes)

    assert other(Heads(5), Heads(9)) == ["first", "second"]
    assert other(Heads(5), Heads(5)) == []
    assert other(Heads(5), Heads(9, other=8)) == []  # whichever of them it means
    assert other(Heads(5), Heads(9, bias=False)) == ["second"]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"fc.weight": (9, 256), "fc.bias": (9,), "bn1.weight": (4,)}, r"shape bn1.weight \("),
        ({"fc.weight": (9, 256), "fc.bias": (3,)}, r"shape fc.weight \(the model has \[3, 256\]"),
        ({"fc.weight": (9, 128), "fc.bias": (9,)}, r"shape fc.bias \(.*\), fc.weight \("),
        ({"fc.weight": (9, 256), "fc.bias": None}, "missing fc.bias; of another shape fc.weight"),
        ({"fc.weight": None, "fc.bias": None}, "missing fc.bias, fc.weight"),
        ({"fc.weight": (), "fc.bias": ()}, r"shape fc.bias \(.*\), fc.weight \("),
    ],
)
def test_whatever_else_does_not_fit_is_refused(npz, tmp_path, changed, problem):
    state = net().state_dict()
    assert state["fc.weight"].shape == (3, 256)
    for name, shape in changed.items():
        state.pop(name)
        if shape is not None:
            state[name] = torch.zeros(shape)
    torch.save(state, tmp_path / "a.pth")
    refused = f"^student_checkpoint: .*a.pth does not fit this DigitsNet: .*{problem}"
    with pytest.raises(UsageError, match=refused):
        train(config(npz, tmp_path / "run", student_checkpoint=tmp_path / "a.pth", **TUNED))
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        train(config(npz, tmp_path / "run", student_checkpoint=tmp_path / "gone.pth", **TUNED))


def test_only_a_run_that_starts_over_reads_the_file_again(npz, tmp_path):
    path, moved, run = tmp_path / "a.pth", tmp_path / "moved.pth", tmp_path / "run"
    torch.save(net().state_dict(), path)
    tuned = TUNED | {"epochs": 2, "lr": 0.05, "milestones": ()}
    train(config(npz, run, student_checkpoint=path, **tuned))
    whole = weights(run)
    path.rename(moved)
    for lost in ("last.safetensors", "best.safetensors", "metrics.jsonl"):
        (run / lost).unlink()  # as if killed in the first epoch
    with pytest.raises(FileNotFoundError, match=r"a\.pth"):
        main(["--resume", str(run)])
    main(["--resume", str(run), "--student-checkpoint", str(moved)])
    assert all(torch.equal(whole[name], value) for name, value in weights(run).items())

    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(record | {"epochs": 3}))
    main(["--resume", str(run)])  # where the file is still gone
    assert [row["epoch"] for row in log.read(run / "metrics.jsonl")] == [0, 1, 2]


def test_the_place_goes_into_the_record():
    made = Config(student_checkpoint="a.pth")
    assert made.student_checkpoint.endswith("/a.pth")
    assert Config.from_json(made.to_json()) == made
