"""Robust accuracy by fastadv and by the official codes, model by model.

    pip install --no-deps --target build/peers pyautoattack torchattacks foolbox eagerpy \
        GitPython gitdb smmap requests urllib3 idna certifi charset-normalizer
    PYTHONPATH=build/peers python benchmarks/agreement.py                  # networks on the digits
    PYTHONPATH=build/peers python benchmarks/agreement.py --data-dir DIR   # and on CIFAR-10
    python benchmarks/agreement.py --table                                 # its table anew

Trains a natural, a PGD-AT and a TRADES network on the digits (linf eps 0.15) and with --data-dir a
natural and a PGD-AT ResNet-18 of width 8 on 5,000 images of CIFAR-10 (8/255), then counts the test
images that are classified right under each attack of pyautoattack and of fastadv, in fp32.

"same": both sides begin at x plus one noise, so that what differs is the algorithm. "own": each
side's own draws, and for Square, a random search, the official count of a second seed too. "aa" is
the standard version as a whole, "aa bf16" fastadv's with the search in bfloat16 against the
official one in fp32. "NAME l1" is the attack in the l1 ball of eps 2 (digits) or 12 (CIFAR-10),
with AutoAttack's counts for that norm; for Square the digits get a border of one pixel, so that
both sides begin with the same tiles. "aa-plus" is that version, "aa-rand" the version rand on the
network behind uniform noise, whose draws decide some images: the official count of a second seed
is shown too. fastadv's count may be max(0.3 points, 2 images) from the official one (the
nearer of two), and for "pgd20" on torch's loss and the model itself fewer than 0.1 % of
torchattacks' pixels may differ; else the exit status is 1. Rows are appended to
benchmarks/results/agreement.jsonl.

"minimal" is of the attacks that look for the nearest adversarial point, against Foolbox's with the
same steps on the network itself: the median distance, in which misclassified images count 0 and
images without an adversarial point infinity, and for how many images one was found. fastadv's
median may be 3 % above Foolbox's, and it must find as many.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from equivalence import CIFAR, subset
from tables import PAGE, replace_between
from timing import RESULTS, machine

from fastadv import data, evaluate, freeze
from fastadv.attacks import CW, DDN, FMN, PGD, DeepFool, suite
from fastadv.attacks.minimal import distance
from fastadv.runs.config import Config
from fastadv.train import train
from fastadv.train.recipes import digits_student

MARKS = "<!-- agreement table: benchmarks/agreement.py -->", "<!-- end of agreement table -->"
SAME, OWN = ("apgd-ce", "apgd-dlr", "apgd-t"), ("fab-t", "square")
L1, VERSIONS = ("apgd-ce l1", "apgd-t l1", "fab-t l1", "square l1"), ("aa-plus", "aa-rand")
ATTACKS = ("pgd20", *SAME, *OWN, "aa", *L1, *VERSIONS)
AGAIN = (
    "square",
    "square l1",
    "aa-rand",
)  # decided by draws: the official count of a second seed too
MINIMAL = "minimal"
COLUMNS = ("model", "attack", "starts", "images", "clean", "official", "ours", "differ")
NEAREST_MARKS = "<!-- minimal table: benchmarks/agreement.py -->", "<!-- end of minimal table -->"
NEAREST_COLUMNS = ("model", "attack", "norm", "images", "official", "ours")
NEAREST_COLUMNS += ("official found", "ours found")


def start(x, eps):
    """x plus uniform noise that is a constant of the benchmark."""
    noise = 2 * torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(0)) - 1
    return (x + eps * noise).clamp(0, 1)


class Noisy(torch.nn.Module):
    """A network behind noise, half of eps in linf, that each pass draws anew."""

    def __init__(self, net, eps):
        super().__init__()
        self.net, self.eps = net, eps

    def forward(self, x):
        return self.net(x + self.eps / 2 * (2 * torch.rand_like(x) - 1))


class Bordered(torch.nn.Module):
    """A network of the images within a border of one pixel."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x[:, :, 1:-1, 1:-1])


