"""Weight files as people have them: nothing in them is ever run, and what else they hold is passed
over."""

import contextlib
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, serialization

from ..errors import UsageError
from ..runs import checkpoint

LOADING = threading.RLock()  # torch.load has one list of what it takes, for all threads
CONTAINERS = ("state_dict", "net", "model_state_dict", "model", "model_state", "network", "weights")
CONTAINERS += ("ema", "model_ema", "ema_state_dict", "state_dict_ema")
PREFIXES = ("module.", "model.", "net.", "network.", "_orig_mod.")
# Names under which public files keep the mean and deviation of their input, beside the network;
# "0." is the first layer of nn.Sequential(normalise, net), whose net has the prefix "1.".
STATISTICS = tuple(
    (layer + mean, layer + std)
    for layer in ("", "normalize.", "normalizer.", "norm.", "0.")
    for mean, std in (("mu", "sigma"), ("mean", "std"), ("new_mean", "new_std"))
)
# The network once more, beside itself: in MadryLab's attacker, or averaged, with the count.
COPIES = ("attacker.", "ema.", "model_ema.", "ema_model.", "n_averaged")
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *INTEGERS)

# Names that pickles of public files ask for beside tensors, by module. `Extra` stands in for them.
EXTRAS = {
    "argparse": "Namespace",
    "builtins": "__main__ bool bytes dict float frozenset int list object str tuple",
    "cox.utils": "Parameters",
    "datetime": "date datetime timedelta timezone",
    "dill._dill": "_create_code _create_function _import_module",  # a schedule, in MadryLab's files
    "__main__": "__dict__",  # of that function
    "functools": "partial",
    "numpy": "dtype float32 float64 int64 ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",  # numpy 1
    "numpy._core.multiarray": "_reconstruct scalar",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode",
    "pathlib": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",  # Python 3.13
    "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
    "types": "SimpleNamespace",
    "typing": "Any",
}
EXTRA_DICTS = {
    "addict.addict": "Dict",
    "collections": "defaultdict",
    "easydict": "EasyDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "lightning.fabric.utilities.data": "AttributeDict",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "yacs.config": "CfgNode",
}
EXTRA_CLASSES = {"dill._dill": "_get_attr _load_type"}


class Extra:
    """Stands in for an object that a file holds beside its weights: whatever a pickle makes it of,
    it keeps nothing and does nothing."""

    __slots__ = ()

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, _):
        pass


class ExtraDict:
    """Stands in for a mapping. Its entries are kept, as they may be the weights."""

    def __new__(cls, *_):
        return OrderedDict()


def extra_class(*_):
    """Stands in for a function that returns a class."""
    return Extra


