"""AdaAD and AdvFunMatch with a teacher that the attack asks at every m-th step: what it costs.

    python benchmarks/teacher_every.py --only adaad
    python benchmarks/teacher_every.py --seeds 0 --out DIR         # rows go to DIR

The approximation is `--set teacher_every=m` of fastadv.train; m = 1 is the method. Networks,
teacher and settings are those of benchmarks/methods.py. Seconds are the median over epochs and are
of the machine as it was: the three m of a seed run one after another. Rows are appended to
benchmarks/results/teacher_every.jsonl.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from methods import ATTACKS, measure, teachers
from timing import RESULTS, machine

from fastadv import data, log

EVERY = (1, 2, 5)


def row(name, seed, every, folder, checkpoints):
    rates = measure(name, seed, folder / str(every), checkpoints, teacher_every=every)
    epochs = log.read(folder / str(every) / f"{name}-{seed}" / "metrics.jsonl")
    speed = statistics.median(epoch["images_per_s"] for epoch in epochs)
    seconds = round(len(data.load("digits").train) / speed, 3)
    return {"method": name, "teacher_every": every, "seed": seed, **rates, "epoch_s": seconds}


def table(rows):
    """Markdown: means over seeds; accuracies in percent, with their standard deviation."""
    lines = ["| method | teacher_every | clean | PGD-20 | s per epoch |", "|---|---|---|---|---|"]
    for name, every in dict.fromkeys((row["method"], row["teacher_every"]) for row in rows):
        runs = [r for r in rows if (r["method"], r["teacher_every"]) == (name, every)]
        cells = []
        for attack in ATTACKS:
            values = [100 * run[attack] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        cells.append(f"{statistics.mean(run['epoch_s'] for run in runs):.2f}")
        lines.append(f"| {name} | {every} | {' | '.join(cells)} |")
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="adaad,advfunmatch", help="these, comma separated")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, help="run folders and rows go here")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="fastadv-teacher-every-"))
    results = (args.out or RESULTS) / "teacher_every.jsonl"
    checkpoints, where, rows = teachers(folder), machine(), []
    for name in args.only.split(","):
        for seed in map(int, args.seeds.split(",")):
            for every in EVERY:
                rows.append(row(name, seed, every, folder, checkpoints))
                with open(results, "a") as file:
                    file.write(json.dumps(rows[-1] | where) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