def official_l1(name, model, eps, seed):
    """An l1 attack of pyautoattack as its standard version has it; APGD from the same noise."""
    from pyautoattack import AutoAttack

    adversary = AutoAttack(model, norm="L1", eps=eps, seed=seed)
    if name == "square":
        return adversary.square.perturb
    if name == "fab-t":
        adversary.fab.targeted, adversary.fab.seed = True, seed
        return adversary.fab.perturb
    attack = adversary.apgd if name == "apgd-ce" else adversary.apgd_targeted

    def perturb(x, y):
        attack.seed = seed
        with mock.patch("torch.randn_like", lambda v: gaussian(v).expand_as(v).clone()):
            return attack.perturb(x, y)

    return perturb


def gaussian(x):
    """Normal noise [1, ...] that is a constant of the benchmark."""
    return torch.randn((1, *x.shape[1:]), generator=torch.Generator().manual_seed(0))


def official_version(name, model, split, eps, seed):
    """bool [N]: right under a version of pyautoattack as a whole, in its own account."""
    from pyautoattack import AutoAttack

    x, y = split.images.float() / 255, split.labels
    adversary = AutoAttack(model, eps=eps, seed=seed, version=name.removeprefix("aa-"))
    return adversary.run_standard_evaluation(x, y)[1] == y


def official_attack(name, model, eps, same, seed):
    """An attack of pyautoattack as its standard version has it: attack(x, y) -> x_adv."""
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    if name == "fab-t":
        attack = FABAttack_PT(model, n_restarts=1, n_iter=100, eps=eps, seed=seed, norm="Linf")
        attack.targeted, attack.n_target_classes = True, 9
    elif name == "square":
        attack = SquareAttack(model, p_init=0.8, n_queries=5000, eps=eps, norm="Linf", seed=seed)
    else:
        kind = APGDAttack_targeted if name == "apgd-t" else APGDAttack
        attack = kind(model, eps=eps, seed=seed, **({} if name == "apgd-t" else {"loss": name[5:]}))
        if same:
            attack.attack_single_run = lambda x, y: kind.attack_single_run(
                attack, x, y, start(x, eps)
            )
    return attack.perturb


def official_right(name, model, split, eps, seed=0):
    """bool [N]: right under one official attack, or under all of its standard version ("aa")."""
    if name in VERSIONS:
        return official_version(name, model, split, eps, seed)
    x, y = split.images.float() / 255, split.labels
    with torch.no_grad():
        right = model(x).argmax(1) == y
    for attack in suite.CASCADES["aa"] if name == "aa" else (name,):
        rows = right.nonzero()[:, 0]
        if len(rows):
            if name in L1:
                perturb = official_l1(name.removesuffix(" l1"), model, eps, seed)
            else:
                perturb = official_attack(attack, model, eps, name in SAME, seed)
            x_adv = perturb(x[rows], y[rows])
            with torch.no_grad():
                right[rows] = model(x_adv).argmax(1) == y[rows]
    return right


def right(name, model, split, eps, precision="fp32"):
    """The same of fastadv."""
    if name in L1:
        stages = suite.cascade([name.removesuffix(" l1")], eps, "l1")
    elif name in ("aa", *VERSIONS):
        stages = suite.stages([name], eps)
    else:
        stages = suite.cascade([name], eps)
    if name in SAME:
        stages[-1].attack._start = lambda x, *_: start(x, eps)
    if name in L1[:2]:
        stages[-1].attack._start = lambda x, *_: x + gaussian(x)
    record = evaluate.run(model, split, stages, precision=precision)
    return record.right(stages[-1].name)


