"""The networks: sizes, key names, one block of each against plain functions, and weight files."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastadv import checkpoint, models
from fastadv.models import resnet, wide_resnet

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def keys(convolutions, norms, linear):
    return (
        {f"{name}.weight" for name in convolutions}
        | {f"{name}.{field}" for name in norms for field in NORM}
        | {f"{linear}.weight", f"{linear}.bias"}
    )


def randomise(module):
    """Give every weight and statistic a value that shows when it is left out or swapped."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
            if name.endswith(("running_var", "bn1.weight", "bn2.weight")):
                value.abs_().add_(0.5)
    return module.double().eval()


def norm(weights, name, x):
    mean, var, weight, bias = (
        weights[f"{name}.{field}"][:, None, None]
        for field in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes_are_the_published_ones():
    assert parameters(models.get("resnet18")) == 11_173_962
    with torch.device("meta"):
        assert parameters(models.get("wrn34_10")) == 46_160_474


def test_resnet18_keys():
    blocks = [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]
    wider = ["layer2.0", "layer3.0", "layer4.0"]
    convolutions = ["conv1", *[f"{b}.conv{i}" for b in blocks for i in (1, 2)]]
    norms = ["bn1", *[f"{b}.bn{i}" for b in blocks for i in (1, 2)]]
    convolutions += [f"{b}.shortcut.0" for b in wider]
    norms += [f"{b}.shortcut.1" for b in wider]
    model = models.get("resnet18", width=4)
    assert model.state_dict().keys() == keys(convolutions, norms, "linear")


def test_wide_resnet_keys():
    blocks = [f"block{stage}.layer.{i}" for stage in (1, 2, 3) for i in (0, 1)]
    convolutions = ["conv1", *[f"{b}.conv{i}" for b in blocks for i in (1, 2)]]
    convolutions += [f"block{stage}.layer.0.convShortcut" for stage in (1, 2, 3)]
    norms = ["bn1", *[f"{b}.bn{i}" for b in blocks for i in (1, 2)]]
    assert models.get("wrn16_2", width=4).state_dict().keys() == keys(convolutions, norms, "fc")


def test_a_stage_that_does_not_widen_has_no_shortcut_convolution():
    assert "block1.layer.0.convShortcut.weight" not in models.get("wrn10_1").state_dict()


@pytest.mark.parametrize(("out_channels", "stride"), [(5, 1), (8, 1), (8, 2)])
def test_wide_resnet_block_against_functions(out_channels, stride):
    block = randomise(wide_resnet.Block(5, out_channels, stride))
    weights = block.state_dict()
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    active = norm(weights, "bn1", x).clamp(min=0)
    inner = F.conv2d(active, weights["conv1.weight"], stride=stride, padding=1)
    inner = norm(weights, "bn2", inner).clamp(min=0)
    expected = F.conv2d(inner, weights["conv2.weight"], padding=1)
    if out_channels == 5:
        expected = expected + x
    else:
        expected = expected + F.conv2d(active, weights["convShortcut.weight"], stride=stride)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(("out_channels", "stride"), [(5, 1), (8, 2), (5, 2), (8, 1)])
def test_resnet_block_against_functions(out_channels, stride):
    block = randomise(resnet.Block(5, out_channels, stride))
    weights = block.state_dict()
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    inner = F.conv2d(x, weights["conv1.weight"], stride=stride, padding=1)
    inner = norm(weights, "bn1", inner).clamp(min=0)
    expected = norm(weights, "bn2", F.conv2d(inner, weights["conv2.weight"], padding=1))
    residual = x
    if (out_channels, stride) != (5, 1):
        residual = F.conv2d(x, weights["shortcut.0.weight"], stride=stride)
        residual = norm(weights, "shortcut.1", residual)
    torch.testing.assert_close(block(x), (expected + residual).clamp(min=0))


@pytest.mark.parametrize("name", ["resnet18", "wrn10_2"])
def test_strides_ends_and_pooling(name):
    model = randomise(models.get(name, width=2))
    blocks = model.layer4 if name == "resnet18" else model.block3
    seen = []
    blocks.register_forward_hook(lambda *call: seen.append(call[2]))
    logits = model(torch.rand(2, 3, 32, 32, dtype=torch.float64))
    last = seen[0]
    assert last.shape[2:] == ((4, 4) if name == "resnet18" else (8, 8))
    if name != "resnet18":
        last = norm(model.state_dict(), "bn1", last).clamp(min=0)
    head = model.linear if name == "resnet18" else model.fc
    torch.testing.assert_close(logits, last.mean((2, 3)) @ head.weight.T + head.bias)


@pytest.mark.parametrize("name", ["digits_net", "resnet18", "wrn10_1", "wrn16_2"])
@pytest.mark.parametrize("size", [8, 32])
def test_shapes_and_gradients(name, size):
    model = models.get(name, num_classes=7, in_channels=2, width=4)
    logits = model(torch.rand(3, 2, size, size))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_digits_net_at_its_default_size():
    model = models.get("digits_net", in_channels=1)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert parameters(model) == 75_434


def test_wide_resnet_initialisation():
    torch.manual_seed(0)
    model = models.get("wrn10_4")
    convolution = model.block2.layer[0].conv1.weight
    assert convolution.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    shortcut = model.block2.layer[0].convShortcut.weight
    assert shortcut.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.05)
    assert not model.fc.bias.any()
    assert (model.bn1.weight == 1).all()
    assert not model.bn1.bias.any()


@pytest.mark.parametrize("name", ["wrn34_0", "wrn33_10", "wrn4_1", "wrn0_1", "wrn30_2"])
def test_illegal_depths_and_widths(name):
    with pytest.raises(ValueError, match=f"{name}: depth must be 6n"):
        models.get(name)


@pytest.mark.parametrize("name", ["resnet", "wrn34", "wrn34_10x", "WRN34_10", "xwrn34_10", ""])
def test_unknown_names_list_the_known(name):
    with pytest.raises(ValueError, match=r"known: digits_net, resnet18, wrn\{depth\}_\{widen\}"):
        models.get(name)


def test_weights_round_trip(tmp_path):
    model, other = (models.get("wrn10_2", width=4) for _ in range(2))
    randomise(model).float()
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
    assert "fc.bias: the model has [10], the file [100]" in message
    assert message.count(";") == 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
