"""`python -m fastadv.info`: versions and machine, what is compiled in, which backend each op uses
here, and why. A bug report has all of it."""

import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path

import torch

from . import __version__
from .errors import Parser
from .ops import _library, _native

SWITCHES = "FASTADV_BACKEND", "FASTADV_CPU_ISA", "FASTADV_WINOGRAD"


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


def cpu():
    """The processor's name where Linux tells it, else its architecture."""
    try:
        named = re.search(
            r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        named = None
    return named[1] if named else platform.machine()


def version(package):
    """The installed version of a package, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def report():
    """The text that `python -m fastadv.info` prints."""
    compiled = _native.missing or f"{_native.isa()} in use; can run {', '.join(_native.isas())}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = [("op", "on cpu", "on cuda")]
    rows += [(name, op.cpu, op.cuda) for name, op in _library.ops.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    others = ", ".join(f"{name} {version(name)}" for name in ("numpy", "safetensors", "triton"))
    facts = {
        "fastadv": f"{__version__} in {Path(__file__).parent}",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "others": others,
        "CPU": f"{cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in use",
        "CPU kernels": compiled,
        "attack engine": engine(),
        "CUDA kernels": _native.cuda_missing() or "can run",
        "Triton kernels": _library.triton_missing() or "can run",
        "GPU": gpu,
    }
    lines = [
        *(f"{name + ':':15} {fact}" for name, fact in facts.items()),
        "",
        *(f"{name:{widths[0]}}  {on_cpu:{widths[1]}}  {on_cuda}" for name, on_cpu, on_cuda in rows),
        "",
        *(f"{name}={os.environ.get(name, '')}" for name in SWITCHES),
    ]
    extras = {"sklearn": "demo", "matplotlib": "demo", "PIL": "images", "tensorboard": "log"}
    for package, extra in extras.items():
        if importlib.util.find_spec(package) is None:
            lines.append(f"{package} is not installed: pip install 'fastadv[{extra}]'")
    return "\n".join(lines)


def main(argv=None):
    Parser(prog="python -m fastadv.info", description=__doc__).parse_args(argv)
    print(report())


if __name__ == "__main__":
    main()
