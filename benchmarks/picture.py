"""README's picture: how fast, and how accurate and robust, from the rows in benchmarks/results.

python benchmarks/picture.py      # writes docs/images/speed-and-robustness.svg
"""

import json
import statistics

from methods import ATTACKS, newest
from tables import ROOT, STEP
from tables import newest as newest_of_suite
from timing import RESULTS

PICTURE = ROOT / "docs" / "images" / "speed-and-robustness.svg"
# (label, suite, op, shape, torch under bfloat16 autocast, fastadv in bfloat16)
BARS = (
    ("PGD-10\nResNet-18", "attack", "PGD-10", "resnet18, 64x3x32x32", "published_bf16"),
    ("PGD-10\nMobileNetV2", "attack", "PGD-10", "mobilenet_v2, 64x3x32x32", "published_bf16"),
    ("RSLAD step\n(cached)", "train", "RSLAD step", STEP, "published, bf16 autocast"),
    ("AdaAD\nstep", "train", "AdaAD step", STEP, "published, bf16 autocast"),
)
DRAWN = "Intel(R) Xeon(R) Processor", "amx"  # the CPU and instruction set of the picture
OURS = ("fastadv_bf16", "fastadv bf16, warm cache", "fastadv bf16")
LABELLED = {"at", "trades", "mart", "rslad", "bmtard", "iad2", "advfunmatch", "vfd+trades"}
LABELLED |= {"saad", "ikl"}


def speeds():
    """[(label, torch's speed-up, fastadv's)] over the published code in float32."""
    found = []
    for label, suite, op, shape, autocast in BARS:
        measured = newest_of_suite(suite)[DRAWN]
        rows = [r for r in measured if (r["op"], r["shape"]) == (op, shape)]
        speedup = {row["provider"]: row["speedup"] for row in rows}
        ours = next(speedup[name] for name in OURS if name in speedup)
        found.append((label, speedup[autocast], ours))
    return found


def accuracies():
    """{method: [(mean, standard deviation) of clean accuracy, of PGD-20]} over seeds in percent, of
    the methods that become robust."""
    values = {}
    for row in newest(RESULTS / "methods.jsonl"):
        for name in ATTACKS:
            values.setdefault(row["method"], {}).setdefault(name, []).append(100 * row[name])
    found = {
        method: [(round(statistics.mean(v), 2), round(statistics.stdev(v), 2)) for v in by.values()]
        for method, by in values.items()
    }
    return {method: moments for method, moments in found.items() if moments[1][0] > 10}


def data():
    """What is drawn, as text: the picture carries it, so that a stale one can be told."""
    return json.dumps({"speeds": speeds(), "accuracies": accuracies()})


def draw(path):
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "fastadv"  # so that the same data are the same file
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels, torch_best, ours = zip(*speeds(), strict=True)
    series = {
        "as published, float32": ("0.75", [1] * len(labels)),
        "published code, bfloat16 autocast": ("C0", torch_best),
        "fastadv, bfloat16": ("C3", ours),
    }
    for i, (name, (color, values)) in enumerate(series.items()):
        places = [x + 0.27 * (i - 1) for x in range(len(labels))]
        bars = left.bar(places, values, 0.25, color=color, label=name)
        left.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=8)
    left.set(title="Speed-up on two CPU cores with AMX", ylabel="times as fast", ylim=(0, 14.5))
    left.set_xticks(range(len(labels)), labels)
    left.legend(loc="upper left", frameon=False, fontsize=8)
    for method, ((clean, dx), (robust, dy)) in accuracies().items():
        color = "C3" if method in LABELLED else "0.6"
        right.errorbar(clean, robust, dy, dx, color=color, linewidth=0.3)
        right.plot(clean, robust, "o", color=color)
        if method in LABELLED:
            offset = {"textcoords": "offset points", "xytext": (5, 4), "fontsize": 8}
            right.annotate(method, (clean, robust), **offset)
    right.set(
        title="Methods on the 8x8 digits, three seeds",
        xlabel="clean accuracy, %",
        ylabel="accuracy under PGD-20, %",
        xlim=(89.9, 100.4),
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, metadata={"Date": None, "Description": data()})


if __name__ == "__main__":
    draw(PICTURE)
    print(PICTURE)
