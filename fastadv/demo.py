"""python -m fastadv.demo: what distillation buys where images are few, on real digits, on a CPU.

Trains a natural and a PGD-AT teacher on 1,000 images, then small students on 100 of them: by PGD-AT
from the labels, and by four methods that learn from the teachers. They differ in nothing else. All
are attacked on held-out test images.
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
BASELINE = "PGD-AT"
STUDENTS = {
    BASELINE: "at",
    "RSLAD": "rslad",
    "B-MTARD": "bmtard",
    "AdvFunMatch": "advfunmatch",
    "VFD + PGD-AT": "vfd+at",
}
# Chosen on validation images with other seeds, among 100 and 200 images and widths of 4 to 16.
FEW = {
    "train_images": 100,
    "batch_size": 50,
    "student_width": 4,
    "epochs": 60,
    "milestones": (36, 51),
    "eval_every": 60,
}


def plan(folder):
    """The runs, {row of the table: one Config per seed}; students come after their teachers."""
    teachers = {"clean_teacher": folder / "natural", "teacher": folder / "robust-teacher"}
    made = {which: Config(**digits_teacher(which), out=str(out)) for which, out in teachers.items()}
    rows = {"natural teacher": [made["clean_teacher"]], "PGD-AT teacher": [made["teacher"]]}
    for label, method in STUDENTS.items():
        given = {
            f"{which}_checkpoint": str(teachers[which] / "best.safetensors")
            for which in methods.get(method).teachers
        }
        fields = digits_student(method) | FEW | given
        out = folder / label.lower().replace(" ", "")
        rows[label] = [Config(**fields, seed=seed, out=f"{out}-{seed}") for seed in SEEDS]
    return rows


def demo(folder):
    """Runs the demo in `folder`, made anew; prints its table, writes report.json, curves.png and
    tradeoff.png."""
    folder = Path(folder)
    print(f"scikit-learn's 8x8 digits, linf eps {EPS} of [0, 1]; run folder {folder}")
    rows = plan(folder)
    metrics = {label: [train(config) for config in configs] for label, configs in rows.items()}
    curves = {label: runs[0] for label, runs in metrics.items()}
    log.plot(folder / "curves.png", curves, "digits: validation accuracy (seed 0)")
    test = data.load("digits").test
    right = {
        label: torch.stack([verdicts(config, test) for config in configs])
        for label, configs in rows.items()
    }  # [seeds, attacks, images]
    rates = {
        label: dict(zip(PAPER, r.mean((0, 2)).tolist(), strict=True)) for label, r in right.items()
    }
    comparisons = [
        compare(label, right[label], right[BASELINE]) for label in STUDENTS if label != BASELINE
    ]
    print(
        f"\nAccuracy on {len(test)} test images. Students (mean of {len(SEEDS)} seeds) had "
        f"{FEW['train_images']} training images, teachers 1000:"
    )
    print(table(PAPER, rates))
    print(f"\nBetter than {BASELINE} by points of (clean + PGD-20) / 2, with standard error:")
    print("\n".join(comparisons))
    scatter(folder / "tradeoff.png", {label: right[label].mean(2) for label in STUDENTS})
    report = {
        "eps": EPS,
        "images": len(test),
        "seeds": SEEDS,
        "accuracy": rates,
        "comparisons": comparisons,
    }
    atomic_write(folder / "report.json", json.dumps(report, indent=2))
    print(f"\nrun folder: {folder}  (report.json, tradeoff.png, curves.png, and a folder per run)")


def verdicts(config, split):
    """float64 [attacks, images]: 1 where the run's best checkpoint is right under the attack."""
    model, _ = from_run(Path(config.out) / "best.safetensors")
    return torch.stack([correct(model, split, name, eps=EPS).double() for name in PAPER])


def compare(label, ours, baseline):
    """One sentence on the trade-off, the mean of clean and PGD-20 accuracy: by how much the student
    has a better one, and the paired standard error over test images."""
    chosen = [PAPER.index(name) for name in ("clean", "pgd20")]
    difference = 100 * (ours - baseline)[:, chosen].mean(1)  # [seeds, images], in points
    mean = difference.mean().item()
    error = (difference.mean(0).std() / math.sqrt(difference.shape[1])).item()
    by_seed = " ".join(f"{points:+.1f}" for points in difference.mean(1).tolist())
    outcome = "better" if mean > 2 * error else "worse" if mean < -2 * error else "no clear change"
    return f"{label:14}{mean:+5.1f} +- {error:.1f}  {outcome}  (by seed {by_seed})"


def scatter(path, accuracies):
    """A PNG of clean accuracy against that under PGD-20, with standard deviations over seeds.
    accuracies: {label: [seeds, attacks]}. Draws nothing where matplotlib is not installed."""
    figure = log.new_figure((6, 4.5))
    if figure is None:
        return
    axes = figure.subplots()
    for label, values in accuracies.items():
        (clean, robust) = ((100 * values[:, PAPER.index(name)]) for name in ("clean", "pgd20"))
        errors = {"xerr": clean.std().item(), "yerr": robust.std().item()}
        axes.errorbar(clean.mean().item(), robust.mean().item(), fmt="o", label=label, **errors)
    axes.set(xlabel="clean accuracy, %", ylabel="accuracy under PGD-20, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    log.save_figure(figure, path)


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
