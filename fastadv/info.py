"""`python -m fastadv.info`: what is compiled in, which backend each op uses here, and why."""

import importlib.util
import os
import platform

import torch

from . import __version__
from .ops import _library, _native


def isa():
    """The CPU instruction set in use, or None without the compiled module."""
    return None if _native.missing else _native.isa()


def engine():
    """What the twins of `freeze` compute with on this CPU."""
    if _native.missing or _library.backend() not in ("auto", "native"):
        return "none, twins run as plain torch"
    if _native.isa() in _native.WITH_BF16:
        return f"bfloat16 by {_native.isa()}, or float32"
    if _native.isa() == "scalar":
        return "torch's convolutions, in float32: no vector instructions in use"
    return f"float32 only: {_native.isa()} has no bfloat16"


def report():
    """The text that `python -m fastadv.info` prints."""
    compiled = _native.missing or f"{_native.isa()} in use; can run {', '.join(_native.isas())}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [
        f"fastadv {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"CPU kernels:    {compiled}; {torch.get_num_threads()} threads",
        f"attack engine:  {engine()}",
        f"CUDA kernels:   {_native.cuda_missing() or 'can run'}",
        f"Triton kernels: {_library.triton_missing() or 'can run'}",
        f"GPU:            {gpu}",
        "",
        f"{'op':18} {'on cpu':38} on cuda",
        *(f"{name:18} {op.cpu:38} {op.cuda}" for name, op in _library.ops.items()),
        "",
        *(f"{name}={os.environ.get(name, '')}" for name in ("FASTADV_BACKEND", "FASTADV_CPU_ISA")),
    ]
    for extra in ("sklearn", "matplotlib"):
        if importlib.util.find_spec(extra) is None:
            lines.append(f"{extra} is not installed: pip install 'fastadv[demo]'")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
