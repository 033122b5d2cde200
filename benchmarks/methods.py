"""Every method on the same digits: clean and PGD-20 test accuracy over seeds.

    python benchmarks/methods.py                        # all, three seeds; rewrites README's table
    python benchmarks/methods.py --only rslad --seeds 0 --out DIR

One student network, one number of epochs, one attack; two teachers, PGD-AT and natural, that all
methods share. lr is 0.1 with weight decay 5e-4 per unit of a batch-mean loss: a method whose loss
is a tenth of that has ten times lr and a tenth of the decay, which undoes the factor exactly. Rows
are appended to benchmarks/results/methods.jsonl.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from run import README, replace_between
from timing import RESULTS, machine

from fastadv import data, methods
from fastadv.config import Config
from fastadv.demo import COMMON, EPS, LARGE
from fastadv.evaluate import accuracies, from_run
from fastadv.train import train

STUDENT = COMMON | {"student_width": 8, "epochs": 40, "milestones": (20, 30), "eval_every": 4}
UNIT = {"lr": 0.1, "weight_decay": 5e-4}
TENTH = {"lr": 1.0, "weight_decay": 5e-5}
# What the papers have in epochs of 200 or 300 is scaled to these 40.
METHODS = {
    "natural": UNIT,
    "at": UNIT,
    "trades": UNIT,
    "mart": UNIT,
    "ard": TENTH,
    "iad1": UNIT | {"method_options": {"begin": 12}},
    "iad2": UNIT | {"method_options": {"begin": 8}},
    "rslad": TENTH,
    "absld": TENTH,
    "mtard": TENTH,
    "bmtard": TENTH,
    "adaad": TENTH,
    "funmatch": UNIT,
    "advfunmatch": UNIT,
    "vfd+at": UNIT,
    "vfd+trades": UNIT,
    "vfd+mart": UNIT,
    "vfd+rslad": TENTH,
}
ATTACKS = ("clean", "pgd20")
MARKS = "<!-- methods table: python benchmarks/methods.py -->", "<!-- end of methods table -->"


def teachers(folder):
    """{"teacher": a PGD-AT run, "clean_teacher": a natural run}, trained where missing."""
    robust = {"method": "at", "epochs": 40, "milestones": (20, 30), "weight_decay": 2e-3}
    natural = {"method": "natural", "epochs": 12, "milestones": (6, 9)}
    configs = {
        "teacher": Config(**LARGE, **robust, out=str(folder / "at-teacher")),
        "clean_teacher": Config(**LARGE, **natural, out=str(folder / "natural-teacher")),
    }
    for config in configs.values():
        if not Path(config.out).exists():
            train(config)
    return {which: f"{config.out}/best.safetensors" for which, config in configs.items()}


def measure(name, seed, folder, checkpoints):
    """{attack: test accuracy} of the run's best checkpoint by validation."""
    needed = methods.get(name).teachers
    given = {f"{which}_checkpoint": checkpoints[which] for which in needed}
    out = folder / f"{name}-{seed}"
    train(Config(**STUDENT, **METHODS[name], **given, method=name, seed=seed, out=str(out)))
    model, _ = from_run(out / "best.safetensors")
    return accuracies(model, data.load("digits").test, ATTACKS, eps=EPS)


def table(rows):
    """Markdown: mean and standard deviation over seeds, in percent."""
    lines = ["| method | clean | PGD-20 |", "|---|---|---|"]
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for attack in ATTACKS:
            values = [100 * row[attack] for row in rows if row["method"] == name]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="these methods, comma separated; README stays as it is")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, help="run folders and rows go here")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="fastadv-methods-"))
    results = (args.out or RESULTS) / "methods.jsonl"
    names = args.only.split(",") if args.only else METHODS
    seeds = [int(seed) for seed in args.seeds.split(",")]
    checkpoints, where, rows = teachers(folder), machine(), []
    for name in names:
        for seed in seeds:
            rows.append({"method": name, "seed": seed, **measure(name, seed, folder, checkpoints)})
            with open(results, "a") as file:
                file.write(json.dumps(rows[-1] | where) + "\n")
    lines = table(rows)
    print("\n".join(lines))
    if not args.only and not args.out:
        about = (
            f"{len(data.load('digits').test)} test images, linf eps {EPS}, seeds {args.seeds}; "
            f"fastadv {where['commit']}, torch {where['torch']}, {where['time'][:10]}."
        )
        replace_between(README, MARKS, [*lines, "", about])


if __name__ == "__main__":
    main()
