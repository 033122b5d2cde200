"""Weight files: keys that fit or do not, statistics of the input, and what `export` writes."""

import dataclasses

import pytest
import torch

from fastadv import evaluate, export, freeze, models
from fastadv.models import weight_files
from fastadv.runs import Config, checkpoint
from fastadv.train import train


def jitter(model):
    """Random weights and statistics, so that each one matters."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and name not in ("mu", "sigma", "mean", "std"):
                value.add_(torch.randn_like(value) * 0.1)
    return model.eval()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.pt"


@pytest.fixture
def x():
    return torch.rand(4, 3, 8, 8)


def test_weights_round_trip(tmp_path):
    model, other = (models.get("wrn10_2", width=4) for _ in range(2))
    jitter(model)
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "a.pt")
    models.load_weights(other, tmp_path / "a.pt")
    assert all(torch.equal(other.state_dict()[k], v) for k, v in model.state_dict().items())


def test_the_unused_stage_of_trades_files_is_ignored(tmp_path):
    model, other = (models.get("wrn10_2", width=4) for _ in range(2))
    weights = model.state_dict()
    unused = {f"sub_{k}": v for k, v in weights.items() if k.startswith("block1.")}
    assert "sub_block1.layer.0.conv1.weight" in unused
    torch.save(weights | unused, tmp_path / "a.pt")
    models.load_weights(other, tmp_path / "a.pt")
    assert torch.equal(other.conv1.weight, model.conv1.weight)


def test_absent_batch_counters_are_accepted(tmp_path):
    model, other = (models.get("digits_net", width=4) for _ in range(2))
    weights = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    torch.save(weights, tmp_path / "a.pt")
    models.load_weights(other, tmp_path / "a.pt")
    assert torch.equal(other.fc.weight, model.fc.weight)


def test_misfits_are_listed_together_and_change_nothing(tmp_path):
    model = models.get("digits_net", in_channels=1, width=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = {k: v + 1 for k, v in before.items()}
    del weights["conv2.weight"]
    weights["extra"] = torch.zeros(1)
    weights["fc.bias"] = torch.zeros(100)
    checkpoint.save(tmp_path / "a.safetensors", {f"model.{k}": v for k, v in weights.items()}, {})
    with pytest.raises(ValueError, match=r"a\.safetensors does not fit this DigitsNet") as caught:
        models.load_weights(model, tmp_path / "a.safetensors")
    message = str(caught.value)
    assert "missing conv2.weight" in message
    assert "unexpected extra" in message
    assert "of another shape fc.bias (the model has [10], the file [100])" in message
    assert message.count(";") == 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_long_lists_are_cut(path):
    torch.save(models.get("resnet34", width=4).state_dict(), path)
    with pytest.raises(ValueError, match="does not fit this ResNet: ") as caught:
        models.load("resnet56", path, width=4)
    message = str(caught.value).partition(": ")[2]
    assert message.count(".weight") + message.count(".bias") + message.count(".running") <= 10
    assert len(message) < 1000
    theirs = models.get("resnet34", width=4).state_dict()
    ours = models.get("resnet56", width=4).state_dict()
    absent = [k for k in ours.keys() - theirs.keys() if "num_batches" not in k]
    assert f" and {len(absent) - 3} more; unexpected " in message


@pytest.mark.parametrize(
    ("stored", "asked", "hint"),
    [
        ("resnet34", "resnet18", "resnet34"),
        ("preact_resnet18", "resnet18", "preact_resnet18"),
        ("resnet56_b", "resnet56", "resnet56_b"),
        ("wrn34_10", "wrn28_10", "wrn34_10"),
        ("wrn34_20", "wrn34_10", "wrn34_20"),
        ("dm_wrn28_10", "wrn28_10", "dm_wrn28_10"),
        ("mobilenet_v2", "vit_tiny", "mobilenet_v2"),
        ("wrn34_10", "wrn34_10_silu", None),
        ("resnet18", "resnet18", None),
    ],
)
def test_the_hint_at_a_likelier_network(stored, asked, hint):
    with torch.device("meta"):
        theirs = models.get(stored, num_classes=100).state_dict()
        ours = models.get(asked).state_dict()
    theirs = {k: v for k, v in theirs.items() if k not in ("mean", "std")}
    found = models.weights._likelier(ours, theirs)
    assert found == (f"; its keys fit {hint} best" if hint else "")


def test_the_hint_reaches_the_user_and_strangers_get_none(path):
    torch.save(models.get("resnet20", width=4).state_dict(), path)
    with pytest.raises(ValueError, match="; its keys fit resnet20 best$"):
        models.load("wrn10_1", path, width=4)
    torch.save({"conv1.weight": torch.zeros(4, 3, 3, 3), "encoder": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="; unexpected encoder$"):
        models.load("wrn10_1", path, width=4)


def test_names_of_torchvision(path, x):
    model = jitter(models.get("resnet56_b", width=4))
    weights = {
        k.replace("shortcut", "downsample").replace("linear", "fc"): v
        for k, v in model.state_dict().items()
    }
    assert {"layer2.0.downsample.1.running_mean", "fc.bias"} <= weights.keys()
    torch.save(weights, path)
    assert torch.equal(models.load("resnet56_b", path, width=4)(x), model(x))
    weights["linear.bias"] = weights["fc.bias"] + 1  # both names at once are not merged
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"does not fit this ResNet: unexpected fc\.bias$"):
        models.load("resnet56_b", path, width=4)


NAMES = ["resnet18", "preact_resnet18", "wrn10_2", "dm_wrn10_2", "mobilenet_v2", "vit_tiny"]
MEAN, STD = torch.tensor([0.1, 0.5, 0.4]), torch.tensor([0.2, 0.3, 0.25])


@pytest.mark.parametrize("name", NAMES)
def test_load_is_ready_for_inference(path, x, name):
    model = jitter(models.get(name, num_classes=7, width=6))
    torch.save({"net": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    loaded = models.load(name, path, 7, 3, 6)
    assert type(loaded) is type(model)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("names", weight_files.STATISTICS)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1)])
def test_statistics_beside_a_network_that_has_none(path, x, names, prefix, shape):
    model = jitter(models.get("resnet18", width=4))
    outer = prefix.removesuffix("model.")
    weights = {f"{prefix}{k}": v for k, v in model.state_dict().items()}
    weights |= {f"{outer}{names[0]}": MEAN.view(shape), f"{outer}{names[1]}": STD.view(shape)}
    torch.save({"state_dict": weights}, path)
    loaded = models.load("resnet18", path, width=4)
    normal = (x - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    torch.testing.assert_close(loaded(x), model(normal))
    assert not loaded.training
    with pytest.raises(ValueError, match=r"a\.pt normalises its input, which this ResNet does not"):
        models.load_weights(model, path)


@pytest.mark.parametrize("names", weight_files.STATISTICS)
def test_statistics_for_a_network_that_has_its_own(path, x, names):
    model = jitter(models.get("dm_wrn10_1", width=4))
    weights = {k: v for k, v in model.state_dict().items() if k not in ("mean", "std")}
    torch.save(weights, path)
    assert torch.equal(models.load("dm_wrn10_1", path, width=4)(x), model(x))  # the published
    torch.save(weights | dict(zip(names, (MEAN, STD), strict=True)), path)
    loaded = models.load("dm_wrn10_1", path, width=4)
    assert type(loaded) is type(model)
    model.mean.copy_(MEAN.view(3, 1, 1))
    model.std.copy_(STD.view(3, 1, 1))
    assert torch.equal(loaded(x), model(x))


def test_a_normalized_network_is_filled_in_place_and_saved_as_it_is(path, x):
    model = models.Normalized(jitter(models.get("resnet18", width=4)), MEAN, STD).eval()
    torch.testing.assert_close(freeze(model)(x), model(x))
    torch.save(model.state_dict(), path)  # net.conv1.weight, ..., mu, sigma
    assert torch.equal(models.load("resnet18", path, width=4)(x), model(x))
    zeros, ones = torch.zeros(3), torch.ones(3)
    other = models.Normalized(models.get("resnet18", width=4), zeros, ones)
    models.load_weights(other.eval(), path)
    assert torch.equal(other(x), model(x))
    assert not zeros.any()  # the caller's tensors are its own
    torch.save(model.net.state_dict(), path)  # a file without statistics leaves them alone
    models.load_weights(other, path)
    assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match="net is a Normalized, which normalises its input already"):
        models.Normalized(model, MEAN, STD)


@pytest.mark.parametrize(
    ("statistics", "reason"),
    [
        ({"mu": MEAN}, "statistics of its input, but no sigma"),
        ({"std": STD}, "statistics of its input, but no mean"),
        ({"mu": MEAN * 255, "sigma": STD * 255}, "mu is .* not the mean and deviation of images"),
        ({"mean": MEAN, "std": STD * 0}, "not the mean and deviation of images"),
        ({"mean": MEAN, "std": STD * torch.nan}, "not the mean and deviation of images"),
        ({"mean": MEAN * torch.nan, "std": STD}, "not the mean and deviation of images"),
        ({"mean": MEAN[:1], "std": STD[:1]}, "normalises images of 1 channels, .* takes 3"),
        ({"mean": MEAN, "std": STD, "mu": MEAN, "sigma": STD}, "unexpected mean, std"),
    ],
)
@pytest.mark.parametrize("name", ["resnet18", "dm_wrn10_1"])
def test_statistics_that_make_no_sense(path, name, statistics, reason):
    weights = models.get(name, width=4).state_dict()
    weights = {k: v for k, v in weights.items() if k not in ("mean", "std")}
    torch.save(weights | statistics, path)
    with pytest.raises(ValueError, match=rf"a\.pt.*{reason}"):
        models.load(name, path, width=4)


def test_a_normalisation_is_numbers_by_channel(x):
    net = jitter(models.get("resnet18", width=4)).eval()
    expected = models.Normalized(net, MEAN, STD).eval()(x)
    for mean, std in ((tuple(MEAN.tolist()), STD.tolist()), (MEAN.numpy(), STD.double().numpy())):
        assert torch.equal(models.Normalized(net, mean, std).eval()(x), expected)
    for mean, std, error, match in (
        ("x", STD, TypeError, "mean is 'x', must be one number per channel"),
        (MEAN, None, TypeError, "std is None, must be one number per channel"),
        (MEAN, [1, "x", 1], TypeError, "std is .*, must be one number per channel"),
        (MEAN, torch.ones(3).bool(), TypeError, "std is .*, must be one number per channel"),
        (MEAN, (0.2, 0.3), ValueError, "mean has 3 numbers and std 2, must both have one per chan"),
    ):
        with pytest.raises(error, match=match):
            models.Normalized(net, mean, std)


@pytest.mark.parametrize("name", NAMES)
def test_export_is_a_plain_state_dict(path, x, name):
    model = jitter(models.get(name, width=6).to(memory_format=torch.channels_last))
    models.export(model, path)
    content = torch.load(path, weights_only=True)
    assert list(content) == ["state_dict"]
    weights = content["state_dict"]
    assert weights.keys() == model.state_dict().keys() - {"mean", "std"}
    assert all(value.is_contiguous() for value in weights.values())
    # RobustBench removes the first characters of any key with one of these anywhere in it.
    assert not any("module." in key or "model." in key for key in weights)
    torch.testing.assert_close(models.load(name, path, width=6)(x), model(x))


def test_export_keeps_the_statistics_of_the_input(path, x):
    model = models.Normalized(jitter(models.get("wrn10_1", width=4)), MEAN, STD).eval()
    models.export(model, path)
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert weights.keys() == model.net.state_dict().keys() | {"mu", "sigma"}
    assert weights["mu"].shape == (1, 3, 1, 1)  # as RobustBench's classes register it
    assert torch.equal(models.load("wrn10_1", path, width=4)(x), model(x))
    own = jitter(models.get("dm_wrn10_1", num_classes=100, width=4))
    own.mean.copy_(MEAN.view(3, 1, 1))
    models.export(own, path)
    assert {"mean", "std"} <= torch.load(path, weights_only=True)["state_dict"].keys()
    assert torch.equal(models.load("dm_wrn10_1", path, 100, width=4)(x), own(x))


def test_export_is_atomic(path, monkeypatch):
    models.export(models.get("digits_net", width=2), path)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write.*a\.pt"):
        models.export(models.get("digits_net", width=4), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]


def test_export_command(tmp_path, path, capsys):
    options = {"method": "natural", "data": "digits", "student": "dm_wrn10_1"}  # grey images
    train(Config(**options, epochs=1, batch_size=512, out=str(tmp_path / "run")))
    best = tmp_path / "run" / "best.safetensors"
    export.main(["--checkpoint", str(best), "--out", str(path)])
    (*_, line) = capsys.readouterr().out.splitlines()
    assert line == f"{path}: weights of dm_wrn10_1, for which RobustBench has no class"
    model, _ = evaluate.from_run(best)
    loaded, x = models.load("dm_wrn10_1", path, 10, 1), torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("width", "channels", "named"),
    [(None, 3, "ResNet(BasicBlock, [2, 2, 2, 2], num_classes)"), (64, 3, None), (None, 1, None)],
)
def test_export_names_a_class_that_takes_the_file(tmp_path, path, capsys, width, channels, named):
    """That of RobustBench is for colour images and the published width."""
    model = models.get("resnet18", 10, channels, width)
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    settings = dataclasses.asdict(Config(student="resnet18", student_width=width))
    header = {"config": settings, "num_classes": 10, "in_channels": channels}
    checkpoint.save(tmp_path / "best.safetensors", tensors, header)
    export.main(["--checkpoint", str(tmp_path), "--out", str(path)])
    told = f"for RobustBench's {named}" if named else "for which RobustBench has no class"
    assert capsys.readouterr().out == f"{path}: weights of resnet18, {told}\n"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("resnet34", "ResNet(BasicBlock, [3, 4, 6, 3], num_classes)"),
        ("wrn34_20", "WideResNet(34, num_classes, 20)"),
        ("dm_wrn70_16", "DMWideResNet(num_classes, 70, 16, Swish, mean, std)"),
        ("wrn28_10_silu", None),
        ("resnet56", None),
    ],
)
def test_classes_of_robustbench(name, found):
    assert export.robustbench_class(name) == found
