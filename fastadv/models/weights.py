"""Reads weight files into networks and writes them: matching keys, statistics of the input, and
RobustBench's layout."""

import io
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..runs import checkpoint
from . import weight_files
from .dm_wide_resnet import DMWideResNet, published_statistics
from .normalized import Normalized
from .zoo import NETWORKS, get

UNUSED = ("sub_block1.",)  # the TRADES WRN-34-10 file carries a stage that its forward never calls
SHOWN = 10  # keys that an error names before "and N more"
WIDE = ("16_8", "22_6", "28_4", "28_10", "34_10", "34_20", "40_2", "70_16", "94_16")
PUBLISHED = [*NETWORKS, *(f"{kind}{size}" for size in WIDE for kind in ("wrn", "dm_wrn"))]


def load(
    name: str,
    path: str | Path,
    num_classes: int = 10,
    in_channels: int = 3,
    width: int | None = None,
) -> nn.Module:
    """The network `get(name, num_classes, in_channels, width)` with the weights in `path`, in eval
    mode.

    Where the file holds the statistics of its input and the network has none, the result is a
    `Normalized` network, which takes [0, 1] images all the same. Raises what `get` and
    `load_weights` raise.
    """
    model = get(name, num_classes, in_channels, width)
    forms = weight_files.read(path)
    _, statistics = _fitting(path, forms, _own(model))
    if statistics and not hasattr(model, "STATISTICS"):
        model = Normalized(model, torch.zeros(in_channels), torch.ones(in_channels))
    _fill(model, path, forms)
    return model.eval()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights in `path` (see `weight_files.read`) into `model`, in place.

    They go by the first of the names `weight_files.forms` that `model` has; so a wrapper of a
    network takes what it has written itself. `sub_block1.*`, which TRADES files carry unused, is
    ignored, BatchNorm batch counters may be absent, and torchvision's `downsample` and `fc` stand
    for `shortcut` and `linear`. Statistics of the input (`weight_files.STATISTICS`: `mu`, `sigma`,
    `normalize.mean` and `normalize.std`, ...) go where a `Normalized` or DeepMind network keeps its
    own, which stay as they are when the file has none. Raises one UsageError that names missing,
    unexpected and misshapen keys, or statistics that `model` has no place for, and then leaves
    `model` untouched; errors of `weight_files.read` pass through.
    """
    _fill(model, path, weight_files.read(path))


def load_pretrained(model: nn.Module, path: str | Path, num_classes: int) -> list[str]:
    """Copy the weights in `path` into `model`, which has `num_classes`, as `load_weights` does;
    only a classifier that the file has for another number of classes keeps the weights that it has.
    Returns the names of the layers that do."""
    return _fill(model, path, weight_files.read(path), num_classes)


def export(model: nn.Module, path: str | Path) -> None:
    """Write `model`'s weights as `{"state_dict": ...}` by torch.save, atomically, for other codes.

    The keys are those of the class that the network's docstring names; at the published width
    RobustBench's class of that name loads the file strictly. A `Normalized` network's `mu` and
    `sigma` stand beside the keys of its net, as there. A DeepMind network's `mean` and `std` are
    left out where they are the published ones, which RobustBench's class takes as arguments.
    Raises OSError naming `path` when the disk refuses.
    """
    weights = model.state_dict()
    if isinstance(model, Normalized):
        weights = {k.removeprefix("net."): v for k, v in weights.items()}
    if isinstance(model, DMWideResNet):
        own = published_statistics(model.logits.out_features, model.init_conv.in_channels)
        own = dict(zip(model.STATISTICS, own, strict=True))
        if all(torch.equal(weights[k].cpu(), v) for k, v in own.items()):
            weights = {k: v for k, v in weights.items() if k not in own}
    weights = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    data = io.BytesIO()
    torch.save({"state_dict": weights}, data)
    checkpoint.atomic_write(path, data.getvalue())


def _own(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that a file must fill: without statistics of the input that we know of."""
    net = model.net if isinstance(model, Normalized) else model
    return {k: v for k, v in net.state_dict().items() if k not in getattr(model, "STATISTICS", ())}


