"""Which backend an op runs on a GPU, and why CUDA C++ is left out; none of it needs a GPU."""

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch

from fastadv.ops import _library, _native


@pytest.fixture
def machine(monkeypatch):
    """A function that pretends a build, a driver and GPUs of these capabilities."""

    def pretend(built=13000, driver=13000, capabilities=((9, 0),), missing=None):
        compiled = SimpleNamespace(cuda_driver=lambda: driver)
        if built:
            compiled.cuda_built = built
        monkeypatch.setattr(_native, "_C", compiled)
        monkeypatch.setattr(_native, "missing", missing)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        return _native.cuda_missing.__wrapped__()

    return pretend


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, None),
        ({"driver": 13020, "built": 13000}, None),
        ({"driver": 13000, "built": 13020}, None),  # of one major version
        ({"driver": 13000, "built": 12080}, None),
        ({"capabilities": ((8, 0), (12, 0))}, None),
        ({"missing": "fastadv._C is not there"}, "fastadv._C is not there"),
        ({"built": None}, "fastadv._C was built without nvcc 12.8 or newer"),
        ({"capabilities": ()}, "no CUDA device"),
        ({"driver": 12090}, "fastadv._C was built with CUDA 13, the driver is for CUDA 12"),
        ({"driver": 0}, "fastadv._C was built with CUDA 13, the driver is for CUDA 0"),
        (
            {"capabilities": ((9, 0), (7, 5))},
            "cuda:1 has compute capability 7.5, must be 8.0 or higher",
        ),
    ],
)
def test_reasons_against_cuda(machine, facts, reason):
    assert machine(**facts) == reason


@pytest.fixture
def choose(monkeypatch):
    """A function that gives what on_gpu makes of an op, with implementations that name themselves.
    The CUDA kernel takes even numbers."""

    def chosen(backend, no_cuda=None, no_triton=None, name="pgd_step", takes=True):
        monkeypatch.setattr(_library, "backend", lambda: backend)
        monkeypatch.setattr(_native, "cuda_missing", lambda: no_cuda)
        monkeypatch.setattr(_library, "triton_missing", lambda: no_triton)
        function, text = _library.on_gpu(
            name,
            lambda x: "reference",
            lambda x: "cuda",
            lambda: lambda x: "triton",
            (lambda x: bool(x % 2 == 0)) if takes else None,
            _library.not_double,
        )
        odd, even, double = torch.tensor(1), torch.tensor(2), torch.tensor(1.0).double()
        return text, [function(x) for x in (even, odd, double)]

    return chosen


def test_choice(choose):
    cuda, triton = ["cuda", "triton", "reference"], ["triton", "triton", "reference"]
    plain = ["reference"] * 3
    without = ["cuda", "reference", "reference"]
    assert choose("auto") == choose("cuda") == ("cuda, else triton", cuda)
    assert choose("triton") == ("triton", triton)
    assert choose("auto", no_cuda="why") == ("triton", triton)
    assert choose("auto", no_triton="why") == ("cuda, else reference (why)", without)
    assert choose("auto", "why", "why not") == ("reference (why not)", plain)
    for backend in ("native", "reference"):
        assert choose(backend) == (f"reference (FASTADV_BACKEND={backend})", plain)
    assert choose("cuda", takes=False) == ("triton", triton)


def test_auto_follows_the_table(choose, monkeypatch):
    monkeypatch.setitem(_library.ON_GPU, "pgd_step", "triton")
    assert choose("auto")[0] == "triton"
    assert choose("cuda")[0] == "cuda, else triton"
    assert set(_library.ON_GPU) <= set(_library.ops)


