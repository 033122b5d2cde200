"""The networks: sizes, key names, and one block of each against plain functions."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastadv import freeze, models
from fastadv.models import dm_wide_resnet, mobilenet_v2, preact_resnet, resnet, wide_resnet, zoo

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


@pytest.mark.parametrize(
    ("name", "count", "gmac"),
    [
        ("resnet18", 11_173_962, 0.555),
        ("resnet34", 21_282_122, 1.159),
        ("preact_resnet18", 11_172_170, 0.555),
        ("resnet20", 269_722, 0.041),
        ("resnet56", 853_018, 0.125),
        ("resnet56_b", 855_770, 0.126),
        ("mobilenet_v2", 2_296_922, 0.091),
        ("vit_tiny", 2_693_194, 0.180),
        ("wrn22_6", 9_658_458, 1.385),
        ("wrn28_10", 36_479_194, 5.243),
        ("wrn28_10_silu", 36_479_194, 5.243),
        ("wrn34_10", 46_160_474, 6.659),
        ("dm_wrn28_10", 36_479_194, 5.243),
        ("dm_wrn70_16", 266_796_506, 38.764),
        ("wrn94_16", 365_915_610, 53.260),
    ],
)
def test_sizes_are_the_published_ones(name, count, gmac):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = models.get(name).eval()
        assert model(torch.empty(1, 3, 32, 32)).shape == (1, 10)
    assert parameters(model) == count
    assert round(counter.get_total_flops() / 2e9, 3) == gmac


@pytest.mark.parametrize(
    ("name", "stages", "shortcuts"),
    [
        ("resnet18", (2, 2, 2, 2), ("layer2.0", "layer3.0", "layer4.0")),
        ("resnet34", (3, 4, 6, 3), ("layer2.0", "layer3.0", "layer4.0")),
        ("resnet20", (3, 3, 3), ()),
        ("resnet56", (9, 9, 9), ()),
        ("resnet56_b", (9, 9, 9), ("layer2.0", "layer3.0")),
    ],
)
def test_resnet_keys(name, stages, shortcuts):
    blocks = [f"layer{k}.{i}" for k, count in enumerate(stages, 1) for i in range(count)]
    convolutions = ["conv1", *[f"{b}.conv{i}" for b in blocks for i in (1, 2)]]
    norms = ["bn1", *[f"{b}.bn{i}" for b in blocks for i in (1, 2)]]
    convolutions += [f"{b}.shortcut.0" for b in shortcuts]
    norms += [f"{b}.shortcut.1" for b in shortcuts]
    model = models.get(name, width=4)
    assert model.state_dict().keys() == keys(convolutions, norms, "linear")


def test_preact_resnet_keys():
    blocks = [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]
    convolutions = ["conv1", *[f"{b}.conv{i}" for b in blocks for i in (1, 2)]]
    convolutions += [f"layer{stage}.0.shortcut.0" for stage in (2, 3, 4)]
    norms = ["bn", *[f"{b}.bn{i}" for b in blocks for i in (1, 2)]]
    model = models.get("preact_resnet18", width=4)
    assert model.state_dict().keys() == keys(convolutions, norms, "linear")


def test_mobilenet_keys_and_channels():
    blocks = [f"layers.{i}" for i in range(17)]
    shortcuts = [f"layers.{i}.shortcut" for i in (0, 1, 10, 16)]  # stride 1, more channels
    convolutions = ["conv1", "conv2", *[f"{b}.conv{i}" for b in blocks for i in (1, 2, 3)]]
    convolutions += [f"{s}.0" for s in shortcuts]
    norms = ["bn1", "bn2", *[f"{b}.bn{i}" for b in blocks for i in (1, 2, 3)]]
    norms += [f"{s}.1" for s in shortcuts]
    model = models.get("mobilenet_v2", width=8)
    assert model.state_dict().keys() == keys(convolutions, norms, "linear")
    channels = [16, *[24] * 2, *[32] * 3, *[64] * 4, *[96] * 3, *[160] * 3, 320]
    assert [layer.bn3.num_features for layer in model.layers] == [c // 4 for c in channels]
    assert model.bn2.num_features == 320


def test_wide_resnet_keys():
    blocks = [f"block{stage}.layer.{i}" for stage in (1, 2, 3) for i in (0, 1)]
    convolutions = ["conv1", *[f"{b}.conv{i}" for b in blocks for i in (1, 2)]]
    convolutions += [f"block{stage}.layer.0.convShortcut" for stage in (1, 2, 3)]
    norms = ["bn1", *[f"{b}.bn{i}" for b in blocks for i in (1, 2)]]
    assert models.get("wrn16_2", width=4).state_dict().keys() == keys(convolutions, norms, "fc")


def test_deepmind_keys():
    blocks = [f"layer.{stage}.block.{i}" for stage in (0, 1, 2) for i in (0, 1)]
    convolutions = ["init_conv", *[f"{b}.conv_{i}" for b in blocks for i in (0, 1)]]
    convolutions += [f"layer.{stage}.block.0.shortcut" for stage in (0, 1, 2)]
    norms = ["batchnorm", *[f"{b}.batchnorm_{i}" for b in blocks for i in (0, 1)]]
    found = models.get("dm_wrn16_2", width=4).state_dict().keys()
    assert found == keys(convolutions, norms, "logits") | {"mean", "std"}


def test_a_stage_that_does_not_widen_has_no_shortcut_convolution():
    assert "block1.layer.0.convShortcut.weight" not in models.get("wrn10_1").state_dict()


PREACTIVATED = {
    "wrn": ("bn1", "conv1", "bn2", "conv2", "convShortcut"),
    "preact_resnet": ("bn1", "conv1", "bn2", "conv2", "shortcut.0"),
    "dm_wrn": ("batchnorm_0", "conv_0", "batchnorm_1", "conv_1", "shortcut"),
}


@pytest.mark.parametrize(
    ("kind", "make", "activation"),
    [
        ("wrn", wide_resnet.Block, torch.relu),
        ("wrn", partial(wide_resnet.Block, activation=nn.SiLU), F.silu),
        ("preact_resnet", preact_resnet.Block, torch.relu),
        ("dm_wrn", dm_wide_resnet.Block, F.silu),
    ],
)
@pytest.mark.parametrize(("out_channels", "stride"), [(5, 1), (8, 1), (8, 2)])
def test_preactivated_blocks_against_functions(kind, make, activation, out_channels, stride):
    block = randomise(make(5, out_channels, stride))
    weights = block.state_dict()
    norm_1, conv_1, norm_2, conv_2, shortcut = PREACTIVATED[kind]
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    active = activation(norm(weights, norm_1, x))
    # DeepMind's stride 2 sees the pixels 0, 2, 4, ... in its upper left corner, not its centre.
    before = 0 if kind == "dm_wrn" and stride == 2 else 1
    padded = F.pad(active, (before, 1, before, 1))
    inner = F.conv2d(padded, weights[f"{conv_1}.weight"], stride=stride)
    inner = activation(norm(weights, norm_2, inner))
    expected = F.conv2d(inner, weights[f"{conv_2}.weight"], padding=1)
    if out_channels == 5:
        expected = expected + x
    else:
        expected = expected + F.conv2d(active, weights[f"{shortcut}.weight"], stride=stride)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(("out_channels", "stride"), [(5, 1), (8, 2), (11, 2)])
def test_option_a_block_against_functions(out_channels, stride):
    block = randomise(resnet.CifarBlock(5, out_channels, stride))
    weights = block.state_dict()
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    inner = F.conv2d(x, weights["conv1.weight"], stride=stride, padding=1)
    inner = norm(weights, "bn1", inner).clamp(min=0)
    expected = norm(weights, "bn2", F.conv2d(inner, weights["conv2.weight"], padding=1))
    first = (out_channels - 5) // 2
    expected[:, first : first + 5] += x[:, :, ::stride, ::stride]
    torch.testing.assert_close(block(x), expected.clamp(min=0))


@pytest.mark.parametrize(("out_channels", "stride"), [(5, 1), (8, 1), (8, 2), (5, 2)])
def test_mobilenet_block_against_functions(out_channels, stride):
    block = randomise(mobilenet_v2.Block(5, out_channels, 6, stride))
    weights = block.state_dict()
    x = 20 * torch.randn(2, 5, 8, 8, dtype=torch.float64)  # beyond the 6 of ReLU6
    inner = norm(weights, "bn1", F.conv2d(x, weights["conv1.weight"])).clamp(min=0)
    assert inner.max() > 6
    inner = F.conv2d(inner, weights["conv2.weight"], stride=stride, padding=1, groups=30)
    inner = norm(weights, "bn2", inner).clamp(min=0)
    expected = norm(weights, "bn3", F.conv2d(inner, weights["conv3.weight"]))
    if stride == 1 and out_channels == 5:
        expected = expected + x
    elif stride == 1:
        residual = F.conv2d(x, weights["shortcut.0.weight"])
        expected = expected + norm(weights, "shortcut.1", residual)
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


ENDS = {  # the last convolution's module, its map at 32x32, BatchNorm and activation after it
    "resnet18": ("layer4", 4, None, None),
    "resnet34": ("layer4", 4, None, None),
    "preact_resnet18": ("layer4", 4, "bn", torch.relu),
    "resnet20": ("layer3", 8, None, None),
    "resnet56_b": ("layer3", 8, None, None),
    "mobilenet_v2": ("conv2", 4, "bn2", torch.relu),
    "wrn10_2": ("block3", 8, "bn1", torch.relu),
    "wrn10_2_silu": ("block3", 8, "bn1", F.silu),
    "dm_wrn10_2": ("layer", 8, "batchnorm", F.silu),
}


@pytest.mark.parametrize("name", ENDS)
def test_strides_ends_and_pooling(name):
    model = randomise(models.get(name, width=2))
    module, size, batchnorm, activation = ENDS[name]
    if batchnorm:
        getattr(model, batchnorm).weight.data *= 100  # beyond the 6 of ReLU6
    seen = []
    getattr(model, module).register_forward_hook(lambda *call: seen.append(call[2]))
    logits = model(torch.rand(2, 3, 32, 32, dtype=torch.float64))
    last = seen[0]
    assert last.shape[2:] == (size, size)
    if batchnorm:
        last = activation(norm(model.state_dict(), batchnorm, last))
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    torch.testing.assert_close(logits, last.mean((2, 3)) @ head.weight.T + head.bias)


STEMS = {  # the first stage, and what stands between it and the image
    "resnet18": ("layer1", "conv1", "bn1"),
    "mobilenet_v2": ("layers", "conv1", "bn1"),
    "preact_resnet18": ("layer1", "conv1", None),
    "wrn10_2": ("block1", "conv1", None),
    "dm_wrn10_2": ("layer", "init_conv", None),
}


@pytest.mark.parametrize("name", STEMS)
def test_stems(name):
    model = randomise(models.get(name, width=2))
    stage, convolution, batchnorm = STEMS[name]
    seen, weights = [], model.state_dict()
    getattr(model, stage).register_forward_hook(lambda *call: seen.append(call[1][0]))
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    model(x)
    if name == "dm_wrn10_2":
        x = (x - weights["mean"]) / weights["std"]
    expected = F.conv2d(x, weights[f"{convolution}.weight"], padding=1)
    if batchnorm:
        expected = norm(weights, batchnorm, expected).clamp(min=0)
    torch.testing.assert_close(seen[0], expected)


NAMES = [*zoo.NETWORKS, "wrn10_1", "wrn16_2", "wrn10_1_silu", "dm_wrn10_1", "dm_wrn10_2"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [8, 32])
def test_shapes_gradients_and_the_classifier(name, size):
    model = models.get(name, num_classes=7, in_channels=2, width=6)
    head, seen = [m for m in model.modules() if isinstance(m, nn.Linear)][-1], []
    head.register_forward_hook(lambda *call: seen.append(call[1][0]))
    logits = model(torch.rand(3, 2, size, size))
    assert logits.shape == (3, 7)
    torch.testing.assert_close(logits, F.linear(seen[0], head.weight, head.bias))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in NAMES if n != "wrn16_2"])
def test_frozen_bf16_twins_point_uphill(name):
    torch.manual_seed(0)
    model, x = models.get(name, width=12), torch.rand(8, 3, 32, 32)
    model(x)  # statistics for BatchNorm
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = x.clone().requires_grad_()
        freeze(model, dtype)(leaf).logsumexp(1).sum().backward()
        gradients.append(leaf.grad.flatten())
    assert all(g.isfinite().all() for g in gradients)
    assert F.cosine_similarity(*gradients, dim=0) > 0.9


@pytest.mark.parametrize(
    ("num_classes", "in_channels", "mean", "std"),
    [
        (10, 3, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
        (100, 3, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        (10, 1, (0.5,), (0.5,)),
    ],
)
def test_deepmind_networks_start_with_the_published_statistics(num_classes, in_channels, mean, std):
    model = models.get("dm_wrn10_1", num_classes, in_channels)
    torch.testing.assert_close(model.mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(model.std.flatten(), torch.tensor(std))


def test_vit_block_against_functions():
    torch.manual_seed(0)
    model = models.get("vit_tiny", width=12).double().eval()
    block, x = model.blocks[1], torch.randn(2, 5, 12, dtype=torch.float64)
    attention = block.self_attn
    mixed = F.linear(block.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = mixed.view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)  # [B, heads, tokens, 4] each
    mixed = (q @ k.mT / 2).softmax(-1) @ v
    x_mid = x + attention.out_proj(mixed.transpose(1, 2).reshape(2, 5, 12))
    inner = F.gelu(block.linear1(block.norm2(x_mid)))
    torch.testing.assert_close(block(x), x_mid + block.linear2(inner))
    assert block.linear1.out_features == 48
    assert not torch.equal(block.linear1.weight, model.blocks[0].linear1.weight)


def test_vit_is_the_same_network_where_torch_takes_its_fast_path():
    model, x = models.get("vit_tiny", width=12), torch.rand(4, 3, 32, 32)
    expected = model(x)  # in training mode, with gradients
    with torch.no_grad():
        torch.testing.assert_close(freeze(model)(x), expected)


def test_vit_attends_to_positions():
    torch.manual_seed(0)
    model = models.get("vit_tiny", width=12).double().eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    turned = x.roll(4, 3)  # the same patches in other places
    assert (model(x) - model(turned)).abs().max() > 1e-4
    nn.init.zeros_(model.positions)
    torch.testing.assert_close(model(x), model(turned))


def test_vit_resamples_its_positions_for_other_sizes():
    model = models.get("vit_tiny", width=12).double().eval()
    with torch.no_grad():
        model.positions.copy_(torch.arange(8.0).expand(1, 12, 8, 8))  # the column
    seen = []
    model.blocks.register_forward_hook(lambda *call: seen.append(call[1][0]))
    black = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    model(black)
    columns = (seen[0] - model.patches.bias)[0, :, 0]
    torch.testing.assert_close(columns, torch.tensor([1.5, 5.5, 1.5, 5.5]).double())


def test_vit_takes_whole_patches_and_heads_only():
    with pytest.raises(ValueError, match=r"images are \[32, 30\], must be multiples of 4"):
        models.get("vit_tiny")(torch.rand(1, 3, 32, 30))
    with pytest.raises(ValueError, match="width is 64, must be a multiple of 3"):
        models.get("vit_tiny", width=64)


@pytest.mark.parametrize("name", NAMES)
def test_width_is_the_stems_and_scales_the_rest(name):
    stems, sizes = [], []
    for width in (6, 12):
        model = models.get(name, width=width)
        stems.append(next(m for m in model.modules() if isinstance(m, nn.Conv2d)).out_channels)
        sizes.append([m for m in model.modules() if isinstance(m, nn.Linear)][-1].in_features)
    assert stems == [6, 12]
    assert sizes[1] == 2 * sizes[0]


@pytest.mark.parametrize("width", [0, -4])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "wrn10_1", "vit_tiny"])
def test_impossible_stem_widths(name, width):
    with pytest.raises(ValueError, match=f"width is {width}, must be at least 1"):
        models.get(name, width=width)


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
@pytest.mark.parametrize("kind", ["", "dm_"])
def test_illegal_depths_and_widths(kind, name):
    with pytest.raises(ValueError, match=f"{name}: depth must be 6n"):
        models.get(kind + name)


@pytest.mark.parametrize(
    "name",
    ["resnet", "resnet19", "wrn34", "wrn34_10x", "WRN34_10", "xwrn34_10", "dm_wrn34_10_silu", ""],
)
def test_unknown_names_list_the_known(name):
    with pytest.raises(
        ValueError, match=r"must be one of digits_net, .*vit_tiny, wrn\{depth\}_\{widen\}"
    ):
        models.get(name)
