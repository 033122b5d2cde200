"""The suite for a machine with an NVIDIA GPU, and what its rows say to choose.

    python benchmarks/run.py --suite gpu --out DIR --budget 420
    python benchmarks/run.py --suite gpu --out DIR --only attack,train    # these parts alone
    python benchmarks/gpu.py choose DIR/rows.jsonl    # the literals that the rows justify

The parts run in the order of their value, each in a process and with a time limit of its own (see
parts.py): the compiled build, the card's ceilings, the ops by CUDA C++ and by Triton, PGD-10,
training steps, the launch settings of Triton's kernels, the tests for GPUs, those of the CUDA
kernels under compute-sanitizer, and short training runs. One that fails costs the others nothing.
DIR has rows.jsonl, a log of each part and summary.txt, written as they come. No network is needed.

Without a GPU it is a dry run: the same parts on tiny stand-ins and a CPU, whose times mean nothing.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import tables
import torch
from parts import Part, run_parts, screen

ROOT = Path(__file__).parents[1]
CASES = Path(__file__).with_name("gpu_cases.py")
TRITON = Path("tests/kernels/test_triton_interpret.py")  # which runs the tests of all ops
INSTALL = "-q", "--no-build-isolation", "--no-deps", "--disable-pip-version-check", "-e", "."
# Fails if a compiled part is missing: the extension is optional, so that pip does not report that
# it could not be built.
BUILT = """
import shutil, sys, torch
from fastadv.ops import _native
wanted = torch.cuda.is_available() and shutil.which("nvcc")
sys.exit(_native.missing or (wanted and _native.cuda_missing()) or 0)
"""
GAIN = 1.1  # a choice is changed for this much


def parts(out):
    """The suite's parts."""
    gpu, python = torch.cuda.is_available(), sys.executable
    dry = {} if gpu else {"ATTACK_STEPS": "1"}
    cuda, triton = ({"FASTADV_BACKEND": name} if gpu else dry for name in ("cuda", "triton"))
    sanitizer, nvcc = map(shutil.which, ("compute-sanitizer", "nvcc"))
    absent, no_cuda = None if gpu else "no GPU", "no nvcc" if gpu and not nvcc else None

    def cases(name, limit, environment=dry, missing=None):
        return Part(name, (python, CASES, name, "--out", out), limit, environment, missing)

    pytest = python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"
    shared = ("-n", "4") if gpu and importlib.util.find_spec("xdist") else ()
    files = sorted(p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text())
    files = [p.relative_to(ROOT) for p in files if p.name not in ("test_gpu_suite.py", TRITON.name)]
    check = sanitizer, "--error-exitcode", "1", "--report-api-errors", "no"
    device = "tests/kernels/test_cuda_device.py", "-k", "not graph"
    missing = absent or no_cuda or (None if sanitizer else "it is not installed")
    own_memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # not a pool that hides what is outside
    return [
        Part("build", (python, __file__, "build"), 150, {}, absent),
        cases("ceilings", 30),
        cases("ops_cuda", 60, cuda, no_cuda),
        cases("ops_triton", 90, triton),
        cases("attack", 150),
        cases("train", 120),
        cases("tune", 60, triton),
        Part("tests", (*pytest, *shared, *files), 120, {}, absent),
        Part("tests_triton", (*pytest, TRITON), 120, {}, absent),
        Part("sanitizer", (*check, *pytest, *device), 60, own_memory, missing),
        cases("learn", 60),
    ]


def suite(out, budget, only):
    """Runs the parts and prints one screen. Exits with an error if one did not pass."""
    known = parts(out)
    chosen = [part for part in known if not only or part.name in only.split(",")]
    if not chosen:
        sys.exit(f"--only is {only!r}, must be of {', '.join(part.name for part in known)}")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # by way of `finally`
    start, outcomes = time.monotonic(), []
    if chosen[0].name == "build":
        outcomes = run_parts(chosen[:1], out, budget, ROOT)
        if outcomes[0].state not in ("passed", "skipped"):
            os.environ["PYTHONPATH"] = str(uninstalled(out))
        chosen, budget = chosen[1:], budget - (time.monotonic() - start)
    outcomes = run_parts(chosen, out, budget, ROOT, outcomes)
    try:
        report(out / "rows.jsonl")
    except Exception:  # of a row that is odd; the screen is worth having
        traceback.print_exc()
    print("\n".join(["", *screen(outcomes, out)]))
    if not torch.cuda.is_available():
        print("no GPU: a dry run on stand-ins, whose times mean nothing")
    bad = [outcome.name for outcome in outcomes if outcome.state not in ("passed", "skipped")]
    if bad:
        sys.exit(f"did not pass: {', '.join(bad)} (--only {','.join(bad)} runs them again)")


