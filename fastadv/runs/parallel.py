"""Data-parallel training: the processes of one `torchrun`, and what they average.

Every process has the whole student and an equal share of each batch; gradients are averaged by one
all-reduce between backward and step. On four processes and ResNet-50 that takes as long as
DistributedDataParallel, which hides it behind the backward pass (`--suite parallel`), leaves the
student as it is for the attack, and lets one collective carry BatchNorm's statistics too.

A process on its own is a world of one. Collective functions must be called by all processes.
"""

import contextlib
import functools
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import UsageError

TIMEOUT = timedelta(minutes=10)  # of one collective; others wait while a checkpoint is written


@contextlib.contextmanager
def group():
    """Joins the processes that torchrun started; WORLD_SIZE missing or 1 means that it did not.

    Tensors on the CPU go by gloo, those on CUDA by nccl, and "cuda" is then the GPU of LOCAL_RANK.
    After an exception the group is left as it is: the process should end, and torchrun the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if _local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(_local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun's store outlives a restart, and in it are the addresses of processes that are gone.
    store = dist.PrefixStore(f"start {restarts()}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    yield
    dist.destroy_process_group()


def rank():
    """The number of this process, from 0; process 0 writes the files."""
    return dist.get_rank() if _joined() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if _joined() else 1


def restarts():
    """How often torchrun has started its processes again, after one has failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def may_restart():
    """Whether torchrun will start its processes again when one fails (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def check_device(name):
    """Raises UsageError when the processes cannot have a GPU of their own each, or the CPU."""
    device = torch.device(name)
    shared = device.index is not None or _local_rank() >= torch.cuda.device_count()
    if world() > 1 and device.type == "cuda" and shared:
        raise UsageError(
            f"device is {name!r}, must be cpu, or cuda with a GPU for each process of a machine: "
            f"this one has {torch.cuda.device_count()}"
        )


def total(tensor):
    """The sum of `tensor` over the processes, without gradient. Collective."""
    if world() == 1:
        return tensor.detach()
    result = tensor.detach().clone()
    dist.all_reduce(result)
    return result


def least(tensor):
    """The minimum of `tensor` over the processes, element by element, without gradient.
    Collective."""
    result = tensor.detach()
    if world() > 1:
        result = result.clone()
        dist.all_reduce(result, dist.ReduceOp.MIN)
    return result


def mean(tensor):
    """The mean of a float `tensor` over the processes, without gradient. Collective."""
    return total(tensor) / world()


@torch.no_grad()
def mean_(tensors):
    """Replaces every float tensor of a list by its mean over the processes, by one all-reduce.
    Collective."""
    if world() > 1 and tensors:
        parts = [tensor.reshape(-1) for tensor in tensors]
        dtype = functools.reduce(torch.promote_types, {part.dtype for part in parts})
        flat = _kept(sum(map(len, parts)), dtype, parts[0].device)
        torch.cat(parts, out=flat)
        dist.all_reduce(flat)
        flat /= world()
        for tensor, part in zip(tensors, flat.split([*map(len, parts)]), strict=True):
            tensor.copy_(part.view(tensor.shape))


@functools.lru_cache(maxsize=2)  # steps with and without an update
def _kept(count, dtype, device):
    """Memory for `mean_`, which is kept for the next step: fresh pages take as long as the sum."""
    return torch.empty(count, dtype=dtype, device=device)


def barrier():
    """Returns when all processes have come here. Collective."""
    total(torch.zeros(()))  # on the CPU: dist.barrier would take a GPU wherever there is one


def _joined():
    return dist.is_available() and dist.is_initialized()


def _local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))
