"""One step of several processes with the gradients of a ResNet-50; `--suite parallel`.

    python benchmarks/run.py --suite parallel

A step is the forward and backward pass of a process's own images and the mean of the gradients
over all processes, which share this machine, have one thread each and meet by gloo. The images are
small and few, so that the 25.6 million gradients weigh more than in training. "one all-reduce" is
what the trainer does, which averages BatchNorm's statistics too. DistributedDataParallel sends
gradients while the backward pass goes on; its second row has its defaults.

This process is the first. The others wait for the number of the provider whose step is next.
"""

import contextlib
import copy
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_networks import network
from timing import Case
from torch.nn.parallel import DistributedDataParallel

from fastadv.runs import parallel

NETWORK, SIZE = "resnet50", 32
BATCH, PROCESSES = 4, 4
FAST = {"static_graph": True, "broadcast_buffers": False, "gradient_as_bucket_view": True}


def steps(name, batch, size):
    """{provider: a step that returns the mean gradients}; all processes must take the same ones."""
    torch.manual_seed(0)
    model = network(name, size).train()
    torch.manual_seed(1 + parallel.rank())
    x, y = torch.rand(batch, 3, size, size), torch.arange(batch) % 10
    running = [buffer for key, buffer in model.named_buffers() if "running_" in key]

    def gradients(net):
        net.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()
        return [parameter.grad for parameter in net.parameters()]

    def one_reduction():
        found = gradients(model)
        parallel.mean_([*found, *running])
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers
        fast = DistributedDataParallel(copy.deepcopy(model), **FAST)
    usual = DistributedDataParallel(copy.deepcopy(model))
    return {
        "one all-reduce": one_reduction,
        "DistributedDataParallel": lambda: gradients(fast),
        "DistributedDataParallel, defaults": lambda: gradients(usual),
    }


def join(number, count, file):
    """Makes this process that `number` of a group of `count`, which meet by a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{file}", timeout=parallel.TIMEOUT, rank=number, world_size=count
    )


def follow(index, count, file, *shape):
    """What the other processes do: the step that the first one names, until they are ended."""
    join(index + 1, count, file)
    providers, chosen = list(steps(*shape).values()), torch.tensor(0)
    while True:
        dist.broadcast(chosen, 0)
        providers[chosen]()


@contextlib.contextmanager
def followed(count, *shape):
    """A group of this process and count - 1 others, which follow it."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        shared = (count, f"{folder}/group")
        others = torch.multiprocessing.spawn(
            follow, (*shared, *shape), count - 1, join=False, daemon=True
        )
        try:
            join(0, *shared)
            yield
        finally:
            for process in others.processes:
                process.terminate()
                process.join()
            if dist.is_initialized():
                dist.destroy_process_group()
            torch.set_num_threads(threads)


def case(name, batch, size):
    """To be used by the first process of `followed`."""
    own = steps(name, batch, size)

    def led(index, step):
        def call():
            dist.broadcast(torch.tensor(index), 0)
            return step()

        return call

    providers = {key: led(index, step) for index, (key, step) in enumerate(own.items())}

    def gate():
        expected, *others = (call() for call in providers.values())
        for found in others:
            for ours, theirs in zip(expected, found, strict=True):
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm()

    count = parallel.world()
    shape = f"{name}, {count} processes, {batch}x3x{size}x{size} each"
    return Case("step of processes", shape, providers, gate, images=count * batch)


def cases():
    shape = (NETWORK, BATCH, SIZE)
    with followed(PROCESSES, *shape):
        yield case(*shape)
