r"""python -m fastadv.train: adversarial training and robustness distillation.

    python -m fastadv.train                     # as python -m fastadv.demo, under three minutes
    python -m fastadv.train --method rslad --data cifar10 --data-dir DIR --student resnet18 \
        --teacher wrn34_10 --teacher-checkpoint model_cifar_wrn.pt --precision bf16 --out runs/rslad
    python -m fastadv.train --recipe rslad-cifar10-resnet18 --data-dir DIR --teacher-checkpoint FILE
    python -m fastadv.train --resume runs/rslad
    torchrun --nproc-per-node 4 -m fastadv.train ...            # four processes, see runs.parallel
"""

import sys

from .. import demo
from ..errors import as_command
from ..info import isa
from ..ops import _native
from ..runs import parallel
from .cli import parse
from .loop import train


def hint(config):
    """A sentence on the flag that would make this run faster here, or None."""
    parts = {config.precision_attack, config.precision_outer, config.precision_teacher}
    fast = config.device == "cpu" and isa() in _native.WITH_BF16
    if fast and parts == {"fp32"} and config.data != "digits":
        return f"this CPU has {isa()}: --precision bf16 is faster for most networks"
    return None


def main(argv):
    if not argv:
        demo.main([])
        return
    with parallel.group():
        config, resume = parse(argv, __doc__)
        parallel.barrier()  # all have chosen a fresh folder before one of them makes it
        if config.data == "digits":
            config = demo.with_teachers(config)
        advice = None if resume else hint(config)
        if advice and parallel.rank() == 0:
            print(advice)
        train(config, resume)
        if parallel.rank() == 0:
            print(f"run folder: {config.out}")


if __name__ == "__main__":
    with as_command("--resume RUN goes on from the last whole epoch of a run"):
        main(sys.argv[1:])