def report(path):
    """Prints a table of each part, and the choices."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        print("\n".join(["", f"{part}:", "", *tables.markdown(mine)]))
    print("\n".join(["", *choices(rows)]))


def uninstalled(out):
    """A folder from which the checkout can be imported though it is not installed."""
    folder = out / "checkout"
    package = folder / "fastadv"
    package.mkdir(parents=True, exist_ok=True)
    for path in (*(ROOT / "fastadv").iterdir(), ROOT / "kernels"):
        if not (package / path.name).exists():
            (package / path.name).symlink_to(path)
    return folder


def build():
    """Installs the checkout into this Python. Exits if a compiled part is missing."""
    for command in (("-m", "pip", "install", *INSTALL), ("-c", BUILT)):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def choices(rows):
    """The literals that the rows justify, as lines to paste: which ops run CUDA C++ on a GPU, and
    the launch settings of Triton's kernels that are GAIN times as fast as those in use."""
    return [*backends(rows), *fused_relu(rows), *launches(rows)]


def fused_relu(rows):
    """The line of FUSED_RELU: whether PGD-10 is GAIN times as fast with ReLUs in one op, as the
    geometric mean over networks."""
    graph, logs = "fastadv_bf16 graph", []
    us = {(row["shape"], row["provider"]): row["us"] for row in rows if row["part"] == "attack"}
    for shape, provider in us:
        if provider == graph and (shape, f"{graph}, bias_relu") in us:
            logs.append(math.log(us[shape, graph] / us[shape, f"{graph}, bias_relu"]))
    if not logs:
        return []
    gain = math.exp(sum(logs) / len(logs))
    return [f"FUSED_RELU = {gain >= GAIN}  # fastadv/engine/folded.py: {gain:.2f}x"]


def backends(rows):
    """The lines of ON_GPU: ops whose CUDA C++ is GAIN times as fast as Triton's, as the geometric
    mean over shapes of what fastadv's providers take."""
    times = {"ops_cuda": {}, "ops_triton": {}}
    for row in rows:
        if row["part"] in times and row["provider"].startswith("fastadv"):
            times[row["part"]][row["op"], row["shape"], row["provider"]] = row["us"]
    gains = {}
    for key, us in times["ops_cuda"].items():
        if key in times["ops_triton"]:
            gains.setdefault(key[0].split()[0], []).append(math.log(times["ops_triton"][key] / us))
    if not gains:
        return []
    lines = ["ON_GPU = {  # fastadv/ops/_library.py"]
    for op, logs in gains.items():
        gain = math.exp(sum(logs) / len(logs))
        for name in [op, "pgd_step_"] if op == "pgd_step" else [op]:
            line = f'    "{name}": "cuda",  # {gain:.2f}x Triton'
            lines.append(line if gain >= GAIN else f"    # {name}: {gain:.2f}x Triton")
    return [*lines, "}"]


def launches(rows):
    """One line for each launch setting in rows of the part "tune"."""
    tried = {}
    for row in rows:
        if row["part"] == "tune":
            tried.setdefault((row["op"], row["shape"]), {})[row["provider"]] = row
    lines = []
    for (where, shape), found in tried.items():
        current = next(name for name, row in found.items() if row["current"])
        best = min(found, key=lambda name: found[name]["us"])
        gain = found[current]["us"] / found[best]["us"]
        module, name = where.split(".")
        where = f"kernels/{module}.py at {shape}: {gain:.2f}x"
        if gain >= GAIN:
            lines.append(f"{name} = {best}  # {where}")
        else:
            lines.append(f"{name} = {current}  # as it is: {where} with {best}")
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=["choose", "build"])
    parser.add_argument("rows", type=Path, nargs="?", help="of choose: a file rows.jsonl")
    args = parser.parse_args()
    if args.command == "build":
        build()
    else:
        print("\n".join(choices([json.loads(v) for v in args.rows.read_text().splitlines()])))


if __name__ == "__main__":
    main()
