"""Reads the networks of an evaluation: from runs, and from code of a user's own."""

import json
from pathlib import Path

import torch

from .. import models
from ..attacks.checks import described, whole
from ..engine.query import cast_to, evaluating, logits_of
from ..errors import UsageError
from ..runs import checkpoint
from ..runs.code import bring_in
from ..runs.config import Config
from ..runs.folder import check_classes


def from_run(path, otherwise=""):
    """(model with the weights of a fastadv checkpoint, the Config of its run).

    Raises UsageError naming the file when a run did not write it; otherwise: what to do then, for
    its message.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path is {described(path)}, must be a file or a run's folder")
    path = checkpoint_file(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file (a run's is DIR/best.safetensors)")
    ours = Path(path).suffix == ".safetensors"
    _, metadata = checkpoint.read(path) if ours else (None, None)
    if metadata is None:
        raise UsageError(
            f"{path} is not of a run, must be a run's folder or a .safetensors in it{otherwise}"
        )
    try:
        config = Config.from_json(json.dumps(metadata["config"]))
        classes, channels = (whole(k, metadata[k], 1) for k in ("num_classes", "in_channels"))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: its header is not that of a run ({error})") from error
    model = models.load(config.student, path, classes, channels, config.student_width)
    return model, config


def checkpoint_file(path):
    """The checkpoint that `path` names: a folder stands for the best of its run."""
    return Path(path) / "best.safetensors" if Path(path).is_dir() else path


def from_code(name, path=None):
    """The network that "module:function" returns, with the weights of the file at `path`, if any,
    in eval mode.

    The module is imported and the function called without arguments: only name code you trust.
    Raises UsageError that names what is missing or is no network.
    """
    bring_in("--model-from", name, models.register)
    model = models.get(name)
    if path is not None:
        models.load_weights(model, path)
    return model.eval()


def check_fits(model, dataset, path):
    """Raises UsageError unless the model of `path` takes the data set's images and classes."""
    images = dataset.train.images
    x = torch.zeros(1, *images.shape[1:])
    try:
        with evaluating(model), torch.no_grad():
            output = model(cast_to(model, x))
    except Exception as error:  # whatever a foreign network raises
        raise UsageError(f"{path} does not take images {list(x.shape[1:])}: {error}") from error
    try:
        logits = logits_of(output)
    except TypeError:
        logits = None
    if logits is None or logits.dim() != 2:
        given = type(output).__name__ if logits is None else list(logits.shape)
        raise UsageError(f"{path} returns {given} for one image, must be logits [1, classes]")
    classes = logits.shape[1]
    if classes != dataset.num_classes:
        raise UsageError(f"{path} has {classes} classes, {dataset.name} {dataset.num_classes}")


def check_names(path, dataset):
    """Raises UsageError where the checkpoint at `path` is of a run on classes of other names, or in
    another order, than the data set's. Weights from elsewhere have no names."""
    path = checkpoint_file(path)
    if Path(path).suffix == ".safetensors":
        _, metadata = checkpoint.read(path)
        check_classes(path, metadata or {}, dataset)
