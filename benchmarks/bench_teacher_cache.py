"""An RSLAD step with the teacher asked, cached or left out; `--suite cache` of run.py.

    python benchmarks/bench_teacher_cache.py      # draws results/teacher_cache_hits.png

Not a pytest-benchmark module: a step takes seconds.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import RESULTS, Case
from torch import nn

from fastadv import data, freeze, methods, models
from fastadv.attacks import PGD
from fastadv.data.dataset import image_set
from fastadv.frozen import InPrecision
from fastadv.teacher_cache import TeacherCache

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10


def images(count):
    """A Loader over random colour images of 32x32 with all 162 views."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=random, dtype=torch.uint8)
    split = image_set(pixels.numpy(), (torch.arange(count) % 10).numpy())
    return data.Loader(split, count, padding=4, flips=2, shuffle=True, channels_last=True)


def published_step(student, teacher, optimizer, x):
    """RSLAD's loop as its authors wrote it: float32, eager, the teacher asked in every step."""
    with torch.no_grad():
        soft = teacher(x).softmax(1)
    student.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        loss = F.kl_div(student(x_adv).log_softmax(1), soft, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + STEP_SIZE * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    student.train()
    adv = F.kl_div(student(x_adv).log_softmax(1), soft, reduction="batchmean")
    clean = F.kl_div(student(x).log_softmax(1), soft, reduction="batchmean")
    optimizer.zero_grad()
    ((5 / 6 * adv + 1 / 6 * clean) / 10).backward()
    optimizer.step()


def step(method, nets, optimizer, batch):
    batch.x_adv = method.perturb(nets, batch, {})
    loss, _ = method.outer(nets, batch, {})
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def case(student_name, teacher_name, batch_size):
    torch.manual_seed(0)
    loader = images(batch_size)
    fields = next(loader.epoch(0))
    plain = models.get(student_name)
    student = models.get(student_name).to(memory_format=torch.channels_last)
    teacher = models.get(teacher_name).eval().requires_grad_(False)
    frozen = freeze(teacher.to(memory_format=torch.channels_last), torch.bfloat16)
    low = torch.bfloat16
    nets = methods.Nets(InPrecision(student, low), frozen, student_twin=freeze(student, low))
    method = methods.get("rslad", attack=PGD(EPS, STEP_SIZE, STEPS, "gaussian"))
    optimizers = [torch.optim.SGD(net.parameters(), 1e-3, 0.9) for net in (plain, student)]
    cache = TeacherCache(frozen, loader, ("logits",), Path(tempfile.mkdtemp()))
    known = cache.lookup(fields.index, fields.view, fields.x)["logits"]

    def engine(lookup):
        batch = methods.Batch(*fields)
        if lookup is not None:
            batch.memo["teacher", "x", "logits"] = lookup()
        step(method, nets, optimizers[1], batch)

    def found():
        return cache.lookup(fields.index, fields.view, fields.x)["logits"]

    def gate():
        with torch.no_grad():
            wanted = frozen(fields.x)
        torch.testing.assert_close(found(), wanted, rtol=2**-6, atol=2**-6)  # bf16, other blocks
        assert torch.equal(found(), known)
        assert cache.misses == batch_size

    return Case(
        "RSLAD step",
        f"{student_name}, {teacher_name}, {batch_size}x3x32x32",
        {
            "published, fp32 eager": lambda: published_step(
                plain, teacher, optimizers[0], fields.x
            ),
            "fastadv bf16, no cache": lambda: engine(None),
            "fastadv bf16, warm cache": lambda: engine(found),
            "fastadv bf16, no teacher": lambda: engine(lambda: known),
            "lookup alone": found,
        },
        gate,
    )


def cases():
    for student in ("resnet18", "mobilenet_v2"):
        yield case(student, "wrn34_10", 32)
        yield case(student, "wrn70_16", 16)


def hit_shares(epochs=300):
    """The share of rows that a cache had, for each epoch: counted, and 1 - (161/162)^epoch."""
    loader = images(500)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    cache, counted = TeacherCache(freeze(teacher), loader), []
    for epoch in range(epochs):
        for x, _, index, view in loader.epoch(epoch):
            counted.append(float(cache.filled(index, view).float().mean()))
            cache.lookup(index, view, x)
    return counted, [1 - (161 / 162) ** epoch for epoch in range(epochs)]


def main():
    from matplotlib.figure import Figure

    counted, expected = hit_shares()
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(counted, ".", markersize=3, label="counted, 500 images")
    axes.plot(expected, label="1 - (161/162)^epoch")
    axes.axhline(1, color="C2", linestyle="--", label="every later run")
    axes.set(xlabel="epoch of the first run", ylabel="share of hits", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "teacher_cache_hits.png", dpi=120)
    worst = max(abs(a - b) for a, b in zip(counted, expected, strict=True))
    print(f"largest difference from the closed form: {worst:.3f}")


if __name__ == "__main__":
    main()
