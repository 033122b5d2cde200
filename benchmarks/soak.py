"""A long training run on a large folder of pictures, and what memory it takes over time.

    python benchmarks/soak.py [--pictures 200000] [--epochs 2] [--folder DIR]

Makes synthetic pictures of 32 x 32 pixels in ten classes, packs them by `fastadv.data pack` and
trains a small student on them by RSLAD, with the teacher cache on and checkpoints every minute.
The memory of the training process is looked at each second. Appends a row to results/soak.jsonl
and draws docs/images/soak.png.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tables import ROOT
from timing import RESULTS, machine

from fastadv import models
from fastadv.runs import log

SIZE, CLASSES, BATCH = 32, 10, 128
FIGURE = ROOT / "docs" / "images" / "soak.png"


def write_pictures(root, count):
    """`count` PNG files in train and a tenth of that in val, each a class's colour with noise."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", count // 10)):
        for label in range(CLASSES):
            (root / split / f"class{label}").mkdir(parents=True)
        for i in range(number):
            label = i % CLASSES
            image = rng.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
            image[..., label % 3] += np.uint8(10 * label)
            path = root / split / f"class{label}" / f"{i}.png"
            Image.fromarray(image).save(path, compress_level=1)


def memory(pid):
    """{kind: MB} of a process now: what is its own, and what is mapped from files."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            fields[name] = int(rest.split()[0]) / 1024
    return fields


def watched(*arguments):
    """Runs a module of fastadv: (seconds, [(second, memory)] of each second)."""
    process = subprocess.Popen([sys.executable, "-m", *map(str, arguments)])
    start, samples = time.perf_counter(), []
    while process.poll() is None:
        second = time.perf_counter() - start
        if fields := memory(process.pid):  # none of one that has just ended
            samples.append((second, fields))
        time.sleep(1)
    if process.returncode:
        sys.exit(f"{arguments[0]} failed")
    return time.perf_counter() - start, samples


def soak(root, pictures, epochs):
    """The row of one soak, and its samples of memory."""
    write_pictures(root / "pictures", pictures)
    options = "pictures", root / "pictures", "--image-size", SIZE
    packing, _ = watched("fastadv.data", "pack", *options[1:])
    teacher = root / "teacher.pt"
    torch.manual_seed(0)
    torch.save(models.get("digits_net", num_classes=CLASSES).state_dict(), teacher)
    flags = ("--method", "rslad", "--data", "folder", "--data-dir", *options[1:])
    flags += ("--teacher", "digits_net", "--teacher-checkpoint", teacher)
    flags += ("--student", "digits_net", "--student-width", 8, "--steps", 1)
    flags += ("--epochs", epochs, "--milestones", "", "--batch-size", BATCH, "--save-every", 1)
    flags += ("--views-per-image", 2, "--teacher-cache", root / "cache", "--out", root / "run")
    training, samples = watched("fastadv.train", *flags)
    packed = root / "pictures" / f"packed-{SIZE}.fastadv"
    half = [fields["RssAnon"] for second, fields in samples if second > training / 2]
    start = next(fields["RssAnon"] for second, fields in samples if second > training / 10)
    row = {
        "pictures": pictures,
        "steps": epochs * -(-pictures // BATCH),
        "packed MB": round(packed.stat().st_size / 1e6),
        "packed pictures/s": round(1.1 * pictures / packing),
        "images/s": [line["images_per_s"] for line in log.read(root / "run" / "metrics.jsonl")],
        "minutes": round(training / 60, 1),
        "own MB after a tenth": round(start),
        "own MB in the second half": [round(min(half)), round(max(half))],
        "mapped MB at most": round(max(fields["RssFile"] for _, fields in samples)),
    }
    return row, samples


def draw(samples, row):
    figure = log.new_figure((7, 3.5))
    axes = figure.subplots()
    seconds = [second / 60 for second, _ in samples]
    for name, label in (("RssAnon", "the process's own"), ("RssFile", "mapped from files")):
        axes.plot(seconds, [fields[name] for _, fields in samples], label=label)
    title = f"{row['steps']} steps of RSLAD on {row['pictures']} packed pictures"
    axes.set(xlabel="minutes", ylabel="memory, MB", ylim=(0, None), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    log.save_figure(figure, FIGURE)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", help="where to work; a temporary folder if not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        row, samples = soak(Path(folder), args.pictures, args.epochs)
    print(json.dumps(row, indent=2))
    with open(RESULTS / "soak.jsonl", "a") as file:
        file.write(json.dumps(row | machine()) + "\n")
    draw(samples, row)


if __name__ == "__main__":
    main()
