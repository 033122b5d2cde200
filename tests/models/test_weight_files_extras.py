"""Files as people have them: what else they hold is passed over, and nothing in them ever runs."""

import argparse
import collections
import datetime
import functools
import io
import os
import pathlib
import pickle
import time
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from small_weights import WEIGHTS, read, same
from torch import serialization

from fastadv.models import weight_files


class Written:
    def __call__(self):
        """So that pickle writes calls of it."""


class Made(Written):
    """Pickles into a call of `function` on `args`, then into what `state` and `items` add."""

    def __init__(self, function, *args, state=None, items=None):
        self.parts, self.items = (function, args, state, None), items

    def __reduce__(self):
        return *self.parts, self.items and iter(self.items.items())


class Named(Written):
    """Pickles into the bare name `module.name`, which need not exist here."""

    def __init__(self, module, name):
        self.text = f"c{module}\n{name}\n".encode()


class Stored:
    """Pickles into a request for the storage `key`."""

    def __init__(self, key):
        self.key = key


class Pickler(pickle._Pickler):
    def save(self, item, *args, **kwargs):
        if isinstance(item, Named):
            self.write(item.text)
        elif isinstance(item, Stored):
            super().save(item.key)
            self.write(pickle.BINPERSID)
        else:
            super().save(item, *args, **kwargs)


def write(path, content, writer="zip"):
    """torch.save by the pickler above."""
    own = types.ModuleType("own")
    own.Pickler, own.dump = Pickler, pickle.dump
    new = writer == "zip"
    torch.save(content, path, pickle_module=own, _use_new_zipfile_serialization=new)


def rewrite(path, change):
    """Applies `change` to the pickle in a zip file of torch.save, or to a whole legacy file."""
    if not zipfile.is_zipfile(path):
        path.write_bytes(change(path.read_bytes()))
        return
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def madrys_schedule():
    """A function as dill writes it, with its code's type and globals by name."""
    code = Made(Made(Named("dill._dill", "_load_type"), "CodeType"), 1, b"d\x00")
    here = Made(Named("dill._dill", "_import_module"), "torch")
    function = Named("dill._dill", "_create_function")
    return Made(function, code, {"torch": here, "main": Named("__builtin__", "__main__")}, "lr")


ARGS = argparse.Namespace(lr=0.1, data=pathlib.PurePosixPath("/data"), type=int, device="cuda")
HARMLESS = {
    "numpy scalars": lambda: {
        "best": np.float64(0.5),
        "epoch": np.int64(3),
        "flag": np.bool_(True),
    },
    "numpy arrays": lambda: {
        "curve": np.arange(3.0),
        "none": np.zeros(0),
        "f": np.asfortranarray(np.ones((2, 2))),
    },
    "numpy text": lambda: [np.str_("best"), np.array(["a", "b"]), np.datetime64("2024-01-01")],
    "numpy's random state": lambda: np.random.RandomState(0).get_state(),
    "numpy objects": lambda: np.array([1, "a", None], dtype=object),
    "numpy types": lambda: {"dtype": np.dtype("float32"), "kind": np.float32},
    "arguments": lambda: ARGS,
    "a namespace": lambda: types.SimpleNamespace(lr=0.1, inner=types.SimpleNamespace(a=1)),
    "paths": lambda: [pathlib.PosixPath("/a/b"), pathlib.PureWindowsPath("C:/a")],
    "paths of Windows": lambda: Made(Named("pathlib", "WindowsPath"), "C:\\", "a"),
    "paths of Python 3.13": lambda: Made(Named("pathlib._local", "PosixPath"), "/", "a"),
    "times": lambda: [datetime.datetime(2024, 1, 1), datetime.timedelta(1), datetime.date.today()],
    "a defaultdict": lambda: collections.defaultdict(list, {"loss": [1.0]}),
    "a defaultdict of arrays": lambda: collections.defaultdict(float, {1: np.float64(2)}),
    "an OrderedDict": lambda: collections.OrderedDict(a=collections.OrderedDict(b=1)),
    "a counter": lambda: collections.Counter("robust"),
    "devices and shapes": lambda: [torch.device("cuda:1"), torch.Size([2]), torch.bfloat16],
    "a partial": lambda: functools.partial(int, base=2),
    "keys that are no text": lambda: {pathlib.PosixPath("a"): 1, np.float64(1.5): 2},
    "MadryLab's arguments": lambda: Made(Named("cox.utils", "Parameters"), state={"params": {}}),
    "MadryLab's schedule": madrys_schedule,
    "Lightning's settings": lambda: Made(
        Named("pytorch_lightning.utilities.parsing", "AttributeDict"), items={"lr": 0.1}
    ),
    "Hydra's settings": lambda: Made(
        Named("omegaconf.dictconfig", "DictConfig"),
        state={"_content": {"lr": Made(Named("omegaconf.nodes", "AnyNode"), state={"_val": 1})}},
    ),
    "an EasyDict": lambda: Made(Named("easydict", "EasyDict"), items={"a": 1}, state={"a": 1}),
    "a scheduler's and an optimiser's state": lambda: {
        "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]).state_dict(),
        "scheduler": {"milestones": collections.Counter({100: 1}), "_last_lr": [0.1]},
    },
}


