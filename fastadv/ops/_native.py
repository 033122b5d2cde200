"""The only file that touches the compiled module.

Raw pointers carry no safety of their own. An op's `check` has seen to shapes and devices; the
functions here make sure of dtype and strides (naming the argument at fault), make no temporaries,
and pass torch's thread count or stream. Which arguments a kernel takes is written in its op's own
file. The interpreter lock is released in `csrc/bind.cpp`.

CUDA kernels go to torch's current stream of their GPU, nothing waits for them, and a CUDA graph can
capture them after a first call outside, as with torch's own ops.
"""

import functools
import hashlib
import os
from pathlib import Path

import torch

from ..kernels.host import is_dense

try:
    from .. import _C
except ImportError as error:
    _C = None
    missing = f"fastadv._C is not there ({error}); reinstall with a C++ compiler to build it"
else:
    missing = None
    # Arguments have no names in a call: a module that was built from other headers than a checkout
    # has, as after `git pull`, would take one for another.
    _headers = sorted((Path(__file__).parents[2] / "csrc").glob("*.h"))
    _texts = b"".join(header.read_bytes() for header in _headers)
    if _headers and getattr(_C, "headers", None) != hashlib.sha256(_texts).hexdigest():
        raise ImportError(
            f"{_C.__file__} was built from other headers than {_headers[0].parent} has, must be "
            "built again: `make install`, or `pip install -e .` (or delete it, to run without)"
        )
    if os.environ.get("FASTADV_CPU_ISA"):
        if os.environ["FASTADV_CPU_ISA"] not in _C.isas():
            raise ValueError(
                f"FASTADV_CPU_ISA is {os.environ['FASTADV_CPU_ISA']!r}, must be one of those that "
                f"this build and machine have: {', '.join(_C.isas())}"
            )
        _C.use_isa(os.environ["FASTADV_CPU_ISA"])

WITH_BF16 = ("amx", "avx512_bf16")  # instruction sets whose products are of bfloat16
CPU = -1  # as `Tensor.get_device` has it
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def isas():
    """Instruction sets that this build and machine can run, fastest first; empty without `_C`."""
    return _C.isas() if _C else []


def isa():
    """The instruction set in use."""
    return _C.isa()


def use_isa(name):
    """Use the instruction set `name` from now on (tests and benchmarks)."""
    _C.use_isa(name)


@functools.cache
def cuda_missing():
    """Why the CUDA kernels cannot run here, or None."""
    if missing:
        return missing
    if not hasattr(_C, "cuda_built"):
        return "fastadv._C was built without nvcc 12.8 or newer"
    if not torch.cuda.is_available():
        return "no CUDA device"
    built, driver = _C.cuda_built // 1000, _C.cuda_driver() // 1000
    if driver < built:
        return f"fastadv._C was built with CUDA {built}, the driver is for CUDA {driver}"
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            found = "{}.{}".format(*capability)
            return f"cuda:{device} has compute capability {found}, must be 8.0 or higher"
    return None


def same_layout(tensor, *others):
    """Whether all are dense with equal strides, so that one flat index means one element."""
    strides = tensor.stride()
    for other in others:  # half the time of all() over a generator
        if other.stride() != strides:
            return False
    return is_dense(tensor)


def laid_like(like, tensor):
    """The tensor, copied where its strides are not those of `like`, which is dense."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def empty_like(tensor, dtype=None):
    """Where every op gets its output memory; `fastadv.testing` puts guarded memory here."""
    return torch.empty_like(tensor, dtype=dtype)


def empty(shape, like, dtype=None, memory_format=torch.contiguous_format):
    """`empty_like` for another shape."""
    return torch.empty(
        shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format
    )


def constant(name):
    """A number of csrc/ that callers need: the size of a kernel's memory, or of its blocks."""
    return getattr(_C, name)


def addresses(device, dtype, /, **tensors):
    """The addresses of tensors of this dtype on this GPU, or on the CPU; 0 for None. Raises
    TypeError naming the one that is something else."""
    return _addresses(device, dtype, tensors)


def contiguous(device, dtype, /, **tensors):
    """`addresses` of contiguous tensors; ValueError naming the one that is not."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous")
    return _addresses(device, dtype, tensors)


def channels_last(device, dtype, /, **maps):
    """`addresses` of tensors in channels_last; ValueError naming the one that is not."""
    for name, tensor in maps.items():
        if tensor is not None and not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name} has strides {tensor.stride()}, must be channels_last")
    return _addresses(device, dtype, maps)


def in_one_layout(device, dtype, /, **tensors):
    """`addresses` of tensors that are dense with equal strides; ValueError where they are not."""
    if not same_layout(*tensors.values()):
        raise ValueError(f"{', '.join(tensors)} must be dense with equal strides")
    return _addresses(device, dtype, tensors)


def _addresses(device, dtype, tensors):
    found = []
    for name, tensor in tensors.items():
        if tensor is None:
            found.append(0)
            continue
        there = tensor.is_cpu if device == CPU else tensor.is_cuda and tensor.get_device() == device
        if tensor.dtype is not dtype or not there:
            place = "cpu" if device == CPU else f"cuda:{device}"
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, must be {dtype} on {place}"
            )
        found.append(tensor.data_ptr())
    return found


def run(kernel, device, *args):
    """Calls a kernel on torch's threads or, where device is a GPU, on torch's stream of it.

    args: the members of the kernel's struct in csrc/, in their order; a choice by its name.
    """
    if device == CPU:
        return getattr(_C, kernel)(*args, torch.get_num_threads())
    stream = torch.cuda.current_stream(device).cuda_stream
    error = getattr(_C, f"cuda_{kernel}")(*args, device, stream)
    if error:
        raise RuntimeError(f"{kernel} on cuda:{device}: {error}")
    return None
