"""Students of the bf16 engine against students of the plain fp32 loop, in pairs.

    python benchmarks/equivalence.py --only digits
    python benchmarks/equivalence.py --data-dir DIR                 # and CIFAR-10, about two hours
    python benchmarks/equivalence.py --only digits --seeds 0 --out DIR      # rows go to DIR

Both arms train one student by the same settings: on the digits by RSLAD from the same robust
teacher, on a part of CIFAR-10 a narrow ResNet-18 by PGD-AT. A pair shares a seed, and with it the
initial weights, batches and attack starts. "plain" is the loop as published, in eager fp32 torch,
which stands in this file; "engine" is `fastadv.train` with --precision bf16: attack, student and
teacher. Both are judged by one plain fp32 PGD-20 on the average of their weights after the last
step. Nothing is selected, so that images of validation and test count alike.

The verdict is of the mean paired difference: the arms are equivalent where its 95 % confidence
interval (Student's t over pairs) lies within +-1.5 points. The seeds were fixed beforehand, 20 on
the digits and 16 on CIFAR-10: two runs that differ in fp32 rounding alone end up to three points
apart. Rows are appended to benchmarks/results/equivalence.jsonl.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from published import torch_alone
from scipy.stats import t as student_t
from timing import RESULTS, machine

from fastadv import data, models, ops
from fastadv.evaluate import from_run
from fastadv.runs.config import Config
from fastadv.train import train
from fastadv.train.average import build_average
from fastadv.train.build import build_loader
from fastadv.train.optimizer import learning_rate
from fastadv.train.recipes import digits_student, digits_teacher

MARGIN = 1.5  # points
ATTACKS = {"clean": 0, "pgd20": 20}  # steps
BF16 = {f"precision_{part}": "bf16" for part in ("attack", "outer", "teacher")}
DIGITS = digits_student("rslad") | {"milestones": (24, 34), "eval_every": 40, "ema": 0.99}
CIFAR = {
    "method": "at",
    "data": "npz",
    "student": "resnet18",
    "student_width": 8,
    "batch_size": 64,
    "lr": 0.05,
    "epochs": 5,
    "milestones": (3, 4),
    "eval_every": 5,
    "ema": 0.98,
}
# By data set: seeds, and the fields of Config of the teacher (or None) and of the student. Averages
# and a rate that ends at a hundredth keep the noise of the last steps out of the differences.
PLANS = {
    "digits": (range(20), digits_teacher("teacher"), DIGITS),
    "cifar10": (range(16), None, CIFAR),
}
IMAGES = {"train": 5_000, "test": 5_000}  # of CIFAR-10; a tenth of train is held out


def kl(logits, target):
    """KL(target || logits), batch mean."""
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(target, 1), reduction="batchmean")


def ascend(objective, x, x_adv, config, steps):
    """PGD: the point of the ball around x that maximises the objective, from x_adv on."""
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(objective(x_adv), x_adv)
        x_adv = x_adv.detach() + config.step_size * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - config.eps), x + config.eps).clamp(0, 1)
    return x_adv


def plain(config, dataset):
    """PGD-AT or RSLAD as published: the student's averaged model.

    Loader, attack starts and averages are those of the other arm: they make the pair.
    """
    torch.manual_seed(config.seed)
    channels = dataset.train.images.shape[1]
    student = models.get(config.student, dataset.num_classes, channels, config.student_width)
    torch_alone(student)
    distilled, objective = config.method == "rslad", F.cross_entropy
    noise = {"init": "uniform", "lo": 0, "hi": 1}
    if distilled:
        teacher = from_run(config.teacher_checkpoint)[0].eval()
        objective, noise = kl, {"init": "gaussian"}
    optimizer = torch.optim.SGD(
        student.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    average, loader = build_average(config, student), build_loader(config, dataset)
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = learning_rate(config, epoch, config.epochs)
        for x, target, index, _ in loader.epoch(epoch):
            x = x.contiguous()
            if distilled:
                with torch.no_grad():
                    target = teacher(x)
            start = ops.random_start(x, config.eps, index=index, **noise)
            student.eval()
            x_adv = ascend(
                lambda v, target=target: objective(student(v), target),
                x,
                start,
                config,
                config.steps,
            )
            student.train()
            loss = objective(student(x_adv), target)
            if distilled:
                loss = (5 * loss + objective(student(x), target)) / 60
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(student)
    return average.module


def engine(config, dataset):
    """The same by fastadv's own trainer, which loads the data itself."""
    train(config)
    return from_run(Path(config.out) / "last.safetensors")[0]


ARMS = {"plain": plain, "engine": engine}


def accuracy(model, split, config, steps):
    """Share of right answers under `steps` of PGD on the cross-entropy, from a uniform start."""
    model.eval().to(memory_format=torch.contiguous_format)
    right = 0
    for x, y, index, _ in data.Loader(split, 250).epoch(0):
        start = ops.random_start(x, config.eps, seed=0, index=index, lo=0, hi=1) if steps else x
        x_adv = ascend(lambda v, y=y: F.cross_entropy(model(v), y), x, start, config, steps)
        with torch.no_grad():
            right += int((model(x_adv).argmax(1) == y).sum())
    return right / len(split)