@pytest.mark.parametrize("writer", ["zip", "legacy"])
@pytest.mark.parametrize("case", HARMLESS)
def test_what_lies_beside_the_weights_is_passed_over(tmp_path, case, writer):
    path = tmp_path / "a.pt"
    write(path, {"extra": HARMLESS[case](), "state_dict": WEIGHTS}, writer)
    assert same(read(path))


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpy_1_and_2_write_other_names(tmp_path, core):
    path = tmp_path / "a.pt"
    write(path, {"net": WEIGHTS, "acc": [np.float64(0.5), np.ones(3)]})
    rewrite(path, lambda data: data.replace(b"numpy._core.", f"numpy.{core}.".encode()))
    with zipfile.ZipFile(path) as archive:
        assert f"numpy.{core}.multiarray\nscalar".encode() in archive.read("a/data.pkl")
    assert same(read(path))


@pytest.mark.parametrize("box", weight_files.CONTAINERS)
def test_weights_in_a_mapping_of_another_kind(tmp_path, box):
    path = tmp_path / "a.pt"
    write(path, {box: Made(Named("easydict", "EasyDict"), items=dict(WEIGHTS)), "n": 1})
    assert same(read(path))
    write(path, collections.defaultdict(dict, {box: collections.defaultdict(int, WEIGHTS)}))
    assert same(read(path))


def test_nothing_else_becomes_allowed(tmp_path, monkeypatch):
    """Neither for others after a read, nor for a read what others allow."""
    monkeypatch.setattr(torch._weights_only_unpickler, "_marked_safe_globals_set", set())
    serialization.add_safe_globals([time.time, (time.time, "argparse.Namespace")])
    before = set(serialization.get_safe_globals())
    path = tmp_path / "a.pt"
    for extra, refused in ((ARGS, False), (Made(time.time), True)):
        write(path, {"net": WEIGHTS, "extra": extra})
        if refused:
            with pytest.raises(ValueError, match="refused: it holds pickled code"):
                read(path)
        else:
            assert same(read(path))
        assert set(serialization.get_safe_globals()) == before


SCALAR, RECONSTRUCT = np.float64(0).__reduce__()[0], np.array(0).__reduce__()[0]


def code(bait):
    """{what a hostile file tries: its object}; each of them would make the file `bait`."""
    call = Made(open, bait, "w")
    array = Made(np.array, [0])
    return {
        "a call": call,
        "a shell": Made(os.system, f"touch {bait}"),
        "a call in a Namespace": argparse.Namespace(lr=0.1, run=call),
        "a Namespace with a state that is a call": Made(argparse.Namespace, state=call),
        "a Namespace that gets a __setstate__": Made(
            argparse.Namespace, state={"__setstate__": open, "__class__": call}
        ),
        "an array of objects": np.array([call], dtype=object),
        "an array whose type is a call": Made(RECONSTRUCT, call, (0,), b"b"),
        "an array whose state is a call": Made(RECONSTRUCT, np.ndarray, (0,), b"b", state=call),
        "a scalar of a call": Made(SCALAR, call, b"\0"),
        "a scalar whose bytes are a call": Made(SCALAR, np.dtype("O"), call),
        "a dtype of a call": Made(np.dtype, call),
        "a dtype whose fields are a call": Made(
            np.dtype, "V8", state=(3, "|", call, call, 8, 1, 0)
        ),
        "a defaultdict whose factory is code": collections.defaultdict(open, {"a": 1}),
        "a defaultdict of a call": Made(collections.defaultdict, call),
        "an OrderedDict of a call": Made(collections.OrderedDict, call),
        "an OrderedDict with a state that is a call": Made(collections.OrderedDict, state=call),
        "a Counter of a call": Made(collections.Counter, call),
        "a path of a call": Made(pathlib.PosixPath, call),
        "a path that writes": Made(
            Named("pathlib", "Path.write_text"), pathlib.PosixPath(bait), ""
        ),
        "a date of a call": Made(datetime.datetime, call),
        "a partial of code": functools.partial(open, bait, "w"),
        "a partial of a partial": Made(functools.partial(open, bait, "w")),
        "getattr": Made(getattr, argparse.Namespace(), "__class__"),
        "a Namespace's class's parts": Made(Named("argparse", "Namespace.__init__.__globals__")),
        "argparse's opener of files": Made(argparse.FileType("w"), bait),
        "numpy's reader of pickles": Made(np.load, bait, None, True),
        "numpy's writer of files": Made(np.ndarray.tofile, array, bait),
        "a module's attribute": Made(Named("pathlib", "os.system"), f"touch {bait}"),
        "builtins": Made(eval, f"open({bait!r}, 'w')"),
        "a module of Python 2": Made(Named("__builtin__", "execfile"), bait),
        "torch's own loader": Made(torch.load, bait, None, None, False),
        "a tensor made by code": Made(
            torch._tensor._rebuild_from_type_v2, open, torch.Tensor, (bait, "w"), {}
        ),
        "a tensor on the storage of a call": Made(
            torch._utils._rebuild_tensor_v2, call, 0, (1,), (1,), False, {}
        ),
        "a stand-in by its own name": Made(
            Named("fastadv.runs.checkpoint", "atomic_write"), bait, ""
        ),
        "a key that is a call": {Made(open, bait, "w"): 1},
    }


