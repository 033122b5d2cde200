"""Every method on CIFAR-10 at equal budget: clean, PGD-20 and AutoAttack accuracy over seeds.

    python benchmarks/study.py --preset cpu --data-dir DIR --out runs/study   # a night, 2 cores
    python benchmarks/study.py --preset gpu --data-dir DIR --out runs/study   # papers' recipes
    python benchmarks/study.py --preset cpu --table       # table and plot anew, from the rows

One robust teacher (TRADES) and one natural one are trained first, then students that differ in
nothing but the method, and for the "gpu" preset in their papers' recipes, where there are any. A
student's last checkpoint is attacked on the first 1,000 test images, linf eps 8/255: AutoAttack is
the standard version, its search in the preset's precision and its verdict in float32. Nothing is
chosen by test images.

The same command goes on where it was stopped: runs within an epoch, attacks within a batch. Rows
are appended to benchmarks/results/study.jsonl as networks are done; each has the preset, the
fingerprint of the data, and of the teachers' weights, and only rows of equal ones are put together.
"""

import argparse
import hashlib
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from tables import PAGE, ROOT, replace_between
from timing import RESULTS, machine

from fastadv import data, evaluate, methods
from fastadv.attacks import suite
from fastadv.runs.config import Config
from fastadv.train import train
from fastadv.train.recipes import by_scale, recipe, recipes

METHODS = "natural", "at", "trades", "mart", "ard", "rslad", "mtard", "bmtard", "adaad"
METHODS += "advfunmatch", "vfd+trades", "saad", "igdm+rslad", "ikl"
TEACHERS = {"teacher": "trades", "clean_teacher": "natural"}
ATTACKS = "clean", "pgd20", "aa"
IMAGES, EPS = 1_000, 8 / 255
PLOT = ROOT / "docs" / "images" / "study.png"
SAVED = {"save_every": 5.0, "eval_every": 1000}  # minutes; validation is for nothing here
RATES = {"lr": 0.1, "weight_decay": 5e-4} | SAVED
NARROW = {"student": "resnet18", "batch_size": 64} | RATES | {"lr": 0.05}
# By preset: training images; the fields of Config of teachers and of students; precision; device.
PRESETS = {
    "cpu": {
        "train": 10_000,
        "teachers": NARROW | {"student_width": 24, "epochs": 20, "milestones": (14, 18)},
        "students": NARROW | {"student_width": 8, "epochs": 15, "milestones": (10, 13)},
        "seeds": (0, 1),
        "device": "cpu",
    },
    "gpu": {
        "train": None,  # all
        "teachers": {"student": "wrn34_10", "epochs": 110, "milestones": (75, 90)} | RATES,
        "students": {"student": "resnet18", "epochs": 200, "milestones": (100, 150)} | RATES,
        "seeds": (0, 1, 2),
        "device": "cuda",
    },
}


