"""Robust accuracy by fastadv's attacks and by the official AutoAttack code, model by model.

    pip install -e '.[demo,eval]'
    python benchmarks/agreement.py                      # trains three networks on the digits
    python benchmarks/agreement.py runs/at/best.safetensors runs/trades/best.safetensors

Counts are of images classified right, at linf eps 0.15, in fp32. "Same start": both sides begin at
x plus one noise, the same for all images, so that what differs is the algorithm; where these counts
are apart by more than max(0.3 points, 2 images) the exit status is 1. "Own starts": each side's own
random ones, mean and range over seeds.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

from fastadv import data, freeze
from fastadv.config import Config
from fastadv.digits import EPS, settings
from fastadv.evaluate import adversary, correct, from_run
from fastadv.train import train

ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t")
SEEDS = range(3)
HEAD = "| model | attack | clean | official, same start | fastadv, same start | images that differ "
HEAD += "| official, own starts | fastadv, own starts |"


def start(x):
    """x plus uniform noise that is a constant of the benchmark."""
    noise = 2 * torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(0)) - 1
    return (x + EPS * noise).clamp(0, 1)


def fastadv(name, seed=None):
    """attack(model, x, y) -> x_adv, from `start` without a seed."""
    attack, _ = adversary(name, EPS)
    if seed is None:
        attack._start = lambda x, *_: start(x)
    else:
        torch.manual_seed(seed)
    return attack


def official(name, seed=None):
    """The same of the official code."""
    kind = APGDAttack_targeted if name == "apgd-t" else APGDAttack
    options = {} if name == "apgd-t" else {"loss": name.removeprefix("apgd-")}

    def attack(model, x, y):
        result = kind(model, eps=EPS, seed=seed or 0, **options)
        if seed is None:
            result.attack_single_run = lambda x, y: kind.attack_single_run(result, x, y, start(x))
        return result.perturb(x, y)

    return attack


def right(model, split, attack):
    """Which images of `split` the model classifies right under `attack`: bool [N]."""
    twin = freeze(model)
    x, y = split.images.float() / 255, split.labels
    x_adv = attack(twin, x, y)
    with torch.no_grad():
        return twin(x_adv).argmax(1) == y


def spread(model, split, side, name):
    counts = [int(right(model, split, side(name, seed)).sum()) for seed in SEEDS]
    return f"{statistics.mean(counts):.1f} ({min(counts)} to {max(counts)})"


def trained(folder):
    """A natural, a PGD-AT and a TRADES network: the paths of their checkpoints."""
    for method in ("natural", "at", "trades"):
        train(Config(**settings(method) | {"epochs": 12, "out": str(folder / method)}))
        yield folder / method


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, help="of runs on the digits")
    parser.add_argument("--limit", type=int, default=300, help="the first N test images")
    args = parser.parse_args()
    test = data.load("digits").test
    split = test.take(torch.arange(min(args.limit, len(test))))
    paths = args.checkpoints or trained(Path(tempfile.mkdtemp(prefix="fastadv-agreement-")))
    print(f"{len(split)} test images of the digits, linf eps {EPS}\n\n{HEAD}")
    print("|---|---|---|---|---|---|---|---|")
    apart = 0
    for path in paths:
        model, config = from_run(path)
        clean = int(correct(model, split, "clean", eps=EPS).sum())
        for name in ATTACKS:
            theirs, ours = (right(model, split, side(name)) for side in (official, fastadv))
            counts = int(theirs.sum()), int(ours.sum())
            apart += abs(counts[0] - counts[1]) > max(0.003 * len(split), 2)
            own = [spread(model, split, side, name) for side in (official, fastadv)]
            cells = [config.method, name, clean, *counts, int((ours != theirs).sum()), *own]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if apart:
        sys.exit(f"{apart} counts from the same start are apart by more than is allowed")


if __name__ == "__main__":
    main()
