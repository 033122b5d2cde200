"""AutoAttack's standard version, by the official code and by fastadv; `--suite eval` of run.py.

    pip install --no-deps --target build/peers pyautoattack
    PYTHONPATH=build/peers python benchmarks/run.py --suite eval

The network is a ResNet-18 of full width that is trained here for a minute by PGD-AT on the digits,
enlarged to 3 x 32 x 32. Of 32 images it has 27 right and 8 under PGD-20 at 8/255: robust images are
what costs.
The search is in float32 or bfloat16, the verdict in float32; "robust" is how many images are left.
Minutes a call: each provider is timed once.

Not a pytest-benchmark module.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from agreement import official_right, right
from timing import Case

from fastadv import data, evaluate
from fastadv.runs.config import Config
from fastadv.train import train

IMAGES, EPS = 32, 8 / 255
TRAINING = {
    "method": "at",
    "data": "npz",
    "student": "resnet18",
    "eps": EPS,
    "batch_size": 64,
    "lr": 0.05,
    "steps": 3,
    "epochs": 8,
    "milestones": (6,),
    "eval_every": 8,
    "precision_attack": "bf16",
    "precision_outer": "bf16",
}


def enlarged(path):
    """The digits as uint8 [N, 3, 32, 32] in an .npz, low in contrast so that eps matters."""
    digits, arrays = data.load("digits"), {}
    for part in ("train", "test"):
        split = getattr(digits, part)
        images = F.interpolate(split.images.float(), scale_factor=4, mode="bilinear")
        images = (96 + images / 4).round().expand(-1, 3, -1, -1)
        arrays |= {f"{part}_images": images.to(torch.uint8).permute(0, 2, 3, 1).numpy()}
        arrays |= {f"{part}_labels": split.labels.numpy()}
    np.savez(path, **arrays)


def network():
    """(model, the test images) after a short training."""
    folder = Path(tempfile.mkdtemp(prefix="fastadv-bench-evaluate-"))
    enlarged(folder / "digits.npz")
    out = folder / "run"
    train(Config(**TRAINING, data_dir=str(folder / "digits.npz"), out=str(out)))
    model, config = evaluate.from_run(out)
    test = data.load("npz", config.data_dir).test
    return model, test.take(torch.arange(IMAGES))


def cases():
    model, split = network()
    robust = {}

    def provider(name, attack, *options):
        def call():
            robust[name] = int(attack("aa", model, split, EPS, *options).sum())

        return call

    def gate():
        counts = [int(find("apgd-ce", model, split, EPS).sum()) for find in (official_right, right)]
        assert abs(counts[0] - counts[1]) <= 1, counts

    yield Case(
        op="autoattack",
        shape=f"resnet18, {IMAGES} images",
        providers={
            "official": provider("official", official_right),
            "fastadv_fp32": provider("fastadv_fp32", right),
            "fastadv_bf16": provider("fastadv_bf16", right, "bf16"),
        },
        gate=gate,
        images=IMAGES,
        facts=lambda: {name: {"robust": count} for name, count in robust.items()},
        calls=0,
        samples=1,
    )
