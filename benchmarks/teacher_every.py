"""AdaAD and AdvFunMatch with a teacher that the attack asks at every m-th step: what it costs.

    python benchmarks/teacher_every.py --only adaad
    python benchmarks/teacher_every.py --seeds '' --out DIR        # times alone; rows go to DIR

The approximation is `--set teacher_every=m` of fastadv.train; m = 1 is the method. Networks,
teacher and settings are those of benchmarks/methods.py. epoch_s are the seconds of an epoch's
training steps, timed in turn. Rows are appended to benchmarks/results/teacher_every.jsonl.
"""

import argparse
import json
import tempfile
from pathlib import Path

from methods import cells, measure, teachers
from timing import RESULTS, Case, interleave, machine, summary

from fastadv import data
from fastadv.methods import Batch
from fastadv.runs.config import Config
from fastadv.train.build import build_loader, build_method, build_nets
from fastadv.train.recipes import digits_student

EVERY = (1, 2, 5)


def step(name, every, checkpoints):
    """A training step as a call without arguments, all but the optimiser's."""
    needed = {"teacher_checkpoint": checkpoints["teacher_checkpoint"]}
    fields = digits_student(name) | needed | {"method_options": {"teacher_every": every}}
    config, dataset = Config(**fields), data.load("digits")
    method = build_method(config)
    nets, student = build_nets(config, dataset, method)
    x, y, index, _ = next(build_loader(config, dataset).epoch(0))

    def call():
        batch = Batch(x, y, index)
        batch.x_adv = method.perturb(nets, batch, {})
        student.zero_grad()
        method.outer(nets, batch, {})[0].backward()

    return call


def times(name, checkpoints, seconds):
    """Rows of the time of an epoch's steps; one step of each m in turn."""
    steps = {every: step(name, every, checkpoints) for every in EVERY}
    samples = interleave(Case("step", name, steps, None), seconds)
    count = -(-len(data.load("digits").train) // digits_student(name)["batch_size"])
    for every, values in samples.items():
        epoch = {key: round(count * us / 1e6, 3) for key, us in summary(values).items()}
        yield {"method": name, "teacher_every": every, "epoch_s": epoch.pop("us"), **epoch}


def table(rows):
    """Markdown: means over seeds, in percent, with their standard deviation; the time of an epoch's
    steps as a share of the exact method's."""
    lines = ["| method | teacher_every | clean | PGD-20 | time |", "|---|---|---|---|---|"]
    seconds = {(r["method"], r["teacher_every"]): r["epoch_s"] for r in rows if "epoch_s" in r}
    for name, every in dict.fromkeys((row["method"], row["teacher_every"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["teacher_every"]) == (name, every)]
        rates = cells([row for row in mine if "seed" in row])
        time = f"{seconds[name, every] / seconds[name, 1]:.2f}"
        lines.append(f"| {' | '.join([name, str(every), *rates, time])} |")
    return lines


def rows_of(names, seeds, folder, seconds):
    """First the times of each method, then the accuracies of each seed."""
    checkpoints = teachers(folder)
    for name in names:
        yield from times(name, checkpoints, seconds)
        for seed in seeds:
            for every in EVERY:
                rates = measure(name, seed, folder / str(every), checkpoints, teacher_every=every)
                yield {"method": name, "teacher_every": every, "seed": seed, **rates}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="adaad,advfunmatch", help="these, comma separated")
    parser.add_argument("--seeds", default="0,1,2", help="comma separated; '' for the times alone")
    parser.add_argument("--seconds", type=float, default=20, help="of timing per method")
    parser.add_argument("--out", type=Path, help="run folders and rows go here")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="fastadv-teacher-every-"))
    results, where, rows = (args.out or RESULTS) / "teacher_every.jsonl", machine(), []
    seeds = [int(seed) for seed in args.seeds.split(",") if seed]
    for row in rows_of(args.only.split(","), seeds, folder, args.seconds):
        rows.append(row)
        with open(results, "a") as file:
            file.write(json.dumps(row | where) + "\n")
        print(row, flush=True)
    if seeds:
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