def read(path: str | Path) -> list[dict[str, Tensor]]:
    """A model's state dict {name: CPU tensor} from `.safetensors`, or a `.pt`, `.pth`, `.pth.tar`,
    under each of the names that it may go by, see `forms`.

    Takes the `model.` entries of a fastadv checkpoint; a plain safetensors state dict; or a file of
    torch.save, in which tensors and plain Python are read, the names of `EXTRAS` passed over. The
    first of `CONTAINERS` is opened, and what that holds.
    Raises FileNotFoundError, or UsageError naming the file and the reason: pickled code (refused,
    never run), a web page, damage, no tensors, a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder, must be a file (a run's is DIR/best.safetensors)")
    if path.suffix != ".safetensors":
        return [*forms(_tensors_only(path, _unwrap(_torch_load(path))))]
    tensors, metadata = checkpoint.read(path)
    if metadata is None:
        return [*forms(_tensors_only(path, tensors))]
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    return [*forms(_tensors_only(path, weights))]


def forms(weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """`weights` as they are, then without what wrappers of a network put before its names, one
    prefix after another: one of `PREFIXES` where every key has one, and "1." beside statistics of
    a layer "0."; names of `STATISTICS` stay, `COPIES` of the network go."""
    yield weights
    beside = {name for pair in STATISTICS for name in pair}
    while True:
        net = {k for k in weights.keys() - beside if not k.startswith(COPIES)}
        kept = {k: v for k, v in weights.items() if k in net or k in beside}
        layered = any(k.startswith("0.") for k in weights.keys() & beside)
        prefixes = (*PREFIXES, "1.") if layered else PREFIXES
        if net and all(k.startswith(prefixes) for k in net):
            bare = {k if k in beside else k.partition(".")[2]: v for k, v in kept.items()}
            if len(bare) < len(kept):  # two networks, say, whose keys would fall together
                return
        elif net and len(kept) < len(weights):
            bare = kept
        else:
            return
        weights = bare
        yield weights


def _torch_load(path: Path) -> object:
    with open(path, "rb") as file:  # a missing or unreadable file raises its own OSError here
        head = file.read(64)
    if head.lstrip().startswith(b"<"):
        raise UsageError(f"{path}: a web page (HTML or XML), not weights; download the file again")
    try:
        if head.startswith(b"PK\x03\x04"):
            _check_archive(path)
        with _only_extras():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged input surfaces as nearly any exception type
        raise UsageError(f"{path}: {_reason(error, head)}") from None


def _reason(error: Exception, head: bytes) -> str:
    """Why torch did not read a file that begins with `head`."""
    if isinstance(error, UnpicklingError) and head.startswith((b"\x80", b"PK\x03\x04")):
        name = re.search(r"GLOBAL (\S+)", str(error))
        wanted = f" ({name[1]})" if name else ""
        return (
            f"refused: it holds pickled code{wanted}, not only tensors. Nothing was run; where you"
            " trust its source, save its state dict alone and load that"
        )
    known = "truncated, damaged or not a torch file"
    reason = str(error).partition("\n")[0]
    # torch's own text says how to run what is in the file; a lone key or nothing says nothing.
    telling = " " in reason and not isinstance(error, UnpicklingError)
    return f"{known}: {reason}" if telling else known


@contextlib.contextmanager
def _only_extras() -> Iterator[None]:
    """Has torch.load take its own types and the stand-ins, and nothing that this process allows
    elsewhere: a stand-in in the hands of real code would be an error at best. torch keeps one list
    for all threads: what another one loads meanwhile by torch.load may get stand-ins too."""
    with LOADING:
        before = serialization.get_safe_globals()
        serialization.clear_safe_globals()
        tables = {Extra: EXTRAS, ExtraDict: EXTRA_DICTS, extra_class: EXTRA_CLASSES}
        for stand_in, table in tables.items():
            names = [f"{module}.{name}" for module, text in table.items() for name in text.split()]
            serialization.add_safe_globals([(stand_in, name) for name in names])
        try:
            yield
        finally:
            serialization.clear_safe_globals()
            serialization.add_safe_globals(before)


def _check_archive(path: Path) -> None:
    """Raises ValueError for a TorchScript program, and for a compressed archive, which torch.save
    never writes: it may unfold to any size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise ValueError("a TorchScript program; save its state dict and load that")
    size = sum(entry.file_size for entry in entries)
    if size > path.stat().st_size:
        raise ValueError(f"its {path.stat().st_size} bytes would unfold to {size}")


# Below, methods of the classes: a pickle may set attributes of an OrderedDict, `items` among them,
# and of a tensor.
def _unwrap(content: object) -> object:
    for _ in CONTAINERS:  # bounded: a file may hold a container that holds itself
        if isinstance(content, dict):
            boxes = (dict.get(content, name) for name in CONTAINERS)
            content = next((box for box in boxes if isinstance(box, dict)), content)
    return content


def _tensors_only(path: Path, content: object) -> dict[str, Tensor]:
    entries = dict(dict.items(content)) if isinstance(content, dict) else {}
    if not any(isinstance(value, Tensor) for value in entries.values()):
        raise UsageError(f"{path}: no model weights in it (looked in {', '.join(CONTAINERS)})")
    for name, value in entries.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UsageError(f"{path}: entry {name!r} is {kind}, not a named tensor")
        dense = value.layout == torch.strided and not value.is_nested and value.is_cpu
        if not dense or value.dtype not in DTYPES:
            kind = f"a {value.layout} tensor of {value.dtype} on {value.device}"
            raise UsageError(f"{path}: entry {name!r} is {kind}, must be plain numbers")
    return {name: Tensor.detach(value) for name, value in entries.items()}
