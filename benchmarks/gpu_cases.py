"""The cases of `--suite gpu`, a part of them per process (see gpu.py); a child of it.

    python benchmarks/gpu_cases.py ops_triton --out DIR

Networks have random weights, images are random. "of copy" is an op's bandwidth over that of the
copy in DIR/rows.jsonl. "published" is the published loop (see published.py) in float32 and eager
mode, with torch's own settings, which compute convolutions in TF32; "graph" replays a CUDA graph;
"graph compiled" one of a twin under torch.compile. The rows of a case are appended to
DIR/rows.jsonl as soon as it is done.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import bench_apgd_step
import bench_attack
import bench_augment
import bench_cross_entropy
import bench_dlr
import bench_feature_distance
import bench_ikl
import bench_margin
import bench_mart_bce
import bench_pgd_step
import bench_random_start
import bench_softmax_entropy
import bench_softmax_kl
import bench_train_step
import numpy as np
import published
import torch
from run import line, measure
from timing import LOOPS, Case, exact, finish, in_graph, machine

from fastadv import methods
from fastadv.ops import _library
from fastadv.runs.config import Config
from fastadv.train import train

GPU = torch.cuda.is_available()
# An op on 8 images takes as long as its launch.
FEW, SHAPES = (8, 3, 32, 32), ((512, 3, 32, 32), (512, 3, 224, 224))
ROWS = (512, 10), (2**22, 10), (2**16, 1000)
NETWORKS = ("resnet18", 512), ("mobilenet_v2", 512), ("wrn34_10", 128)
METHODS, TEACHER = ("rslad", "advfunmatch"), "wrn34_10"
SETTINGS = [
    {"BLOCK": block, "num_warps": warps} for block in (1024, 2048, 4096) for warps in (4, 8)
]
MADE_THERE = ("ceilings", "ops_cuda", "ops_triton", "attack", "tune") if GPU else ()
SEEDS = "vfd+at", "rslad", "bmtard", "advfunmatch"  # the methods that the project began with
SMALL = {}  # what makes the networks of attacks and steps small
if not GPU:  # the stand-ins of a dry run
    FEW, SHAPES, ROWS = (1, 3, 4, 4), ((2, 3, 5, 5),), ((3, 10),)
    NETWORKS, METHODS, TEACHER = (("wrn10_1", 2),), ("rslad",), "wrn10_1"
    SETTINGS, SEEDS = [{"BLOCK": 2048, "num_warps": 4}], ("rslad",)
    SMALL, TINY = (
        {"samples": 1, "memory": False},
        {"updates": 2, "batch_size": 8, "student_width": 1},
    )


def ceilings():
    """What the card can do: a copy, counting what is read and written, a product of matrices in
    bfloat16, and the shortest launch."""
    source = torch.rand(2**28 if GPU else 2**18)
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    yield partial(Case, "copy", "1 GB", copy, bool, nbytes=2 * source.nbytes)
    side = 8192 if GPU else 8
    a, b = (torch.randn(side, side, dtype=torch.bfloat16) for _ in range(2))
    facts = {"bf16": {"flop": 2 * side**3}}
    yield partial(Case, "matmul", f"{side}^3", {"bf16": lambda: a @ b}, bool, facts=lambda: facts)
    one = torch.zeros(1)
    launch = {"eager": one.zero_, "in a graph": in_graph(one.zero_)}
    loops = {"in a graph": LOOPS}
    yield partial(Case, "launch", "1", launch, bool, loops=loops)


def ops_cuda():
    """The ops that have CUDA C++."""
    for shape in (FEW, *SHAPES):
        yield partial(bench_pgd_step.case, *shape, graph=True)
    for shape in SHAPES:
        yield partial(bench_random_start.case, bench_random_start.linf, *shape)
        yield partial(bench_augment.case, 4, *shape)
    for shape in ROWS:
        yield partial(bench_softmax_kl.case, *shape)


def ops_triton():
    """All ops that Triton has, first those that CUDA C++ has too."""
    yield from ops_cuda()
    for shape in SHAPES:
        yield partial(bench_apgd_step.case, *shape)
        yield partial(bench_feature_distance.case, "mse", *shape)
    for shape in ROWS[::2]:
        for module in (bench_cross_entropy, bench_dlr, bench_margin, bench_mart_bce):
            yield partial(module.case, *shape)
        yield partial(bench_softmax_entropy.case, *shape, bench_softmax_entropy.exact, 0.0)
    yield partial(bench_ikl.case, ROWS[0][0], 100, memory=False)


def attack():
    """PGD-10; with the rivals that torch compiles for a minute last."""
    for name, batch in NETWORKS:
        yield partial(bench_attack.case, name, batch, rivals=False, **SMALL)
    yield partial(bench_attack.case, *NETWORKS[0], **SMALL)


def steps():
    """Whole training steps."""
    options = {"batch": NETWORKS[0][1], "device": "cuda" if GPU else "cpu", "compiled": True}
    for method in METHODS:
        yield partial(bench_train_step.case, method, NETWORKS[0][0], TEACHER, **options)


def tune():
    """The launch settings of Triton's kernels; the first provider is the one in use."""
    l2 = partial(bench_pgd_step.case, norm="l2")
    starts = bench_random_start
    for name, make in {
        "pgd_step.LINF": bench_pgd_step.case,
        "pgd_step.L2": l2,
        "random_start.SHIFT": partial(starts.case, starts.linf),
        "random_start.BALL": partial(starts.case, starts.l2),
        "augment.CONFIG": partial(bench_augment.case, 4),
        "apgd_step.LINF": bench_apgd_step.case,
    }.items():
        module, attribute = name.split(".")
        literal = getattr(importlib.import_module(f"fastadv.kernels.{module}"), attribute)
        for shape in SHAPES:
            yield partial(tuned, name, literal, dict(literal), make, shape)