def _fitting(
    path: str | Path, forms: list[dict[str, Tensor]], ours: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, statistics of the input, mean first, or {}) in the first of the file's forms that
    has the names of `ours`, else in the last."""
    for form in forms:
        theirs = form.keys() - ours.keys()
        names = next((pair for pair in weight_files.STATISTICS if theirs & set(pair)), ())
        weights = {k: v for k, v in form.items() if k in ours or not k.startswith(UNUSED)}
        weights = _renamed({k: v for k, v in weights.items() if k not in names}, ours)
        if _names(weights) == _names(ours):
            break
    if absent := [name for name in names if name not in form]:
        raise UsageError(f"{path}: it has statistics of its input, but no {absent[0]}")
    return weights, {name: form[name] for name in names}


def _fill(
    model: nn.Module,
    path: str | Path,
    forms: list[dict[str, Tensor]],
    num_classes: int | None = None,
) -> list[str]:
    """Check all, then copy all: weights into the network, statistics into its buffers. With
    `num_classes`, see `load_pretrained`, whose result it returns."""
    ours = _own(model)
    weights, statistics = _fitting(path, forms, ours)
    net = model.net if isinstance(model, Normalized) else model
    kind = type(net).__name__
    buffers = [getattr(model, name) for name in getattr(model, "STATISTICS", ())]
    _check_statistics(path, kind, statistics, buffers)
    kept = _other_classifier(net, weights, num_classes)
    names = {f"{layer}.{name}" for layer in kept for name in ("weight", "bias")}
    weights = {k: v for k, v in weights.items() if k not in names}
    ours = {k: v for k, v in ours.items() if k not in names}
    if problems := _misfits(ours, weights):
        hint = _likelier(ours, weights)
        raise UsageError(f"{path} does not fit this {kind}: {'; '.join(problems)}{hint}")
    net.load_state_dict(weights, strict=False)
    for buffer, value in zip(buffers, statistics.values(), strict=False):  # or the file has none
        buffer.copy_(value.reshape(buffer.shape))
    return kept


def _other_classifier(
    net: nn.Module, weights: dict[str, Tensor], num_classes: int | None
) -> list[str]:
    """The layers of `net` whose `weights` fit but for being of another number of outputs than
    `num_classes`, the same in all these layers; [] without such layers."""
    found = {}
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            own = {f"{name}.{key}": value.shape for key, value in layer.named_parameters()}
            theirs = {key: weights[key].shape for key in own if key in weights}
            outputs = {shape[:1] for shape in theirs.values()}
            resized = {key: (num_classes, *shape[1:]) for key, shape in theirs.items()}
            if len(outputs) == 1 and outputs != {(num_classes,)} and resized == own:
                found[name] = outputs.pop()
    return [*found] if len({*found.values()}) == 1 else []


def _check_statistics(
    path: str | Path, kind: str, statistics: dict[str, Tensor], buffers: list[Tensor]
) -> None:
    """Raises UsageError unless `statistics` are those of the input of a network with `buffers`."""
    if not statistics:
        return
    if not buffers:
        raise UsageError(
            f"{path} normalises its input, which this {kind} does not: models.load(name, path)"
            " makes a network that does"
        )
    for value, buffer in zip(statistics.values(), buffers, strict=True):
        if value.numel() != buffer.numel():
            raise UsageError(
                f"{path} normalises images of {value.numel()} channels, this {kind} takes"
                f" {buffer.numel()}"
            )
    mean, std = (value.flatten().float() for value in statistics.values())
    if not (((mean >= 0) & (mean <= 1)).all() and (std > 0).all() and std.isfinite().all()):
        first, second = statistics
        raise UsageError(
            f"{path}: {first} is {mean.tolist()} and {second} {std.tolist()}, which are not the"
            " mean and deviation of images in [0, 1]"
        )


def _renamed(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """`theirs` with torchvision's names of a shortcut and a classifier made `ours`."""

    def name(key: str) -> str:
        other = re.sub(r"^fc\.", "linear.", key.replace(".downsample.", ".shortcut."))
        return other if key not in ours and other in ours and other not in theirs else key

    return {name(key): value for key, value in theirs.items()}


def _misfits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """The keys of a file that do not fit a network, one line per kind, `SHOWN` keys in all."""
    kinds = {
        "missing": _names(ours) - theirs.keys(),
        "unexpected": theirs.keys() - ours.keys(),
        "of another shape": {
            f"{k} (the model has {list(ours[k].shape)}, the file {list(theirs[k].shape)})"
            for k in ours.keys() & theirs.keys()
            if ours[k].shape != theirs[k].shape
        },
        "of another kind": {
            f"{k} ({theirs[k].dtype})"
            for k in ours.keys() & theirs.keys()
            if ours[k].is_floating_point() and not theirs[k].is_floating_point()
        },
    }
    kinds = {kind: sorted(found) for kind, found in kinds.items() if found}
    each = SHOWN // max(1, len(kinds))
    return [
        f"{kind} {', '.join(found[:each])}"
        + (f" and {len(found) - each} more" if len(found) > each else "")
        for kind, found in kinds.items()
    ]


def _likelier(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """A hint at the published network that has the file's keys and shapes where `ours` have not."""

    def likeness(state: dict[str, Tensor]) -> tuple[float, int]:
        file = _renamed(theirs, state)
        shared = _names(state) & _names(file)
        share = len(shared) / len(_names(state) | _names(file))
        return share, sum(state[k].shape == file[k].shape for k in shared)

    with torch.device("meta"):
        scores = {name: likeness(get(name).state_dict()) for name in PUBLISHED}
    best = max(scores, key=scores.__getitem__)
    found = scores[best][0] > 0.5 and scores[best] > likeness(ours)
    return f"; its keys fit {best} best" if found else ""


def _names(state: dict[str, Tensor]) -> set[str]:
    """The keys that a file must have: BatchNorm's batch counters may be absent."""
    return {k for k in state if not k.endswith(".num_batches_tracked")}