def bare(content):
    """That pickle alone, such as pickle.dump writes."""
    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    return file.getvalue()


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("case", code(""))
def test_code_is_refused_and_not_run(tmp_path, case, writer):
    bait, path = tmp_path / "bait", tmp_path / "evil.pt"
    content = {"state_dict": WEIGHTS, "extra": code(str(bait))[case]}
    if writer == "pickle":
        path.write_bytes(bare(content["extra"]))
    else:
        write(path, content, writer)
    with pytest.raises(ValueError, match=r"evil\.pt: refused: it holds pickled code") as caught:
        read(path)
    assert "weights_only" not in str(caught.value)  # torch's own text suggests running the code
    assert not bait.exists()


HUGE = 2**52
# Hostile arguments of names that are passed over: nothing is made of them.
ARGUMENTS = {
    "an enormous array": Made(RECONSTRUCT, np.ndarray, (HUGE,), b"b"),
    "an array that grows": Made(
        RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (HUGE,), np.dtype("f8"), False, b"")
    ),
    "pointers as objects": Made(SCALAR, np.dtype("O"), b"\x41" * 8),
    "an array of pointers": Made(
        RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, b"\x41" * 8)
    ),
    "a dtype that lies": Made(np.dtype, "i8", state=(3, "<", None, None, None, -1, -1, 63)),
    "an enormous dtype": Made(np.dtype, f"V{2**31 - 1}"),
    "arguments of wrong kinds": Made(RECONSTRUCT, 1, {2: 3}, None, state=4),
    "a Namespace of another class": Made(
        argparse.Namespace, state={"__class__": int, "__dict__": {"__setstate__": 1}}
    ),
    "a Namespace with slots": Made(argparse.Namespace, state=(None, {"__class__": dict})),
    "a defaultdict of no function": Made(collections.defaultdict, 5),
    "an enormous range": Made(Named("__builtin__", "list"), HUGE),
    "a path of numbers": Made(pathlib.PosixPath, 1, 2),
    "an OrderedDict with methods of its own": Made(
        collections.OrderedDict, state={"items": 1, "keys": int, "get": None, "__class__": dict}
    ),
}


@pytest.mark.parametrize("writer", ["zip", "legacy"])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_hostile_arguments_are_never_looked_at(tmp_path, case, writer):
    path = tmp_path / "odd.pt"
    for name in ("extra", "net", "model"):  # before and in the place of a container
        write(path, {name: ARGUMENTS[case], "state_dict": WEIGHTS}, writer)
        assert same(read(path))


def test_weights_in_an_ordered_dict_with_methods_of_its_own(tmp_path):
    own = {"items": 1, "values": int, "keys": None, "get": int, "__class__": dict}
    weights = Made(collections.OrderedDict, items=WEIGHTS, state=own)
    for content in (weights, Made(collections.OrderedDict, items={"net": weights}, state=own)):
        write(tmp_path / "odd.pt", content)
        assert same(read(tmp_path / "odd.pt"))