def tuned(name, literal, current, make, shape):
    """The case of one launch setting, `literal`, whose providers are its values."""
    settings = [current, *(setting for setting in SETTINGS if setting != current)]
    case = make(*shape)
    call = case.providers["fastadv"]

    def with_setting(setting, function):
        literal.update(setting)
        try:
            function()
        finally:
            literal.update(current)

    def gate():
        for name in [*providers]:
            try:
                with_setting(json.loads(name), case.gate)
            except Exception:  # of a setting that the compiler or the GPU refuses
                if name == json.dumps(current):
                    raise
                traceback.print_exc()
                del providers[name]

    providers = {json.dumps(s): partial(with_setting, s, call) for s in settings}
    facts = {key: {"current": key == json.dumps(current)} for key in providers}
    return Case(name, case.shape, providers, gate, case.nbytes, facts=lambda: facts, samples=3)


def learn():
    """Short runs of the trainer on random images, the teachers of the student's size."""
    folder = Path(tempfile.mkdtemp(prefix="fastadv-gpu-"))
    for name in SEEDS:
        yield partial(same_losses, folder, name)
    for name in SEEDS:
        yield partial(learned, folder, name)


def same_losses(folder, name):
    """A row: five steps in float32, whose mean loss must be that of the CPU to 1 %."""
    size = {"updates": 5, "batch_size": 64, "student_width": 8} if GPU else TINY
    start = time.perf_counter()
    with exact():
        ours = trained(folder, name, "cuda" if GPU else "cpu", **size)
        seconds = time.perf_counter() - start
        theirs = trained(folder, name, "cpu", **size)
    if not abs(ours["loss"] - theirs["loss"]) <= 0.01 * abs(theirs["loss"]):
        raise AssertionError(f"{name}: loss {ours['loss']}, must be the CPU's {theirs['loss']}")
    return [run_row(f"{name}, 5 steps", seconds, ours | {"loss on CPU": theirs["loss"]})]


def learned(folder, name):
    """A row: some epochs in bfloat16 with a teacher cache."""
    size = {"updates": 8, "batch_size": 512, "epochs": 6} if GPU else {"epochs": 1, **TINY}
    low = dict.fromkeys(("precision_attack", "precision_outer", "precision_teacher"), "bf16")
    start = time.perf_counter()
    row = trained(folder, name, "cuda" if GPU else "cpu", **size, **low)
    return [run_row(f"{name}, {size['epochs']} epochs", time.perf_counter() - start, row)]


def run_row(op, seconds, found):
    """The row of a run: "images/s" is that of its last epoch."""
    us = round(seconds * 1e6)
    times = {"us": us, "p20": us, "p80": us, "speedup": 1.0, "images/s": found["images_per_s"]}
    facts = {key: found[key] for key in ("loss", "loss on CPU") if key in found}
    return {"op": "training", "shape": op, "provider": "fastadv"} | times | facts


def trained(folder, name, device, updates, batch_size, epochs=1, student_width=64, **options):
    """The last row of the metrics of a run, whose teachers are natural runs of one epoch."""
    images = updates * batch_size * 10 // 9  # of which a tenth is held out
    common = {"data": "npz", "data_dir": random_images(folder, images), "device": device}
    common |= {"student_width": student_width, "batch_size": batch_size}
    common |= {"student": "resnet18", "steps": published.STEPS}
    common |= {"teacher_cache": str(folder / "cache"), "milestones": ()}
    teachers = {}
    for which in methods.get(name).teachers:
        out = folder / f"{which}-{images}-{student_width}"
        if not out.exists():
            train(Config(method="natural", out=str(out), epochs=1, **common))
        teachers[f"{which}_checkpoint"] = str(out / "last.safetensors")
    run = tempfile.mkdtemp(dir=folder)
    config = Config(method=name, out=f"{run}/run", epochs=epochs, **common, **teachers, **options)
    return train(config)[-1]