def held_out(dataset):
    """Validation and test images in one set: no arm selects anything by the former."""
    fields = (
        torch.cat([getattr(part, field) for part in (dataset.val, dataset.test)])
        for field in ("images", "labels", "index")
    )
    return data.ImageSet(*fields)


def subset(data_dir, path):
    """CIFAR-10 cut to IMAGES as an .npz, as which it is augmented like CIFAR-10."""
    full = data.load("cifar10", data_dir)
    arrays = {}
    for name, count in IMAGES.items():
        part = getattr(full, name).take(torch.arange(count))
        arrays |= {f"{name}_images": part.images.numpy(), f"{name}_labels": part.labels.numpy()}
    np.savez(path, **arrays)


def pairs(teacher, student, seeds, folder):
    """Rows {"arm", "seed", "seconds" of training, "clean", "pgd20"}, accuracies in [0, 1]; the
    teacher, if any, is trained first, where `folder` has none."""
    if teacher:
        out = folder / "teacher"
        train(Config(**teacher, out=str(out)), resume=(out / "config.json").exists())
        student = student | {"teacher_checkpoint": str(out / "best.safetensors")}
    for seed in seeds:
        cache = {"teacher_cache": str(folder / "cache"), "out": str(folder / f"engine-{seed}")}
        configs = {
            "plain": Config(**student, seed=seed),
            "engine": Config(**student | BF16 | cache, seed=seed),
        }
        for arm, config in configs.items():
            dataset = data.load(config.data, config.data_dir)
            start = time.perf_counter()
            model = ARMS[arm](config, dataset)
            row = {"arm": arm, "seed": seed, "seconds": round(time.perf_counter() - start, 1)}
            rates = {
                attack: accuracy(model, held_out(dataset), config, steps)
                for attack, steps in ATTACKS.items()
            }
            yield row | rates


def interval(differences):
    """(mean, half the width of its 95 % confidence interval), Student's t; inf for one value."""
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return mean, float("inf")
    error = statistics.stdev(differences) / count**0.5
    return mean, float(student_t.ppf(0.975, count - 1)) * error


def newest(results):
    """{data set: {arm: {seed: row}}} of the last row of each."""
    found = {}
    for row in map(json.loads, results.read_text().splitlines()):
        found.setdefault(row["data"], {}).setdefault(row["arm"], {})[row["seed"]] = row
    return found


def table(name, arms):
    """Markdown: accuracies in percent by pair and on average, and a verdict by attack."""
    seeds = sorted(arms["plain"].keys() & arms["engine"].keys())
    lines = ["| data | attack | seed | plain fp32 | engine bf16 | difference |"]
    lines.append("|---|---|---|---|---|---|")
    verdicts = []
    for attack in ATTACKS:
        plain, engine = ([100 * arms[arm][seed][attack] for seed in seeds] for arm in ARMS)
        differences = [b - a for a, b in zip(plain, engine, strict=True)]
        columns = (plain, engine, differences)
        rows = [*zip(seeds, *columns, strict=True), ("mean", *map(statistics.mean, columns))]
        lines += [
            f"| {name} | {attack} | {s} | {a:.2f} | {b:.2f} | {d:+.2f} |" for s, a, b, d in rows
        ]
        verdicts.append(f"{name} {attack}, {len(seeds)} pairs: {verdict(*interval(differences))}")
    return [*lines, "", *verdicts]


def verdict(mean, half):
    """A sentence on a mean paired difference in points and half the width of its interval."""
    inside = "inside" if abs(mean) + half <= MARGIN else "not inside"
    return (
        f"mean difference {mean:+.2f}, 95 % interval {mean - half:+.2f} to {mean + half:+.2f}, "
        f"{inside} +-{MARGIN} points"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PLANS, help="this data set alone")
    parser.add_argument("--data-dir", help="folder of CIFAR-10's files, as of fastadv.train")
    parser.add_argument("--seeds", help="comma separated; default: the plan's")
    parser.add_argument("--out", type=Path, help="run folders and rows go here")
    args = parser.parse_args()
    names = [args.only] if args.only else PLANS
    if "cifar10" in names and not args.data_dir:
        parser.error("CIFAR-10 needs --data-dir; --only digits goes without")
    folder = args.out or Path(tempfile.mkdtemp(prefix="fastadv-equivalence-"))
    folder.mkdir(parents=True, exist_ok=True)
    results, where = (args.out or RESULTS) / "equivalence.jsonl", machine()
    for name in names:
        planned, teacher, student = PLANS[name]
        seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else planned
        files = {}
        if name == "cifar10":
            files["data_dir"] = str(folder / "cifar10.npz")
            subset(args.data_dir, files["data_dir"])
        for row in pairs(teacher, student | files, seeds, folder / name):
            with open(results, "a") as file:
                file.write(json.dumps({"data": name} | row | where) + "\n")
        print("\n".join(table(name, newest(results)[name])), flush=True)


if __name__ == "__main__":
    main()
