"""Interleaved ratio benchmarks: correctness gate first, then one run over all providers.

    python benchmarks/run.py --suite ops [--only softmax_kl] [--seconds 3]
    python benchmarks/run.py --suite attack [--only resnet18]    # PGD-10 end to end
    python benchmarks/run.py --suite networks [--only vgg16_bn]  # a query of many networks
    python benchmarks/run.py --suite train [--only adaad]        # whole training steps
    python benchmarks/run.py --suite cache --seconds 60          # RSLAD steps with a huge teacher
    python benchmarks/run.py --suite eval                        # AutoAttack's standard version
    python benchmarks/run.py --suite data                        # images from a folder of files
    python benchmarks/run.py --suite parallel                    # steps of several processes
    python benchmarks/run.py --suite gpu --out DIR               # all of it on a GPU, see gpu.py
    python benchmarks/run.py --table                             # all tables anew

Rows are appended to benchmarks/results/<suite>.jsonl. The tables of docs/benchmarks.md and README
have the newest of each case.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import gpu
import tables
import torch
from timing import RESULTS, exact, interleave, machine, summary

SUITES = {
    "attack": ["bench_attack"],
    "networks": ["bench_networks"],
    "train": ["bench_train_step"],
    "cache": ["bench_teacher_cache"],
    "eval": ["bench_evaluate"],
    "data": ["bench_data"],
    "parallel": ["bench_parallel"],
}
END_TO_END = {module for modules in SUITES.values() for module in modules}
MODULES = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
SUITES["ops"] = [module for module in MODULES if module not in END_TO_END]


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
    rest = "  ".join(f"{key} {row[key]}" for key in (*tables.COLUMNS, "left out") if key in row)
    return (
        f"{row['op']:18} {row['shape']:14} {row['provider']:24} {row['us']:10.1f} us {spread:24} "
        f"{row['speedup']:6.2f}x  {rest}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted([*SUITES, "gpu"]), default="ops")
    parser.add_argument("--only", help="one op, method or network")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per case")
    parser.add_argument("--table", action="store_true", help="rewrite all tables and stop")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="of gpu: its folder")
    parser.add_argument("--budget", type=float, default=420, help="of gpu: seconds in all")
    args = parser.parse_args()
    if args.suite == "gpu":
        gpu.suite(args.out.resolve(), args.budget, args.only)
    elif args.table:
        tables.write()
    else:
        run(args.suite, args.only, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