def random_images(folder, count):
    """The path of an .npz of so many random images to train on."""
    path, random, arrays = folder / f"{count}.npz", np.random.default_rng(0), {}
    if path.exists():  # for another method
        return str(path)
    for split, size in (("train", count), ("test", 64)):
        shape = size, 3, 32, 32
        arrays[f"{split}_images"] = random.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(size) % 10
    np.savez(path, **arrays)
    return str(path)


def shares(row, copy):
    """The row with what it reaches of the card's ceilings. copy: GB/s, or None."""
    if copy and "GB/s" in row:
        row["of copy"] = round(row["GB/s"] / copy, 2)
    if flop := row.pop("flop", None):
        row["TFLOP/s"] = round(flop / row["us"] / 1e6, 1)
    return row


def copy_bandwidth(path):
    """GB/s of the copy among the rows of a file, or None."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [row["GB/s"] for row in map(json.loads, lines) if row["op"] == "copy"]
    return found[-1] if found else None


def rows(part, seconds, skip=0):
    """Yields (number of the case, its rows, how many of its providers failed) for all cases of a
    part but the first `skip`. Of what fails the error is printed: the rest is worth having."""
    for n, make in enumerate(itertools.islice(PARTS[part](), skip, None), skip):
        found, failed = [], 0
        try:
            # Not while it is timed: the default device costs time in every call of torch.
            with torch.device("cuda") if part in MADE_THERE else contextlib.nullcontext():
                case = make()
            if isinstance(case, Case):
                case, failed = tried(case, part)
                case = measure(case, seconds)
            found = [*case]
        except Exception:  # of a kernel, a compiler or memory
            traceback.print_exc()
            failed += 1
        yield n, found, failed
        torch.compiler.reset()


def tried(case, part):
    """(the case without the providers that fail, each with its reason under "left out"; the number
    of fastadv's own among them). Of a GPU's each has been called until it is compiled and captured
    as a graph. Without CUDA C++ to compare with, no time goes into the compiler's rivals."""
    if not GPU:
        case = replace(case, samples=1, calls=0)
    left_out, failed = [case.left_out] if case.left_out else [], 0
    for name, call in [*case.providers.items()]:
        if part == "ops_cuda" and name.startswith("compile"):
            del case.providers[name]
            continue
        try:
            for _ in range(3 if GPU and "graph" in name else 1):
                call()
            finish()
        except Exception as error:
            traceback.print_exc()
            failed += name.startswith("fastadv")
            left_out.append(f"{name}: {str(error).partition(chr(10))[0]}")
            del case.providers[name]
    floors = {name: floor for name, floor in case.floors.items() if floor in case.providers}
    return replace(case, floors=floors, left_out="; ".join(left_out) or None), failed


def usable():
    """Whether the GPU still computes for this process: not after an access outside of memory."""
    try:
        finish()
        if GPU:
            torch.cuda.empty_cache()
    except Exception:
        traceback.print_exc()
        return False
    return True


PARTS = {
    "ceilings": ceilings,
    "ops_cuda": ops_cuda,
    "ops_triton": ops_triton,
    "attack": attack,
    "train": steps,
    "tune": tune,
    "learn": learn,
}


def main():
    """Appends the rows of a part as they come. Exits with an error if something failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0, help="cases that a former process has done")
    parser.add_argument("--failed", type=int, default=0, help="failures that it has seen")
    args = parser.parse_args()
    if not GPU:  # for a stand-in it takes too long
        torch.compile = lambda function, **_: function
    backends = {name: op.cuda for name, op in _library.ops.items()}
    where, failures = {"part": args.part} | machine() | {"backends": backends}, args.failed
    results = args.out / "rows.jsonl"
    copy = copy_bandwidth(results)
    for n, found, failed in rows(args.part, 1.0 if GPU else 0.0, args.skip):
        failures += failed
        for row in found:
            row = shares(row, copy)
            print(line(row), flush=True)
            with open(results, "a") as file:
                file.write(json.dumps(row | where) + "\n")
                file.flush()
                os.fsync(file.fileno())
        if not usable():  # a new process goes on with the next case
            rest = "--out", str(args.out), "--skip", str(n + 1), "--failed", str(failures)
            os.execv(sys.executable, [sys.executable, __file__, args.part, *rest])
    if failures:
        sys.exit(f"{failures} failed")


if __name__ == "__main__":
    main()
