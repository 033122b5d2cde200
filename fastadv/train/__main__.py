r"""python -m fastadv.train: adversarial training and robustness distillation.

    python -m fastadv.train                     # without flags: the demo, three to eight minutes
    python -m fastadv.train --method rslad --data cifar10 --data-dir DIR --student resnet18 \
        --teacher wrn34_10 --teacher-checkpoint model_cifar_wrn.pt --precision bf16 --out runs/rslad
    python -m fastadv.train --recipe rslad-cifar10-resnet18 --data-dir DIR --teacher-checkpoint FILE
    python -m fastadv.train --resume runs/rslad
    torchrun --nproc-per-node 4 -m fastadv.train ...            # in four processes
"""

import dataclasses
import sys
from pathlib import Path

import torch

from .. import demo
from ..errors import as_command
from ..runs import parallel
from ..runs.config import PLACES
from .cli import parse, saved
from .loop import train


def restarted(config):
    """Whether torchrun has started this run again, after one of its processes has died. The folder
    must hold this run then, by its settings, and not another one."""
    record = Path(config.out) / "config.json"
    if not parallel.restarts() or not record.exists():
        return False
    places = {name: getattr(config, name) for name in PLACES}
    return dataclasses.replace(saved(config.out, "--out"), **places) == config


def main(argv):
    if not argv:
        demo.main([])
        return
    with parallel.group():
        config, resume = parse(argv, __doc__)
        torch.backends.cudnn.benchmark = True  # batches of one shape, which pay the search back
        parallel.barrier()  # all have read the folder before one of them writes into it
        if config.data == "digits":
            config = demo.with_teachers(config)
        train(config, resume or restarted(config))
        if parallel.rank() == 0:
            print(f"run folder: {config.out}")


if __name__ == "__main__":
    with as_command("--resume RUN goes on from the last whole epoch of a run"):
        main(sys.argv[1:])
