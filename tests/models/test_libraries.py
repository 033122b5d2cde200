"""Networks of timm and torchvision by name. Most tests have stand-ins for the two libraries."""

import json
import sys
import types
from dataclasses import asdict

import pytest
import torch
from small_runs import config
from torch import nn

from fastadv import UsageError, evaluate, freeze, models
from fastadv.errors import MissingPackage
from fastadv.evaluate.__main__ import main as evaluate_main
from fastadv.runs import checkpoint
from fastadv.train import train
from fastadv.train.__main__ import main

GREY = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.6)}


class Tiny(nn.Module):
    def __init__(self, num_classes, channels):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def timm(monkeypatch):
    """A stand-in for timm, which would take other names than those that it lists."""

    def create_model(name, pretrained, num_classes, in_chans):
        assert not pretrained
        if name == "broken":
            raise TypeError("num_classes is no argument of mine")
        net = Tiny(num_classes, in_chans)
        net.pretrained_cfg = {} if name == "plain" else {"mean": (0.5,) * 3, "std": (0.25,) * 3}
        net.pretrained_cfg |= GREY if name == "tiny.grey" else {}
        return net

    def list_models(include_tags=False):
        return ["tiny.a", "tiny.grey"] if include_tags else ["tiny", "plain", "broken"]

    stub = types.ModuleType("timm")
    stub.create_model, stub.list_models = create_model, list_models
    monkeypatch.setitem(sys.modules, "timm", stub)
    return stub


@pytest.fixture
def torchvision(monkeypatch):
    stub = types.ModuleType("torchvision.models")

    def list_models(module=None):
        return ["tiny"] + ["detector"] * (module is not stub)

    def get_model(name, weights, num_classes):
        assert weights is None
        return Tiny(num_classes, 3)

    stub.list_models, stub.get_model = list_models, get_model
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", stub)
    return stub


