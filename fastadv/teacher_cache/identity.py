"""Fingerprints of all that a teacher's outputs depend on: the key of a cache."""

import dataclasses
import hashlib

import torch

from ..engine.features import unwrapped
from ..engine.frozen import InPrecision
from ..runs.progress import pieces

PLAIN = (bool, int, float, str)


def identity(teacher, loader, outputs):
    """{part: {field: JSON value}} that two caches share exactly when their rows are the same.

    teacher: class, structure, parameters, buffers (BatchNorm statistics, normalisation) and the
    precision it computes in. images: pixels, order and index of the loader's split. augmentation:
    what makes a view of an image; with strong policies that is the seed too. outputs: as given.
    Device, thread count and versions are left out: they move a row by rounding alone.
    """
    inside = isinstance(teacher, InPrecision)
    net, precision = (teacher.net, teacher.dtype) if inside else (teacher, torch.float32)
    if inside and precision == torch.bfloat16 and not teacher.is_low():
        precision = torch.float32  # on a processor without products of bfloat16
    images, index = loader.images, loader.index
    return {
        "teacher": {
            "architecture": type(unwrapped(net)).__name__,
            "structure": _structure(net),
            "parameters": _digest(net.named_parameters(remove_duplicate=False)),
            "buffers": _digest(net.named_buffers(remove_duplicate=False)),
            "precision": str(precision).removeprefix("torch."),
        },
        "images": {
            "count": len(images),
            "shape": list(images.shape[1:]),
            "end": int(index.max()) + 1,
            "pixels": _digest([("images", images), ("index", index)]),
        },
        "augmentation": _augmentation(loader),
        "outputs": outputs,
    }


def differences(asked, found):
    """The fields "part.field" in which two identities differ, sorted; `found` may have more."""
    asked, found = (
        {f"{part}.{name}": value for part in asked for name, value in one[part].items()}
        for one in (asked, found)
    )
    return sorted(k for k in asked.keys() | found.keys() if asked.get(k) != found.get(k))


def _augmentation(loader):
    fields = {"padding": loader.padding, "flips": loader.flips, "views": loader.views}
    if not loader.augmentation.plain:
        fields |= dataclasses.asdict(loader.augmentation) | {"seed": loader.seed}
    # A few views as they come out, so that no other code or setting passes for this one.
    along = torch.arange(512)
    rows, views = (along * (count - 1) // 511 for count in (len(loader.images), loader.views))
    x = loader.view_batch(rows, views).x
    return fields | {"sample": _digest([("x", (x * 255).round().to(torch.uint8))])}


def _structure(net):
    """Digest of every submodule's name, type and plain attributes, such as stride and eps."""
    lines = []
    for name, module in net.named_modules(remove_duplicate=False):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        plain = sorted((k, v) for k, v in vars(module).items() if _is_plain(v))
        loose = ((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, torch.Tensor))
        lines.append(f"{name} {kind} {plain} {_digest(loose)}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_plain(value):
    if isinstance(value, (tuple, list)):
        return all(isinstance(v, PLAIN) for v in value)
    return isinstance(value, PLAIN)


def _digest(named):
    """SHA-256 over names, dtypes, shapes and bytes of (name, tensor) pairs, layout left out."""
    result = hashlib.sha256()
    for name, tensor in named:
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for piece in pieces(tensor):
            result.update(piece)
    return result.hexdigest()
