"""Interleaved ratio benchmarks: correctness gate first, then one run over all providers.

    python benchmarks/run.py --suite ops [--only softmax_kl] [--seconds 3]
    python benchmarks/run.py --suite cache --seconds 60      # training steps with a teacher cache
    python benchmarks/run.py [--suite cache] --table         # rewrite README from the newest rows

Rows are appended to benchmarks/results/<suite>.jsonl.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch
from timing import RESULTS, interleave, machine, summary

SUITES = {
    "ops": [path.stem for path in sorted(Path(__file__).parent.glob("bench_*.py"))],
    "cache": ["bench_teacher_cache"],
}
SUITES["ops"].remove("bench_teacher_cache")
README = Path(__file__).parents[1] / "README.md"


def run(suite, only, seconds):
    where = machine()
    RESULTS.mkdir(exist_ok=True)
    print(where)
    for module in SUITES[suite]:
        if only and module != f"bench_{only}":
            continue
        for case in importlib.import_module(module).cases():
            case.gate()
            timed = {name: summary(s) for name, s in interleave(case.providers, seconds).items()}
            base = timed[next(iter(timed))]["us"]
            for provider, times in timed.items():
                nbytes = case.nbytes_of(provider)
                row = {
                    "suite": suite,
                    "op": case.op,
                    "shape": case.shape,
                    "provider": provider,
                    **times,
                    "speedup": round(base / times["us"], 2),
                    "GB/s": round(nbytes / times["us"] / 1e3, 1) if nbytes else None,
                }
                spread = f"[{row['p20']:.1f}, {row['p80']:.1f}]"
                print(
                    f"{case.op:18} {case.shape:14} {provider:20} {row['us']:10.1f} us {spread:20} "
                    f"{row['speedup']:6.2f}x  {row['GB/s'] or ''}"
                )
                with open(RESULTS / f"{suite}.jsonl", "a") as file:
                    file.write(json.dumps(row | where) + "\n")
            torch.compiler.reset()


def table(suite):
    """README's table: of each op and shape the rows of the newest run."""
    rows = [json.loads(line) for line in (RESULTS / f"{suite}.jsonl").read_text().splitlines()]
    newest = {(row["op"], row["shape"]): row["time"] for row in rows}
    rows = [row for row in rows if row["time"] == newest[row["op"], row["shape"]]]
    rows.sort(key=lambda row: row["op"])
    lines = [
        "| op | shape | provider | median us | p20-p80 | speed-up | GB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['op']} | {row['shape']} | {row['provider']} | {row['us']:.1f} | "
            f"{row['p20']:.1f}-{row['p80']:.1f} | {row['speedup']:.2f}x | {row['GB/s'] or ''} |"
        )
    row = rows[-1]
    where = (
        f"{row['cpu']}, {row['threads']} threads, {row['isa']}, torch {row['torch']}, "
        f"fastadv {row['commit']}, {row['time'][:10]}."
    )
    marks = f"<!-- {suite} table: benchmarks/run.py -->", f"<!-- end of {suite} table -->"
    replace_between(README, marks, [*lines, "", where])


def replace_between(path, marks, lines):
    """Rewrites what stands between two marks of a text file."""
    before, rest = path.read_text().split(marks[0])
    after = rest.split(marks[1])[1]
    path.write_text("\n".join([before + marks[0], "", *lines, "", marks[1] + after]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), default="ops")
    parser.add_argument("--only", help="one op")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per case")
    parser.add_argument("--table", action="store_true", help="rewrite README's table and stop")
    args = parser.parse_args()
    table(args.suite) if args.table else run(args.suite, args.only, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
