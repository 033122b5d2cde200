"""The default job of `python -m fastadv.train`: a student becomes robust on real digits, on a CPU.

Trains a clean and a PGD-AT teacher, then two small students that differ in nothing but the method,
RSLAD from the robust teacher and PGD-AT, and compares all four on the held-out test images.
"""

import json
import math
from pathlib import Path

from . import data, log
from .checkpoint import atomic_write
from .config import Config
from .evaluate import ATTACKS, correct, from_run, table
from .train import train

EPS = 0.2  # of the [0, 1] range: ink strong enough that the natural network collapses
COMMON = {"data": "digits", "student": "digits_net", "eps": EPS, "batch_size": 64, "eval_every": 3}
TEACHER = {**COMMON, "student_width": 32, "lr": 0.05, "epochs": 16, "milestones": (8, 12)}
STUDENT = {**COMMON, "student_width": 8, "lr": 0.05, "epochs": 24, "milestones": (12, 18)}


def demo(folder):
    """Runs the demo in `folder`, made anew; prints its table, writes report.json and curves.png."""
    folder = Path(folder)
    clean, robust, rslad, at = (
        folder / n for n in ("clean-teacher", "robust-teacher", "rslad", "at")
    )
    teacher = str(robust / "best.safetensors")
    runs = {
        clean: Config(method="natural", out=str(clean), **TEACHER),
        robust: Config(method="at", out=str(robust), **TEACHER),
        rslad: Config(method="rslad", out=str(rslad), teacher_checkpoint=teacher, **STUDENT),
        at: Config(method="at", out=str(at), **STUDENT),
    }
    print(f"scikit-learn's 8x8 digits; linf eps {EPS} of [0, 1]; run folder {folder}")
    curves = {
        config.method if path in (rslad, at) else path.name: train(config)
        for path, config in runs.items()
    }
    log.plot(folder / "curves.png", curves, "digits: validation accuracy")
    test = data.load("digits").test
    right = {
        path.name: {
            name: correct(from_run(path / "best.safetensors")[0], test, name, eps=EPS)
            for name in ATTACKS
        }
        for path in runs
    }
    rates = {
        run: {a: mask.float().mean().item() for a, mask in row.items()}
        for run, row in right.items()
    }
    print(f"\nAccuracy on {len(test)} test images, best checkpoint by held-out validation:")
    print(table(ATTACKS, rates))
    print(verdict(right["rslad"], right["at"]))
    atomic_write(
        folder / "report.json", json.dumps({"eps": EPS, "images": len(test), **rates}, indent=2)
    )
    print(f"\nrun folder: {folder}  (report.json, curves.png, and each run's own folder)")


def verdict(rslad, at):
    """Whether the RSLAD student has the better trade-off: the mean of clean and PGD-20 accuracy,
    with the standard error of the paired difference over images."""
    score = [(row["clean"].double() + row["pgd20"].double()) / 2 for row in (rslad, at)]
    difference = score[0] - score[1]
    points, error = 100 * difference.mean(), 100 * difference.std() / math.sqrt(len(difference))
    outcome = "beats" if points > 2 * error else "does not beat" if points < 2 * error else ""
    return (
        f"RSLAD {outcome} PGD-AT at this size: mean of clean and PGD-20 accuracy "
        f"{points:+.1f} +- {error:.1f} points (paired standard error)."
    )
