"""Networks of timm and torchvision, by the names that these libraries list."""

import difflib
import importlib

from ..errors import MissingPackage, UsageError
from .normalized import Normalized

MODULES = {"timm": "timm", "torchvision": "torchvision.models"}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of its colours


def is_of_library(name):
    """Whether `name` is "timm:NAME" or "torchvision:NAME", of whatever NAME."""
    return name.startswith(tuple(f"{library}:" for library in MODULES))


def build(name, num_classes, in_channels):
    """The network "timm:NAME" or "torchvision:NAME" with fresh weights, as a `Normalized` network
    with the statistics that the library's own weights expect.

    Nothing is downloaded, and a name in a stranger's record chooses among the library's networks
    alone: timm itself would take one such as "hf-hub:..." for a place to load from. Raises
    MissingPackage without the library, UsageError for a name that it does not list, for channels
    that it does not take and for what it raises itself.
    """
    library, _, plain = name.partition(":")
    module = _imported(name, MODULES[library])
    known = _listed(library, module)
    if plain not in known:
        near = difflib.get_close_matches(plain, sorted(known), 1)
        hint = f"; did you mean {library}:{near[0]}?" if near else ""
        raise UsageError(
            f"model is {name!r}, must be {library}:NAME of a classifier that "
            f"{MODULES[library]}.list_models() lists{hint}"
        )
    if library == "torchvision" and in_channels != 3:
        raise UsageError(f"{name} takes images of 3 channels, not of {in_channels}")
    try:
        if library == "timm":
            net = module.create_model(
                plain, pretrained=False, num_classes=num_classes, in_chans=in_channels
            )
            return Normalized(net, *_statistics(net.pretrained_cfg, in_channels))
        net = module.get_model(plain, weights=None, num_classes=num_classes)
    except Exception as error:  # whatever the library raises; it is the cause
        raise UsageError(
            f"{name} cannot be made with {num_classes} classes and {in_channels} channels: "
            f"{type(error).__name__}: {error}"
        ) from error
    return Normalized(net, *IMAGENET)


def _imported(name, module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"{name} needs {module.partition('.')[0]}: pip install fastadv[networks] ({error})"
        ) from error
    except RuntimeError as error:  # such as torchvision's beside a torch that it was not built for
        raise UsageError(f"{name} needs {module}, which cannot be imported: {error}") from error


def _listed(library, module):
    """The names of the library's networks, timm's with and without the tag of their weights, as in
    resnet50.a1_in1k. torchvision's detectors and the like are none: they download their parts."""
    if library == "timm":
        return {*module.list_models(), *module.list_models(include_tags=True)}
    return {*module.list_models(module=module)}


def _statistics(cfg, channels):
    """(mean, std) by channel of the images that a timm network was trained on. Images of other
    channels than colours get the average of the colours."""
    pairs = zip((cfg.get("mean"), cfg.get("std")), IMAGENET, strict=True)
    values = [tuple(own or imagenet) for own, imagenet in pairs]
    return [v if len(v) == channels else (sum(v) / len(v),) * channels for v in values]