def pgd_row(model, split, eps):
    """PGD-20 against torchattacks': counts, and the share of pixels that differ, from ascending
    torch's cross-entropy on the model itself, and as fastadv attacks: its own cross-entropy, whose
    gradient does not cancel where a model is sure, on the twin."""
    import torchattacks

    x, y = split.images.float() / 255, split.labels
    theirs = torchattacks.PGD(model, eps, eps / 4, 20, random_start=False)(x, y)
    attack, model = PGD(eps, eps / 4, 20, init="zero"), model.eval()
    ours = attack(freeze(model), x, y)
    algorithm = attack.ascend(lambda v, y: F.cross_entropy(model(v), y, reduction="none"), x, y)
    with torch.no_grad():
        counts = [int((model(v).argmax(1) == y).sum()) for v in (theirs, ours)]
    pixels = [(v != theirs).double().mean().item() for v in (algorithm, ours)]
    keys = ("official", "ours", "pixels", "pixels_own")
    return dict(zip(keys, (*counts, *pixels), strict=True))


def rows(label, model, split, eps, attacks):
    """One row per attack of one model, two for "aa"."""
    clean = int(evaluate.correct(model, split, "clean", eps=eps).sum())
    base = {"model": label, "images": len(split), "clean": clean}
    for name in attacks:
        if name == "pgd20":
            yield base | {"attack": name, "starts": "same"} | pgd_row(model, split, eps)
            continue
        subject, images, radius = model, split, eps
        if name in L1:
            radius = 2.0 if "digits" in label else 12.0
        if name == "square l1" and "digits" in label:
            subject, pixels = Bordered(model).eval(), F.pad(split.images, (1, 1, 1, 1))
            images = data.ImageSet(pixels, split.labels, split.index)
        if name == "aa-rand":
            subject = Noisy(model, eps).eval()
        theirs = official_right(name, subject, images, radius)
        row = base | compared(name, theirs, right(name, subject, images, radius))
        if name in AGAIN:
            row["again"] = int(official_right(name, subject, images, radius, seed=1).sum())
        yield row
        if name == "aa":
            yield base | compared("aa bf16", theirs, right(name, model, split, eps, "bf16"))


def minimal_attacks():
    """(name, fastadv's attack, Foolbox's) with the same steps."""
    from foolbox import attacks as fb

    kinds = ("linf", "LInf"), ("l2", "L2"), ("l1", "L1"), ("l0", "L0")
    for norm, theirs in kinds:
        yield "fmn", FMN(norm=norm), getattr(fb, f"{theirs}FMNAttack")(steps=100)
    yield "ddn", DDN(), fb.DDNAttack(steps=100)
    yield "deepfool", DeepFool(), fb.LinfDeepFoolAttack()
    yield "deepfool", DeepFool(norm="l2"), fb.L2DeepFoolAttack()
    theirs = fb.L2CarliniWagnerAttack(steps=200, stepsize=0.05)
    yield "cw-l2", CW(200, step_size=0.05), theirs


def minimal_rows(label, model, split):
    """One row per attack that looks for the nearest adversarial point."""
    import foolbox

    x, y = split.images.float() / 255, split.labels
    net = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device="cpu")
    with torch.no_grad():
        right = model(x).argmax(1) == y
    for name, ours, theirs in minimal_attacks():
        row = {"model": label, "attack": name, "norm": ours.norm, "images": len(x)}
        criterion = foolbox.criteria.Misclassification(y)
        found = {"official": theirs.run(net, x, criterion), "ours": ours(model, x, y)}
        for side, x_adv in found.items():
            with torch.no_grad():
                wrong = model(x_adv).argmax(1) != y
            length = torch.where(wrong, distance(x_adv - x, ours.norm), math.inf)
            median = length.where(right, 0.0).median().item()
            row[side] = round(median, 5) if median < math.inf else None
            row[f"{side} found"] = int(wrong.sum())
        yield row


def compared(name, theirs, ours):
    return {
        "attack": name,
        "starts": "same" if name in (*SAME, *L1[:2]) else "own",
        "official": int(theirs.sum()),
        "ours": int(ours.sum()),
        "differ": int((theirs != ours).sum()),
    }


