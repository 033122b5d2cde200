"""The cases of `--suite gpu`, a part of them per process (see gpu.py); a child of it.

    python benchmarks/gpu_cases.py ops_triton --out DIR

Networks have random weights, images are random. "of copy" is an op's bandwidth over that of the
copy in DIR/rows.jsonl. "published" is the published loop (see published.py) in float32 and eager
mode, with torch's own settings, which compute convolutions in TF32; "graph" replays a CUDA graph;
"graph compiled" one of a twin under torch.compile. The rows of a case are appended to
DIR/rows.jsonl as soon as it is done.
"""

import argparse
import importlib
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
from timing import LOOPS, Case, exact, in_graph, machine

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
    options = {"batch": NETWORKS[0][1], "device": "cuda" if GPU else "cpu"}
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
        function()
        literal.update(current)

    def gate():
        for setting in settings:
            with_setting(setting, case.gate)

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


def rows(part, seconds):
    """Yields the rows of all cases of a part; of a case that fails None, and its error is printed:
    the others are worth having."""
    for make in PARTS[part]():
        try:
            case = make()
            if isinstance(case, Case) and not GPU:
                case = replace(case, samples=1, calls=0)
            yield from measure(case, seconds) if isinstance(case, Case) else case
        except Exception:  # of a kernel, a compiler or memory
            traceback.print_exc()
            yield None
        if GPU:
            torch.compiler.reset()
            torch.cuda.empty_cache()


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
    """Appends the rows of a part as they come. Exits with an error if a case failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not GPU:  # for a stand-in it takes too long
        torch.compile = lambda function, **_: function
    elif args.part not in ("train", "learn"):
        torch.set_default_device("cuda")
    backends = {name: op.cuda for name, op in _library.ops.items()}
    where, failed = {"part": args.part} | machine() | {"backends": backends}, 0
    results = args.out / "rows.jsonl"
    copy = copy_bandwidth(results)
    for row in rows(args.part, 1.0 if GPU else 0.0):
        if row is None:
            failed += 1
            continue
        row = shares(row, copy)
        print(line(row), flush=True)
        with open(results, "a") as file:
            file.write(json.dumps(row | where) + "\n")
            file.flush()
            os.fsync(file.fileno())
    if failed:
        sys.exit(f"{failed} cases failed")


if __name__ == "__main__":
    main()