def fingerprint(arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


def settings(method, preset):
    """The fields of Config of a student, but for data and precision: those of the method's recipe
    in preset "gpu", if it has one for this network; else the preset's, fitted to the scale of the
    method's loss."""
    chosen = PRESETS[preset]["students"]
    name = f"{method.replace('+', '-')}-cifar10-{chosen['student']}"
    if preset == "gpu" and name in recipes():
        return recipe(name) | SAVED | {"teacher": None, "clean_teacher": None}  # runs of fastadv
    return by_scale(chosen, method)


def trained(out, fields, teachers):
    """The network of a run's last epoch; the run is trained, or gone on with, where it is not.
    teachers: {which: path of its checkpoint}."""
    needed = {f"{which}_checkpoint": str(teachers[which]) for which in needs(fields["method"])}
    train(Config(**fields | needed, out=str(out)), resume=(out / "config.json").exists())
    return evaluate.from_run(out / "last.safetensors")[0]


def needs(method):
    return [which for which in TEACHERS if which in methods.get(method).teachers]


def attacked(model, test, folder, options):
    """{attack: accuracy} of a network; AutoAttack's is that under all its attacks."""
    stages = suite.stages(ATTACKS, EPS)
    record = evaluate.Record(len(test), folder=folder)
    evaluate.run(model, test, stages, record=record, progress=True, **options)
    names = *ATTACKS[:-1], stages[-1].name  # what is right under a suite's last is so under all
    return {a: record.right(n).double().mean().item() for a, n in zip(ATTACKS, names, strict=True)}


def rows(preset, data_dir, out, only):
    """Yields the row of each network that has none yet, as it is done."""
    chosen = PRESETS[preset]
    out.mkdir(parents=True, exist_ok=True)
    common = {"data": "cifar10", "data_dir": str(data_dir), "eps": EPS, "device": chosen["device"]}
    common["train_images"] = chosen["train"]
    dataset = data.load("cifar10", data_dir, train_images=chosen["train"])
    test = dataset.test.take(torch.arange(IMAGES))
    images = (split.images.numpy() for split in (dataset.train, test))
    key = {"preset": preset, "data": fingerprint(images)}
    low = chosen["device"] == "cuda"
    common |= {f"precision_{p}": "bf16" if low else "fp32" for p in ("attack", "outer", "teacher")}
    options = {"precision": "bf16" if low else "fp32", "device": chosen["device"]}
    weights, teachers = [], {}
    for which, method in TEACHERS.items():
        model = trained(out / which, by_scale(common | chosen["teachers"], method), {})
        teachers[which] = out / which / "last.safetensors"
        weights += [tensor.cpu().numpy() for tensor in model.state_dict().values()]
        row = key | {"method": f"{which} ({method})", "seed": 0}
        if not known(row):
            yield row | attacked(model, test, out / which / "attacked", options)
    key["teachers"] = fingerprint(weights)
    for seed in chosen["seeds"]:
        for method in only:
            row = key | {"method": method, "seed": seed}
            if not known(row):
                folder = out / f"{method}-{seed}"
                fields = settings(method, preset) | common | {"seed": seed}
                model = trained(folder, fields, teachers)
                yield row | attacked(model, test, folder / "attacked", options)


def results():
    path = RESULTS / "study.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def known(row):
    return any(row.items() <= other.items() for other in results())


def newest(preset):
    """The rows of a preset with the teachers of the newest of them, by method."""
    found = [row for row in results() if row["preset"] == preset]
    teachers = [row["teachers"] for row in found if "teachers" in row][-1:]
    by = {}
    for row in found:
        if row.get("teachers") in (None, *teachers):
            by.setdefault(row["method"], []).append(row)
    return by


def moments(values):
    """(mean, standard deviation over seeds, or 0 for one) in percent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return 100 * statistics.mean(values), 100 * spread


def table(preset):
    lines = ["| method | seeds | clean | PGD-20 | AutoAttack |", "|---|---|---|---|---|"]
    for method, found in newest(preset).items():
        cells = [method, str(len(found))]
        for name in ATTACKS:
            mean, spread = moments([row[name] for row in found])
            cells.append(f"{mean:.1f}" + (f" ± {spread:.1f}" if len(found) > 1 else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(preset, path):
    """Clean accuracy against that under AutoAttack, with standard deviations over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for method, found in newest(preset).items():
        clean, _, robust = (moments([row[name] for row in found]) for name in ATTACKS)
        axes.errorbar(clean[0], robust[0], robust[1], clean[1], fmt="o", linewidth=0.6)
        offset = {"textcoords": "offset points", "xytext": (5, 4), "fontsize": 8}
        axes.annotate(method, (clean[0], robust[0]), **offset)
    axes.set(xlabel="clean accuracy, %", ylabel="accuracy under AutoAttack, %")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--data-dir", help="the folder cifar-10-batches-py")
    parser.add_argument("--out", type=Path, help="folder of runs")
    parser.add_argument("--only", default=",".join(METHODS), help="these methods, with commas")
    parser.add_argument("--table", action="store_true", help="of the rows that there are")
    args = parser.parse_args(argv)
    if not args.table:
        if not (args.data_dir and args.out):
            parser.error("--data-dir and --out are needed, but for --table")
        for row in rows(args.preset, args.data_dir, args.out, args.only.split(",")):
            with open(RESULTS / "study.jsonl", "a") as file:
                file.write(json.dumps(row | machine()) + "\n")
            print(row, flush=True)
    lines = table(args.preset)
    print("\n".join(lines))
    if len(lines) > 2:
        where = about(args.preset)
        replace_between(PAGE, marks(args.preset), [*lines, "", where])
        plot(args.preset, PLOT.with_name(f"study-{args.preset}.png"))


def marks(preset):
    return (
        f"<!-- study {preset} table: benchmarks/study.py -->",
        f"<!-- end of study {preset} table -->",
    )


def about(preset):
    """On what the rows were measured, in words."""
    found = [row for rows in newest(preset).values() for row in rows]
    kinds = sorted({f"{row['gpu'] or row['cpu']} ({row['isa']})" for row in found})
    return (
        f"{PRESETS[preset]['train'] or 'All'} training images, {IMAGES} test images, linf eps "
        f"8/255; torch {found[-1]['torch']}, {', '.join(kinds)}, {found[-1]['time'][:10]}."
    )


if __name__ == "__main__":
    main()