def agrees(row):
    """Whether a row is within what may be apart."""
    if "norm" in row:
        most = 1.03 * (math.inf if row["official"] is None else row["official"])
        near = row["ours"] is not None and row["ours"] <= most
        return near and row["ours found"] >= row["official found"]
    official, bound = (row["official"], row.get("again", row["official"])), 0.003 * row["images"]
    least, most = min(official) - max(bound, 2), max(official) + max(bound, 2)
    return least <= row["ours"] <= most and row.get("pixels", 0) < 0.001


def digits_networks(folder):
    """(label, path of a checkpoint) of networks trained here on the digits."""
    for method in ("natural", "at", "trades"):
        train(Config(**digits_student(method) | {"epochs": 12, "out": str(folder / method)}))
        yield f"digits, {method}", folder / method


def cifar_networks(folder, data_dir):
    """The same on a part of CIFAR-10."""
    npz = folder / "cifar10.npz"
    subset(data_dir, npz)
    for method in ("natural", "at"):
        fields = CIFAR | {
            "method": method,
            "data_dir": str(npz),
            "out": str(folder / f"c-{method}"),
        }
        train(Config(**fields | {"precision_attack": "bf16", "eval_every": 1}))
        yield f"CIFAR-10, {method}", folder / f"c-{method}"


def table():
    """The tables of docs/benchmarks.md: the newest row of each model, attack and norm."""
    lines = (RESULTS / "agreement.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    newest = {(row["model"], row["attack"], row.get("norm")): row for row in rows}
    minimal = [row for row in newest.values() if "norm" in row]
    counted = [row for row in newest.values() if "norm" not in row]
    for row in minimal:
        row |= {side: "infinite" for side in ("official", "ours") if row[side] is None}
    for row in counted:
        if "pixels" in row:
            shares = (f"{100 * row[key]:.2f} %" for key in ("pixels", "pixels_own"))
            row["differ"] = "{} of pixels ({} with our loss and twin)".format(*shares)
        if "again" in row:
            row["official"] = f"{row['official']}, again {row['again']}"
    write(MARKS, COLUMNS, counted)
    write(NEAREST_MARKS, NEAREST_COLUMNS, minimal)


def write(marks, columns, rows):
    """Puts rows as a table between two marks of the page."""
    shown = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    shown += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in rows]
    row = rows[-1]
    where = f"{row['cpu']}, torch {row['torch']}, fastadv {row['commit']}, {row['time'][:10]}."
    replace_between(PAGE, marks, [*shown, "", where])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="folder of CIFAR-10's files: its networks too")
    parser.add_argument("--limit", type=int, default=300, help="the first N test images")
    parser.add_argument("--only", nargs="+", choices=(*ATTACKS, MINIMAL), help="these alone")
    parser.add_argument("--table", action="store_true", help="rewrite the table and stop")
    args = parser.parse_args()
    if args.table:
        return table()
    folder, apart, where = Path(tempfile.mkdtemp(prefix="fastadv-agreement-")), [], machine()
    networks = list(digits_networks(folder))
    if args.data_dir:
        networks += cifar_networks(folder, args.data_dir)
    for label, path in networks:
        model, config = evaluate.from_run(path)
        test = data.load(config.data, config.data_dir).test
        split = test.take(torch.arange(min(args.limit, len(test))))
        counted = [name for name in ATTACKS if name in (args.only or ATTACKS)]
        found = rows(label, model, split, config.eps, counted)
        if MINIMAL in (args.only or [MINIMAL]):
            found = itertools.chain(found, minimal_rows(label, model, split))
        for row in found:
            print(row, flush=True)
            apart += [] if agrees(row) else [f"{label}, {row['attack']}"]
            with open(RESULTS / "agreement.jsonl", "a") as file:
                file.write(json.dumps(row | where) + "\n")
    if apart:
        sys.exit(f"further apart than is allowed: {'; '.join(apart)}")
    return None


if __name__ == "__main__":
    main()