def test_backend_is_refused_or_says_what_it_goes_without(monkeypatch, caplog):
    monkeypatch.setattr(_native, "cuda_missing", lambda: "the driver is old")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("FASTADV_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="FASTADV_BACKEND is cuda, but the driver is old"):
        _library.backend.__wrapped__()
    monkeypatch.setenv("FASTADV_BACKEND", "auto")
    with caplog.at_level(logging.WARNING, logger="fastadv"):
        assert _library.backend.__wrapped__() == "auto"
    assert "CUDA ops run without CUDA C++: the driver is old" in caplog.text


def test_which_calls_cuda_takes():
    def takes(op, *args):
        return importlib.import_module(f"fastadv.ops.{op}")._cuda(*args)

    x = torch.rand(2, 3, 4, 4)
    for v, norm, expected in (
        (x, "linf", True),
        (x.contiguous(memory_format=torch.channels_last), "linf", True),
        (x, "l2", False),
        (x.double(), "linf", False),
        (x[..., ::2], "linf", False),
    ):
        assert takes("pgd_step", v, v, v, None, 0.1, 0.1, norm, 0.0, 1.0) == expected
    seed = torch.tensor(0)
    for v, init, norm, expected in (
        (x, "uniform", "linf", True),
        (x, "uniform", "l2", False),
        (x, "gaussian", "linf", False),
        (x, "zero", "linf", False),
        (x.double(), "uniform", "linf", False),
    ):
        rest = 1e-3, 0, 0, 0.0, 1.0
        assert takes("random_start", v, seed, None, None, 0.1, init, norm, *rest) == expected
    for shape, dtype, reduction, expected in (
        ((1638, 10), torch.float32, "batchmean", True),
        ((1639, 10), torch.float32, "batchmean", False),
        ((1639, 10), torch.bfloat16, "none", True),
        ((2, 64), torch.float16, "sum", True),
        ((2, 65), torch.float16, "none", False),
        ((2, 10), torch.float64, "none", False),
    ):
        z = torch.empty(shape, dtype=dtype)
        args = z, z, None, 1.0, reduction, True, True, True
        assert takes("softmax_kl", *args) == expected


@pytest.fixture
def launch(monkeypatch):
    """_native.run for a call on cuda:1, its stream 77, with a kernel that returns `error`."""
    seen = []

    def run(error):
        kernels = SimpleNamespace(cuda_pgd_step=lambda *args: seen.append(args) or error)
        monkeypatch.setattr(_native, "_C", kernels)
        stream = SimpleNamespace(cuda_stream=77)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda i: stream if i == 1 else None)
        _native.run("pgd_step", 1, "a", "b")
        return seen

    return run


def test_launches_go_to_the_current_stream_of_the_device(launch):
    assert launch(None) == [("a", "b", 1, 77)]


def test_a_failed_launch_raises(launch):
    with pytest.raises(RuntimeError, match="pgd_step on cuda:1: out of memory"):
        launch("out of memory")


def test_addresses_are_of_one_device():
    x = torch.ones(2)
    with pytest.raises(TypeError, match="x is torch.float32 on cpu, must be torch.float32 on cuda"):
        _native.addresses(0, torch.float32, x=x)
    with pytest.raises(TypeError, match="on meta, must be torch.float32 on cpu"):
        _native.addresses(_native.CPU, torch.float32, x=x.to("meta"))
    with pytest.raises(TypeError, match="on meta, must be torch.float32 on cuda:0"):
        _native.addresses(0, torch.float32, x=x.to("meta"))


compiled = pytest.mark.skipif(
    not hasattr(_native._C, "cuda_built"), reason="built without CUDA kernels"
)


@compiled
def test_what_has_no_kernel_is_refused_before_any_launch():
    kernels, no = _native._C, "no CUDA kernel takes this norm or init"
    assert kernels.cuda_pgd_step(*[0] * 5, 1, 1, 0.1, 0.1, "l2", 0.0, 1.0, 0, 0) == no
    for init, norm in (("uniform", "l2"), ("gaussian", "linf")):
        args = *[0] * 5, 1, 1, 1, 0.1, init, norm, 0.1, 0, 0, 0.0, 1.0, 0, 0
        assert kernels.cuda_random_start(*args) == no


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_a_launch_says_so():
    step = [0] * 5 + [1, 1, 0.1, 0.1, "linf", 0.0, 1.0, 0, 0]
    assert "driver" in _native._C.cuda_pgd_step(*step)
    assert _native._C.cuda_driver() == 0