@pytest.mark.parametrize(
    ("name", "channels", "mean", "std"),
    [
        ("tiny", 3, [0.5] * 3, [0.25] * 3),
        ("tiny.grey", 3, GREY["mean"], GREY["std"]),
        ("tiny.grey", 1, [0.4], [0.3]),
        ("plain", 3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_the_input_is_normalised_as_the_library_does(timm, name, channels, mean, std):
    model = models.get(f"timm:{name}", 7, channels).eval()
    assert isinstance(model, models.Normalized)
    torch.testing.assert_close(model.mu.flatten(), torch.tensor(mean))
    torch.testing.assert_close(model.sigma.flatten(), torch.tensor(std))
    assert model(torch.rand(2, channels, 8, 8)).shape == (2, 7)


def test_a_network_of_torchvision(torchvision):
    model = models.get("torchvision:tiny", 7).eval()
    torch.testing.assert_close(model.mu.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 7)
    with pytest.raises(UsageError, match=r"^torchvision:tiny takes images of 3 channels, not of 1"):
        models.get("torchvision:tiny", in_channels=1)


@pytest.mark.parametrize(
    "name",
    [
        *("timm:hf-hub:tiny", "timm:hf_hub:some/tiny", "timm:local-dir:.", "timm:", "timm:tiny.b"),
        *("timm:./tiny", "timm:TINY", "timm: tiny", "torchvision:detector", "torchvision:tiny.a"),
    ],
)
def test_only_what_the_library_lists_is_made(timm, torchvision, monkeypatch, tmp_path, name):
    """Above all not what a stranger's checkpoint names."""

    def never(*_, **__):
        raise AssertionError("made")

    monkeypatch.setattr(timm, "create_model", never)
    monkeypatch.setattr(torchvision, "get_model", never)
    message = f"model is '{name}', must be .*:NAME of a classifier that .*list_models\\(\\) lists"
    with pytest.raises(UsageError, match=message):
        models.get(name)
    header = {
        "config": asdict(config("x.npz", tmp_path)) | {"student": name, "student_width": None}
    }
    header |= {"num_classes": 3, "in_channels": 1}
    checkpoint.save(tmp_path / "best.safetensors", {"model.a": torch.zeros(1)}, header)
    with pytest.raises(UsageError, match=message):
        evaluate.from_run(tmp_path)


def test_what_cannot_be_made_says_why(timm, monkeypatch):
    def fails(kind, message, name, **size):
        with pytest.raises(kind, match=message) as caught:
            models.get(name, **size)
        assert "\n" not in str(caught.value)

    fails(UsageError, "did you mean timm:tiny.grey\\?$", "timm:tiny.gray")
    fails(UsageError, "list_models\\(\\) lists$", "timm:xxxxxxxx")
    fails(UsageError, "^width is 4, but timm:tiny takes no width", "timm:tiny", width=4)
    message = "^timm:broken cannot be made with 10 classes and 3 channels: TypeError: num_classes"
    fails(UsageError, message, "timm:broken")
    for library, module in (("timm", "timm"), ("torchvision", "torchvision.models")):
        monkeypatch.setitem(sys.modules, module, None)
        message = rf"^{library}:tiny needs {library}: pip install fastadv\[networks\] \("
        fails(MissingPackage, message, f"{library}:tiny")


def test_a_library_that_this_torch_refuses(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator does not exist')")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="cannot be imported: operator does not exist"):
        models.get("timm:tiny")


def test_the_names_are_the_libraries_own(timm):
    for name in ("timm:tiny", "torchvision:mine"):
        with pytest.raises(UsageError, match="which fastadv has already"):
            models.register(name, lambda: nn.Linear(1, 1))
        assert not models.zoo.is_own(name)
    assert models.zoo.is_own("timmy:tiny")


def test_a_run_goes_on_and_is_evaluated_without_flags(timm, npz, tmp_path, capsys):
    settings = {"student": "timm:tiny", "student_width": None, "epochs": 1}
    train(config(npz, tmp_path / "run", **settings))
    record = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(record | {"epochs": 2}))
    main(["--resume", str(tmp_path / "run")])
    model, read = evaluate.from_run(tmp_path / "run")
    assert read.student == "timm:tiny"
    saved, _ = checkpoint.load(tmp_path / "run/best.safetensors")
    assert torch.equal(saved["model.net.fc.weight"], model.net.fc.weight)
    line = ["--attacks", "fgsm", "--limit", "40", "--eps", "0.1"]
    evaluate_main(["--checkpoint", str(tmp_path / "run"), *line])
    torch.save(model.net.state_dict(), tmp_path / "net.pth")  # as timm's own files are
    line += ["--model", "timm:tiny", "--data", "npz", "--data-dir", str(npz)]
    evaluate_main(["--checkpoint", str(tmp_path / "net.pth"), *line])
    shown = [row for row in capsys.readouterr().out.splitlines() if row.startswith("fgsm:")]
    assert len(shown) == 2
    assert shown[0] == shown[1]


def test_a_teacher_must_have_been_trained(timm, npz, tmp_path):
    settings = {"method": "rslad", "teacher": "timm:tiny", "epochs": 1}
    with pytest.raises(UsageError, match="teacher_checkpoint is missing, which method rslad needs"):
        train(config(npz, tmp_path / "run", **settings))
    for classes in (1000, 3):
        torch.save(Tiny(classes, 1).state_dict(), tmp_path / f"{classes}.pth")
    settings["teacher_checkpoint"] = str(tmp_path / "1000.pth")
    with pytest.raises(UsageError, match=r"^teacher: .* does not fit this Tiny: of another shape"):
        train(config(npz, tmp_path / "run", **settings))
    settings["teacher_checkpoint"] = str(tmp_path / "3.pth")
    assert train(config(npz, tmp_path / "run", **settings))[0]["loss"] > 0


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_timm_itself(name):
    """Where it is installed."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = models.get(f"timm:{name}", 10), torch.rand(2, 3, 64, 64)
    model(torch.rand(8, 3, 64, 64))  # statistics of its own
    twin, model = freeze(model), model.eval()
    assert twin.trunk is not None
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)
    grey = models.get("timm:resnet18.a1_in1k", 10, 1)
    assert grey.mu.numel() == grey.net.conv1.in_channels == 1
    with pytest.raises(UsageError, match="must be timm:NAME of a classifier"):
        models.get("timm:hf-hub:timm/resnet18.a1_in1k")
