"""Files that survive a crash and run no code: checkpoints, atomic writes, imported weights."""

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

CONTAINERS = ("state_dict", "net", "model_state_dict", "model", "ema")
PREFIXES = ("module.", "model.", "net.")
# Names under which public files keep the mean and deviation of their input, beside the network.
STATISTICS = (("mu", "sigma"), ("mean", "std"), ("normalize.mean", "normalize.std"))


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
        _sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    finally:
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

    Raises FileNotFoundError, or ValueError naming the file when it is truncated, damaged or not a
    fastadv checkpoint.
    """
    tensors, header = _read_safetensors(path)
    if "fastadv" not in header:
        raise ValueError(f"{path}: not a fastadv checkpoint (its header has no 'fastadv' entry)")
    return tensors, _verified_metadata(path, tensors, header)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A model's state dict {name: CPU tensor} from `.safetensors`, or a `.pt`, `.pth`, `.pth.tar`.

    Takes the `model.` entries of a fastadv checkpoint, a plain safetensors state dict, or what
    `torch.load(weights_only=True)` accepts. Containers (`state_dict`, `net`, `model_state_dict`,
    `model`, `ema`) are opened; `module.`, `model.` and `net.` are removed where every key starts
    with one of them, names of `STATISTICS` aside.
    Raises FileNotFoundError, or ValueError naming the file and the reason: pickled code (refused,
    never run), a web page, damage, no tensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return _strip_prefixes(_tensors_only(path, _unwrap(_torch_load(path))))
    tensors, header = _read_safetensors(path)
    if "fastadv" not in header:
        return _strip_prefixes(_tensors_only(path, tensors))
    _verified_metadata(path, tensors, header)
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    return _tensors_only(path, weights)


def _sync_folder(folder: Path) -> None:
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


def _read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            names, header = file.keys(), file.metadata() or {}
            # Copies: get_tensor maps the file, which a later writer may change or cut short.
            return {name: file.get_tensor(name).clone() for name in names}, header
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated, damaged or not safetensors: {error}") from error


def _verified_metadata(path: str | Path, tensors: dict, header: dict) -> dict:
    if _crc32(tensors, header["fastadv"]) != header.get("crc32"):
        raise ValueError(f"{path}: damaged: the contents do not match their checksum")
    return json.loads(header["fastadv"])


def _torch_load(path: Path) -> object:
    with open(path, "rb") as file:  # a missing or unreadable file raises its own OSError here
        head = file.read(64)
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{path}: a web page (HTML or XML), not weights; download the file again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged input surfaces as nearly any exception type
        if isinstance(error, UnpicklingError) and head.startswith((b"\x80", b"PK\x03\x04")):
            name = re.search(r"GLOBAL (\S+)", str(error))
            wanted = f" ({name[1]})" if name else ""
            raise ValueError(
                f"{path}: refused: it holds pickled code{wanted}, not only tensors. Nothing was"
                " run; where you trust its source, save its state dict alone and load that"
            ) from None
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: truncated, damaged or not a torch file: {reason}") from None


def _unwrap(content: object) -> object:
    for _ in CONTAINERS:  # bounded: a file may hold a container that holds itself
        if isinstance(content, Mapping):
            boxes = (content[k] for k in CONTAINERS if isinstance(content.get(k), Mapping))
            content = next(boxes, content)
    return content


def _tensors_only(path: Path, content: object) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path}: no model weights in it (looked in {', '.join(CONTAINERS)})")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{path}: entry {name!r} is {kind}, not a named tensor")
    return {name: value.detach() for name, value in content.items()}


def _strip_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    beside = {name for pair in STATISTICS for name in pair}
    while all(k.startswith(PREFIXES) or k in beside for k in weights) and weights.keys() - beside:
        bare = {k if k in beside else k.partition(".")[2]: v for k, v in weights.items()}
        if len(bare) < len(weights):  # two networks, say, whose keys would fall together
            break
        weights = bare
    return weights
