"""What one process of tests/runs/test_parallel.py does: trains the listed configurations in turn.

    torchrun ... tests/runs/parallel_job.py JOBS.json     # [{"config": {...}, "fault": null}, ...]

A digits_net of width 3 has no BatchNorm here. After each epoch every process writes what it holds
to OUT.rank<r>.safetensors. Faults strike process 1: "nan" makes its loss NaN, "kill" is SIGKILL in
the middle of the second epoch.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from fastadv import methods, models
from fastadv.runs import checkpoint, log, parallel
from fastadv.runs.config import Config
from fastadv.runs.folder import Run
from fastadv.train import train


class Tiny(nn.Sequential):
    def __init__(self, num_classes, in_channels):
        convolution, linear = nn.Conv2d(in_channels, 6, 3, stride=2), nn.Linear(54, num_classes)
        super().__init__(convolution, nn.Tanh(), nn.Flatten(), linear)


def get(name, num_classes=10, in_channels=3, width=None, original=models.get):
    if width == 3:
        return Tiny(num_classes, in_channels)
    return original(name, num_classes, in_channels, width)


def end_epoch(self, row, original=Run.end_epoch):
    """Also notes the state of this process."""
    original(self, row)
    average = self.average.state_dict() if self.average else {}
    momentum = enumerate(s["momentum_buffer"] for s in self.optimizer.state.values())
    parts = (self.student.state_dict(), self.method.state_dict(), average, self.state)
    tensors = {f"{i}.{k}": v for i, part in enumerate(parts) for k, v in part.items()}
    tensors |= {f"momentum.{i}": buffer for i, buffer in momentum}
    tensors["rng"] = torch.get_rng_state()
    name = f"{self.folder.name}.rank{parallel.rank()}.safetensors"
    checkpoint.save(self.folder.parent / name, tensors, row)


def perturb(self, *args, original=methods.Method.perturb, **kwargs):
    """Reports as many bad gradients as the number of the process, and one more."""
    x_adv = original(self, *args, **kwargs)
    self.attack.bad_gradients += parallel.rank() + 1
    return x_adv


def outer(self, nets, batch, state, original=methods.AT.outer):
    loss, state = original(self, nets, batch, state)
    return loss * (float("nan") if parallel.rank() == 1 else 1.0), state


def killed_at(count, original=torch.optim.SGD.step):
    def step(self, *args, **kwargs):
        nonlocal count
        count -= 1
        if count == 0 and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    return step


if __name__ == "__main__":
    models.get, Run.end_epoch, methods.Method.perturb = get, end_epoch, perturb
    log.plot = lambda *_: None  # half the time otherwise
    jobs = Path(sys.argv[1])
    with parallel.group():
        jobs.with_name(f"{parallel.rank()}.pid").write_text(str(os.getpid()))
        for job in json.loads(jobs.read_text()):
            if job["fault"] == "kill":
                torch.optim.SGD.step = killed_at(8)
            if job["fault"] == "nan":
                methods.AT.outer = outer
            try:
                train(Config(**job["config"]))
            except ValueError as error:
                if job["fault"] != "nan":
                    raise
                out = Path(job["config"]["out"])
                out.with_name(f"{out.name}.rank{parallel.rank()}.error").write_text(str(error))
