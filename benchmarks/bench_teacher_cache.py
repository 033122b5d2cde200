"""An RSLAD step with a huge teacher asked, cached or left out; `--suite cache` of run.py. `--suite
train` has it with a WRN-34-10.

    python benchmarks/bench_teacher_cache.py      # draws docs/images/teacher-cache-hits.png

Not a pytest-benchmark module: a step takes seconds.
"""

from bench_train_step import case, image_loader
from tables import ROOT
from torch import nn

from fastadv import freeze
from fastadv.teacher_cache import TeacherCache


def cases():
    for student in ("resnet18", "mobilenet_v2"):
        yield case("rslad", student, "wrn70_16", 16)


def hit_shares(epochs=300):
    """The share of rows that a cache had, for each epoch: counted, and 1 - (161/162)^epoch."""
    loader = image_loader(500)
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
    figure.savefig(ROOT / "docs" / "images" / "teacher-cache-hits.png", dpi=120)
    worst = max(abs(a - b) for a, b in zip(counted, expected, strict=True))
    print(f"largest difference from the closed form: {worst:.3f}")


if __name__ == "__main__":
    main()
