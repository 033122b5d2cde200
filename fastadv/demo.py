"""python -m fastadv.demo: a student becomes robust on real digits, on a CPU.

Trains a natural and a PGD-AT teacher, then small students that differ in nothing but the method,
RSLAD from the robust teacher and PGD-AT, and attacks all four on held-out test images.
"""

import contextlib
import dataclasses
import json
import math
import tempfile
from pathlib import Path

import torch

from . import data, methods
from .errors import Parser, UsageError, as_command
from .evaluate import PAPER, correct, from_run, table
from .runs import log, parallel
from .runs.checkpoint import atomic_write
from .runs.config import Config, device
from .runs.folder import check_free
from .train import train
from .train.build import (
    build_loader,
    build_method,
    build_student,
    build_teacher,
    check_teachers,
    start_student,
)
from .train.cli import fresh_folder
from .train.recipes import digits_student, digits_teacher

SEEDS = (0, 1, 2)
EPS = digits_student("at")["eps"]


def plan(folder):
    """The runs, {row of the table: one Config per seed}; students come after their teacher."""
    teacher = folder / "robust-teacher"
    rows = {
        "natural": [Config(**digits_teacher("clean_teacher"), out=str(folder / "natural"))],
        "PGD-AT teacher": [Config(**digits_teacher("teacher"), out=str(teacher))],
    }
    distilled = digits_student("rslad") | {"teacher_checkpoint": str(teacher / "best.safetensors")}
    for label, fields in (("RSLAD student", distilled), ("PGD-AT student", digits_student("at"))):
        out = str(folder / label.lower().replace(" ", "-"))
        rows[label] = [
            Config(**fields | {"student_width": 4, "out": f"{out}-{seed}", "seed": seed})
            for seed in SEEDS
        ]
    return rows


def demo(folder):
    """Runs the demo in `folder`, made anew; prints its table, writes report.json and curves.png."""
    print(f"scikit-learn's 8x8 digits, linf eps {EPS} of [0, 1]; run folder {folder}")
    rows = plan(Path(folder))
    metrics = {label: [train(config) for config in configs] for label, configs in rows.items()}
    curves = {label: runs[0] for label, runs in metrics.items()}
    log.plot(Path(folder) / "curves.png", curves, "digits: validation accuracy (seed 0)")
    test = data.load("digits").test
    right = {
        label: torch.stack([verdicts(config, test) for config in configs])
        for label, configs in rows.items()
    }  # [seeds, attacks, images]
    rates = {
        label: dict(zip(PAPER, r.mean((0, 2)).tolist(), strict=True)) for label, r in right.items()
    }
    comparison = compare(right["RSLAD student"], right["PGD-AT student"])
    print(
        f"\nAccuracy on {len(test)} test images (students: mean of {len(SEEDS)} seeds), the best "
        "checkpoint by held-out validation:"
    )
    print(table(PAPER, rates))
    print(comparison)
    report = {
        "eps": EPS,
        "images": len(test),
        "seeds": SEEDS,
        "accuracy": rates,
        "comparison": comparison,
    }
    atomic_write(Path(folder) / "report.json", json.dumps(report, indent=2))
    print(f"\nrun folder: {folder}  (report.json, curves.png, and a folder per run)")


def verdicts(config, split):
    """float64 [attacks, images]: 1 where the run's best checkpoint is right under the attack."""
    model, _ = from_run(Path(config.out) / "best.safetensors")
    return torch.stack([correct(model, split, name, eps=EPS).double() for name in PAPER])


def compare(rslad, at):
    """One sentence on the trade-off, the mean of clean and PGD-20 accuracy: which student has the
    better one, by how much, and the paired standard error over test images."""
    chosen = [list(PAPER).index(name) for name in ("clean", "pgd20")]
    difference = 100 * (rslad - at)[:, chosen].mean(1)  # [seeds, images], in points
    mean = difference.mean().item()
    error = (difference.mean(0).std() / math.sqrt(difference.shape[1])).item()
    by_seed = " ".join(f"{points:+.1f}" for points in difference.mean(1).tolist())
    outcome = "beats" if mean > 2 * error else "does not clearly beat"
    return (
        f"The RSLAD student {outcome} the PGD-AT student's trade-off (mean of clean and PGD-20): "
        f"{mean:+.1f} points, standard error {error:.1f}, by seed {by_seed}."
    )


def with_teachers(config):
    """A config of the digits with the teachers that it lacks, trained under runs/ where that was
    not done before. The processes of a `parallel.group()` must all call it."""
    method = build_method(config)
    digits = data.load("digits")
    if config.log:
        log.need_tensorboard()
    there = device(config.device)  # all that may be refused, before minutes of training for nothing
    nets = {"student": build_student(config, digits).to(there)}
    build_loader(config, digits)
    check_teachers(config, method)
    lacking = []
    for which in method.teachers:
        if getattr(config, which) or getattr(config, f"{which}_checkpoint"):
            nets[which] = build_teacher(config, digits, which)
        else:
            lacking.append(which)
            untrained = build_student(Config(**digits_teacher(which)), digits)
            nets[which] = untrained.to(there).eval()
    example = torch.zeros(1, *digits.train.images.shape[1:], device=there)
    method.to(there).prepare(methods.Nets(**nets), example)
    if lacking:
        start_student(nets["student"], config, digits)
        if parallel.rank() == 0:
            check_free(config.out)
    given = {}
    for which in lacking:
        out = Path("runs") / f"digits-{which.replace('_', '-')}"
        exists = out.exists() and parallel.rank() == 0  # the first process decides for all
        if not parallel.total(torch.tensor(int(exists))):
            out.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out.parent) as unfinished:
                train(Config(**digits_teacher(which), out=str(Path(unfinished) / out.name)))
                if parallel.rank() == 0:
                    with contextlib.suppress(OSError):  # where another run was first
                        (Path(unfinished) / out.name).rename(out)
            parallel.barrier()
        given[f"{which}_checkpoint"] = str(out / "best.safetensors")
    return dataclasses.replace(config, **given)


def main(argv=None):
    parser = Parser(prog="python -m fastadv.demo", description=__doc__)
    parser.parse_args(argv)
    with parallel.group():
        if parallel.world() > 1:
            raise UsageError(f"the demo runs in one process, not {parallel.world()}: give flags")
        demo(fresh_folder("digits"))


if __name__ == "__main__":
    with as_command("nothing is reported; the same command starts anew"):
        main()
