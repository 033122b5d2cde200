"""Every method on the same digits: clean and PGD-20 test accuracy over seeds.

    python benchmarks/methods.py                        # all, three seeds; rewrites the table
    python benchmarks/methods.py --only mart            # these anew, the others' newest rows stay
    python benchmarks/methods.py --seeds 0 --out DIR    # rows go to DIR, the table stays as it is

The settings are those of `python -m fastadv.train --data digits`: one student network, one number
of epochs, one attack, and two teachers, PGD-AT and natural, that all methods share. A method whose
loss is a tenth of the batch mean has ten times lr and a tenth of the weight decay, which undoes the
factor. Teachers are cached, as by default. Rows are appended to benchmarks/results/methods.jsonl.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from tables import PAGE, replace_between
from timing import RESULTS, machine

from fastadv import data, methods
from fastadv.evaluate import accuracies, from_run
from fastadv.runs.config import Config
from fastadv.train import train
from fastadv.train.recipes import digits_student, digits_teacher

METHODS = (*methods.METHODS, "vfd+at", "vfd+trades", "vfd+mart", "vfd+rslad")
METHODS += ("igdm+rslad", "igdm+adaad", "vfd+igdm+rslad")
ATTACKS = ("clean", "pgd20")
EPS = digits_student("at")["eps"]
MARKS = "<!-- methods table: python benchmarks/methods.py -->", "<!-- end of methods table -->"


def teachers(folder):
    """{field of Config: path}: a PGD-AT teacher and a natural one, trained where missing."""
    given = {}
    for which in ("teacher", "clean_teacher"):
        out = folder / which
        fields = digits_teacher(which)
        train(Config(**fields, out=str(out)), resume=(out / "config.json").exists())
        given[f"{which}_checkpoint"] = str(out / "best.safetensors")
    return given


def measure(name, seed, folder, checkpoints, split="test", **options):
    """{attack: accuracy on `split`} of the run's best checkpoint by validation; on "val", which
    chose that one, of the last. options: of the method, besides its settings'. The run folder is
    `folder`/NAME-SEED."""
    needed = [f"{which}_checkpoint" for which in methods.get(name).teachers]
    given = {field: checkpoints[field] for field in needed}
    out = folder / f"{name}-{seed}"
    common = {"seed": seed, "out": str(out), "teacher_cache": str(folder / "teacher-cache")}
    fields = digits_student(name)
    fields["method_options"] |= options
    train(Config(**fields | given | common))
    model, _ = from_run(out / ("last.safetensors" if split == "val" else "best.safetensors"))
    return accuracies(model, getattr(data.load("digits"), split), ATTACKS, eps=EPS)


def newest(results):
    """The last row of each method and seed, in the order of METHODS."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    last = {(row["method"], row["seed"]): row for row in rows}
    return [last[key] for key in sorted(last, key=lambda key: (METHODS.index(key[0]), key[1]))]


def table(rows):
    """Markdown: mean and standard deviation over seeds, in percent."""
    lines = ["| method | clean | PGD-20 |", "|---|---|---|"]
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        lines.append(f"| {' | '.join([name, *cells(mine)])} |")
    return lines


def cells(rows):
    """Of each of ATTACKS the mean and standard deviation over rows, in percent, in words."""
    for attack in ATTACKS:
        values = [100 * row[attack] for row in rows]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        yield f"{statistics.mean(values):.1f}{spread}"


def about(rows):
    """On what the rows were measured, in words."""
    seeds, torchs, cpus = (sorted({str(row[k]) for row in rows}) for k in ("seed", "torch", "cpu"))
    days = sorted({row["time"][:10] for row in rows})
    return (
        f"{len(data.load('digits').test)} test images, linf eps {EPS}, seeds {', '.join(seeds)}; "
        f"torch {', '.join(torchs)}, {' and '.join(cpus)}, "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}; the rows say which."
    )


def arguments(description, name, known):
    """The flags of a command that trains on digits, as values: `only`, the chosen of `known`;
    seeds; out, or None; folder, of its runs; results, the file NAME.jsonl of its rows."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"these of {', '.join(known)}, comma separated")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, help="run folders and rows go here")
    args = parser.parse_args()
    args.only = args.only.split(",") if args.only else [*known]
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    args.folder = args.out or Path(tempfile.mkdtemp(prefix=f"fastadv-{name}-"))
    args.results = (args.out or RESULTS) / f"{name}.jsonl"
    return args


def main():
    args = arguments(__doc__, "methods", METHODS)
    folder, results = args.folder, args.results
    checkpoints, where = teachers(folder), machine()
    for name in args.only:
        for seed in args.seeds:
            rates = measure(name, seed, folder, checkpoints)
            with open(results, "a") as file:
                file.write(json.dumps({"method": name, "seed": seed, **rates} | where) + "\n")
    rows = newest(results)
    lines = table(rows)
    print("\n".join(lines))
    if not args.out:
        replace_between(PAGE, MARKS, [*lines, "", about(rows)])


if __name__ == "__main__":
    main()