# In the place of a weight; what is said of it.
ODD = {
    "an array": (np.ones(3), "entry 'a' is Extra, not a named tensor"),
    "a number": (3, "entry 'a' is int, not a named tensor"),
    "sparse": (torch.eye(3).to_sparse(), "is a torch.sparse_coo tensor of torch.float32 on cpu"),
    "vast and sparse": (
        torch.sparse_coo_tensor(torch.zeros(1, 0).long(), torch.zeros(0), (HUGE,)),
        "is a torch.sparse_coo tensor",
    ),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "torch.strided"),
    "nowhere": (torch.ones(3, device="meta"), "tensor of torch.float32 on meta"),
    "complex": (torch.ones(3) + 1j, "tensor of torch.complex64 on cpu, must be plain numbers"),
    "8 bits": (torch.ones(3).to(torch.float8_e4m3fn), "tensor of torch.float8_e4m3fn"),
    "quantised": (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "torch.qint8"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.filterwarnings("ignore")  # torch's, of sparse and quantised tensors
def test_weights_are_plain_tensors(tmp_path, case):
    value, message = ODD[case]
    value = value() if callable(value) else value  # whose making warns
    write(tmp_path / "odd.pt", {"net": {"a": value, "b": torch.ones(1)}})
    with pytest.raises(ValueError, match=rf"odd\.pt: .*{message}"):
        read(tmp_path / "odd.pt")


@pytest.mark.parametrize("content", [np.ones(3), ARGS, {"net": ARGS}, [ARGS]])
def test_extras_are_no_weights(tmp_path, content):
    write(tmp_path / "none.pt", content)
    with pytest.raises(ValueError, match=r"none\.pt: no model weights"):
        read(tmp_path / "none.pt")


def test_a_tensor_with_attributes_is_its_numbers(tmp_path):
    tensor = torch.ones(2)
    tensor.detach = tensor.note = 5
    write(tmp_path / "a.pt", {"a": tensor, "b": torch.nn.Parameter(torch.ones(1))})
    found = read(tmp_path / "a.pt")
    assert [type(value) for value in found.values()] == [torch.Tensor, torch.Tensor]
    assert torch.equal(found["a"], torch.ones(2))
    assert not hasattr(found["a"], "note")
    assert not found["b"].requires_grad


PLACE = ("storage", torch.FloatStorage, "0", "cpu", 1)
PERSISTENT = [
    "storage",
    ("module", open, "source", "code"),
    ("storage", torch.float32, "0", "cpu", HUGE),
    ("storage", torch.FloatStorage, "../data", "cpu", 1),
    ("storage", torch.FloatStorage, "0", "cuda:99", HUGE),
    ("storage", torch.FloatStorage, "0", "cpu", -1),
    ("storage",),
    5,
]


@pytest.mark.parametrize("writer", ["zip", "legacy"])
@pytest.mark.parametrize("key", PERSISTENT)
def test_storages_that_are_not_there(tmp_path, key, writer):
    path = tmp_path / "odd.pt"
    write(path, {"net": {"a": Stored(key)}, "rest": torch.ones(1)}, writer)
    with pytest.raises(ValueError, match=r"odd\.pt: "):
        read(path)


def test_a_tensor_larger_than_its_storage(tmp_path):
    path = tmp_path / "odd.pt"
    parts = Made(torch._utils._rebuild_tensor_v2, Stored(PLACE), 0, (HUGE,), (1,), False, {})
    write(path, {"net": {"a": parts}, "rest": torch.ones(1)})
    with pytest.raises(ValueError, match=r"odd\.pt: truncated, damaged"):
        read(path)


def repacked(path, compression):
    """Writes the zip file `path` anew and returns its bytes."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path.read_bytes()


def test_archives_that_unfold_are_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    write(path, {"net": WEIGHTS, "rest": torch.zeros(100_000)})
    repacked(path, zipfile.ZIP_STORED)
    assert same(read(path))
    size = len(repacked(path, zipfile.ZIP_DEFLATED))
    assert size < 10_000
    with pytest.raises(ValueError, match=rf"bomb\.pt: .*its {size} bytes would unfold to 40"):
        read(path)


def test_entries_that_share_their_bytes_are_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    write(path, {"net": WEIGHTS, "rest": torch.zeros(10_000)})
    content = repacked(path, zipfile.ZIP_STORED)
    directory, end = content.index(b"PK\x01\x02"), content.rindex(b"PK\x05\x06")
    listed, last = content[directory:end], bytearray(content[end:])
    count = int.from_bytes(last[8:10], "little")
    last[8:12] = 2 * (9 * count).to_bytes(2, "little")
    last[12:16] = (9 * len(listed)).to_bytes(4, "little")
    path.write_bytes(content[:directory] + 9 * listed + last)
    with pytest.raises(ValueError, match=r"bomb\.pt: .* bytes would unfold to"):
        read(path)


def test_a_torchscript_program_is_called_one(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: .*a TorchScript program; save its state dict"):
        read(tmp_path / "a.pt")


def test_threads_that_load_leave_torchs_own_list_as_it_was(tmp_path):
    before = serialization.get_safe_globals()
    torch.save({"state_dict": WEIGHTS}, tmp_path / "weights.pt")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, [tmp_path / "weights.pt"] * 64))
    assert all(weights.keys() == WEIGHTS.keys() for weights in found)
    assert serialization.get_safe_globals() == before
