"""Files that survive a crash: checkpoints, and atomic writes."""

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from ..errors import UsageError


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Replace the file at `path` by `data` (text as UTF-8); a crash leaves the old file or the new.

    The bytes go to a temporary file in the same folder, reach the disk, and are then renamed.
    Raises OSError naming `path` when any of it fails; the temporary file is then gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save(path: str | Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write `tensors` and JSON `metadata` as one safetensors file, atomically.

    Tensors may be on any device, have any strides and share memory: each is stored contiguous.
    Raises OSError naming `path` when the disk refuses, TypeError when `metadata` is not JSON, and
    ValueError for a tensor that safetensors cannot hold. An earlier file survives all three.
    """
    text = json.dumps(metadata)
    dense = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    header = {"fastadv": text, "crc32": _crc32(dense, text)}
    try:
        data = serialize(dense, header)
    except (KeyError, SafetensorError) as error:  # an unknown dtype is a bare KeyError
        raise ValueError(f"{path}: safetensors cannot store these tensors: {error}") from error
    atomic_write(path, data)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The (tensors, metadata) that `save` wrote, on the CPU.

    Raises FileNotFoundError, or UsageError naming the file when it is truncated, damaged or not a
    fastadv checkpoint.
    """
    tensors, metadata = read(path)
    if metadata is None:
        raise UsageError(f"{path}: not a fastadv checkpoint (its header has no 'fastadv' entry)")
    return tensors, metadata


def read(path: str | Path) -> tuple[dict[str, Tensor], dict | None]:
    """The (tensors, metadata) of a safetensors file on the CPU; metadata is None where `save` did
    not write the file. Raises FileNotFoundError, or UsageError for what is truncated or damaged."""
    try:
        with safe_open(path, "pt") as file:
            names, header = file.keys(), file.metadata() or {}
            # Copies: get_tensor maps the file, which a later writer may change or cut short.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: truncated, damaged or not safetensors: {error}") from error
    return tensors, _verified_metadata(path, tensors, header) if "fastadv" in header else None


def sync_folder(folder: Path) -> None:
    """Has the names of the files in `folder` reach the disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(tensors: Mapping[str, Tensor], text: str) -> str:
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def _verified_metadata(path: str | Path, tensors: dict, header: dict) -> dict:
    if _crc32(tensors, header["fastadv"]) != header.get("crc32"):
        raise UsageError(f"{path}: damaged: the contents do not match their checksum")
    try:
        metadata = json.loads(header["fastadv"])
    except json.JSONDecodeError:
        metadata = None
    if not isinstance(metadata, dict):
        raise UsageError(f"{path}: not a fastadv checkpoint (its 'fastadv' entry is no object)")
    return metadata
