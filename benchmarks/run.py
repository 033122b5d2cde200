"""Interleaved ratio benchmarks: correctness gate first, then one run over all providers.

    python benchmarks/run.py --suite ops [--only softmax_kl] [--seconds 3]
    python benchmarks/run.py --suite attack [--only resnet18]    # PGD-10 end to end
    python benchmarks/run.py --suite train [--only adaad]        # whole training steps
    python benchmarks/run.py --suite cache --seconds 60          # RSLAD steps with a huge teacher
    python benchmarks/run.py --suite eval                        # AutoAttack's standard version
    python benchmarks/run.py --suite gpu                         # all of it on a GPU, see gpu.py
    python benchmarks/run.py [--suite cache] --table             # README's table anew

Rows are appended to benchmarks/results/<suite>.jsonl, a table has the newest of each case.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch
from prepare import execute, prepare
from timing import RESULTS, exact, interleave, machine, summary

SUITES = {
    "attack": ["bench_attack"],
    "train": ["bench_train_step"],
    "cache": ["bench_teacher_cache"],
    "eval": ["bench_evaluate"],
}
END_TO_END = {module for modules in SUITES.values() for module in modules}
MODULES = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
SUITES["ops"] = [module for module in MODULES if module not in END_TO_END]
COLUMNS = ("GB/s", "of copy", "images/s", "x floor", "peak MB", "equal signs", "cosine", "robust")
COLUMNS += ("data", "teacher", "attack", "outer")
README = Path(__file__).parents[1] / "README.md"


def run(suite, only, seconds):
    """Appends the rows of a suite's cases to its file."""
    where = machine()
    RESULTS.mkdir(exist_ok=True)
    print(where)
    ran = False
    for case in chosen(suite, only):
        ran = True
        for row in measure(case, seconds):
            print(line(row), flush=True)
            with open(RESULTS / f"{suite}.jsonl", "a") as file:
                file.write(json.dumps({"suite": suite} | row | where) + "\n")
        torch.compiler.reset()
    if not ran:
        sys.exit(f"--only is {only!r}, which suite {suite} has no case of")


def chosen(suite, only):
    """The suite's cases, or those of one bench_<only>, or of one network or method."""
    for module in [f"bench_{only}"] if f"bench_{only}" in SUITES[suite] else SUITES[suite]:
        for case in importlib.import_module(module).cases():
            names = module.removeprefix("bench_"), *case.op.lower().split(), *case.shape.split(", ")
            if not only or only in names:
                yield case


def measure(case, seconds):
    """One row per provider; speedup is against the first of them, x floor the time over that of
    the provider's floor."""
    with exact():
        case.gate()
    times = {name: summary(samples) for name, samples in interleave(case, seconds).items()}
    base, facts, rows = times[next(iter(times))]["us"], case.facts(), []
    for provider, quantiles in times.items():
        us, nbytes, floor = quantiles["us"], case.nbytes_of(provider), case.floors.get(provider)
        row = {
            "op": case.op,
            "shape": case.shape,
            "provider": provider,
            **quantiles,
            "speedup": round(base / us, 2),
            "GB/s": round(nbytes / us / 1e3, 1) if nbytes else None,
            "images/s": float(f"{case.images / us * 1e6:.4g}") if case.images else None,
            "x floor": round(us / times[floor]["us"], 2) if floor else None,
            **facts.get(provider, {}),
            "left out": case.left_out,
        }
        rows.append({key: value for key, value in row.items() if value is not None})
    return rows


def line(row):
    spread = f"[{row['p20']:.1f}, {row['p80']:.1f}]"
    rest = "  ".join(f"{key} {row[key]}" for key in (*COLUMNS, "left out") if key in row)
    return (
        f"{row['op']:18} {row['shape']:14} {row['provider']:24} {row['us']:10.1f} us {spread:24} "
        f"{row['speedup']:6.2f}x  {rest}"
    )


def table(suite):
    """README's table: of each op and shape the rows of the newest run."""
    rows = [json.loads(line) for line in (RESULTS / f"{suite}.jsonl").read_text().splitlines()]
    newest = {(row["op"], row["shape"]): row["time"] for row in rows}
    rows = [row for row in rows if row["time"] == newest[row["op"], row["shape"]]]
    rows.sort(key=lambda row: row["op"])
    row = rows[-1]
    where = (
        f"{row['cpu']}, {row['threads']} threads, {row['isa']}, torch {row['torch']}, "
        f"fastadv {row['commit']}, {row['time'][:10]}."
    )
    marks = f"<!-- {suite} table: benchmarks/run.py -->", f"<!-- end of {suite} table -->"
    replace_between(README, marks, [*markdown(rows), "", where])


def markdown(rows):
    """The rows as a table's lines: times in ms where they reach a second, and of the columns that
    not every suite has those with a value."""
    unit, size = ("ms", 1e3) if max(row["us"] for row in rows) > 1e6 else ("us", 1)
    columns = [column for column in COLUMNS if any(row.get(column) is not None for row in rows)]
    head = ["op", "shape", "provider", f"median {unit}", "p20-p80", "speed-up", *columns]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        median, low, high = (f"{row[key] / size:.1f}" for key in ("us", "p20", "p80"))
        cells = [row["op"], row["shape"], row["provider"], median, f"{low}-{high}"]
        cells.append(f"{row['speedup']:.2f}x")
        values = (row.get(column) for column in columns)
        cells += ["" if value is None else str(value) for value in values]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def replace_between(path, marks, lines):
    """Rewrites what stands between two marks of a text file."""
    before, rest = path.read_text().split(marks[0])
    after = rest.split(marks[1])[1]
    path.write_text("\n".join([before + marks[0], "", *lines, "", marks[1] + after]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted([*SUITES, "gpu"]), default="ops")
    parser.add_argument("--only", help="one op, method or network")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per case")
    parser.add_argument("--table", action="store_true", help="rewrite README's table and stop")
    args = parser.parse_args()
    if args.suite == "gpu":
        prepare()
        execute(sys.executable, Path(__file__).with_name("gpu.py"))
    elif args.table:
        table(args.suite)
    else:
        run(args.suite, args.only, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
