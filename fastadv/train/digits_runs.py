"""The settings of the digits: every method trains on them in half a minute, on a CPU.

They are the defaults of `--data digits`, of the demo and of the table of methods. eps is 0.15 of
the [0, 1] range: the natural network keeps a few percent under PGD-20.
"""

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import torch

from ..runs import parallel
from ..runs.config import Config
from .build import build_method
from .loop import train

EPS = 0.15
COMMON = {"data": "digits", "student": "digits_net", "eps": EPS, "batch_size": 64, "eval_every": 4}
TEACHER = {
    "method": "at",
    "student_width": 32,
    "lr": 0.05,
    "weight_decay": 2e-3,
    "epochs": 40,
    "milestones": (20, 30),
}
CLEAN_TEACHER = {
    "method": "natural",
    "student_width": 32,
    "lr": 0.05,
    "epochs": 12,
    "milestones": (6, 9),
}
TEACHERS = {"teacher": COMMON | TEACHER, "clean_teacher": COMMON | CLEAN_TEACHER}

# RSLAD's, MTARD's and AdaAD's losses are a tenth of the batch mean: ten times lr and a tenth of
# the weight decay undo that; VFD's weights, beside such a loss, are a tenth too. ARD's gradient is
# about as small: softmaxes at temperature 30 are nearly linear in the logits.
TENTHS = ("ard", "rslad", "absld", "mtard", "bmtard", "adaad")
# At 0.1 MART stays at 48 % on one seed in three; its authors too take a tenth of others' rate.
LR = {"mart": 0.05}
# IAD trusts itself from epoch 60 or 40 of 200: the same share of 40.
OPTIONS = {"iad1": {"begin": 12}, "iad2": {"begin": 8}}


def settings(method):
    """The fields of Config of a student that `method` trains; vfd+METHOD has METHOD's."""
    base = method.removeprefix("vfd+")
    scale = 10 if base in TENTHS else 1
    options = OPTIONS.get(base, {})
    if method != base:
        options = options | {"lambda_adv": 1 / scale, "lambda_clean": 1 / scale}
    return COMMON | {
        "method": method,
        "method_options": dict(options),
        "student_width": 8,
        "lr": LR.get(base, 0.1 * scale),
        "weight_decay": 5e-4 / scale,
        "epochs": 40,
        "milestones": (20, 30),
    }


def with_digits_teachers(config):
    """The config with the teachers that it lacks, trained under runs/ where that was not done."""
    given = {}
    for which in build_method(config).teachers:
        if getattr(config, which) or getattr(config, f"{which}_checkpoint"):
            continue
        out = Path("runs") / f"digits-{which.replace('_', '-')}"
        there = out.exists() and parallel.rank() == 0  # the first process decides for all
        if not parallel.total(torch.tensor(int(there))):
            out.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out.parent) as unfinished:
                train(Config(**TEACHERS[which], out=str(Path(unfinished) / out.name)))
                if parallel.rank() == 0:
                    with contextlib.suppress(OSError):  # where another run was first
                        (Path(unfinished) / out.name).rename(out)
            parallel.barrier()
        given[f"{which}_checkpoint"] = str(out / "best.safetensors")
    return dataclasses.replace(config, **given)
