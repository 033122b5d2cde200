"""The tables of docs/benchmarks.md and of README, from the rows in benchmarks/results.

`python benchmarks/run.py --table` writes them anew.
"""

import json
from pathlib import Path

from timing import RESULTS

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
SUITES = ("attack", "networks", "train", "cache", "eval", "data", "parallel", "gpu", "ops")
COLUMNS = (
    "GB/s",
    "of copy",
    "TFLOP/s",
    "images/s",
    "x floor",
    "peak MB",
    "equal signs",
    "cosine",
    "robust",
)
COLUMNS += ("data", "teacher", "attack", "outer")

# The code as published, then torch's other forms of it.
RIVALS = {
    "attack": ("published", "published_bf16", "recipe", "compiled", "max-autotune"),
    "train": ("published, fp32 eager", "published, bf16 autocast", "published, fp32 compiled"),
    "eval": ("official",),
    "ops": ("published", "eager", "compile", "compile in place"),
}
STEP, FAST = "resnet18, wrn34_10, 64x3x32x32", ("fastadv_fp32", "fastadv_bf16")
# (what it is, suite, op, shape, fastadv in float32, in bfloat16). What loses stays in.
HEADLINES = (
    ("PGD-10, ResNet-18, batch 64", "attack", "PGD-10", "resnet18, 64x3x32x32", *FAST),
    ("PGD-10, MobileNetV2, batch 64", "attack", "PGD-10", "mobilenet_v2, 64x3x32x32", *FAST),
    ("PGD-10, WRN-28-10, batch 64", "attack", "PGD-10", "wrn28_10, 64x3x32x32", *FAST),
    ("RSLAD step", "train", "RSLAD step", STEP, None, "fastadv bf16, cold cache"),
    ("RSLAD step, teacher cached", "train", "RSLAD step", STEP, None, "fastadv bf16, warm cache"),
    ("AdaAD step", "train", "AdaAD step", STEP, None, "fastadv bf16"),
    ("AutoAttack, ResNet-18, 32 images", "eval", "autoattack", "resnet18, 32 images", *FAST),
    ("`ops.pgd_step_`, 128x3x32x32", "ops", "pgd_step", "128x3x32x32", "fastadv in place", None),
    ("`losses.kl`, 1024x100", "ops", "softmax_kl", "1024x100", "fastadv", None),
    ("`losses.ikl`, 128x100", "ops", "ikl", "128x100", "fastadv", None),
    ("`losses.entropy`, 128x100", "ops", "softmax_entropy", "128x100 exact", "fastadv", None),
    ("`losses.feature`, 2x200000", "ops", "feature_distance", "2x200000 mse", "fastadv", None),
    ("`losses.cross_entropy`, 128x10", "ops", "cross_entropy", "128x10", "fastadv", None),
)


def newest(suite):
    """{kind of machine: the rows of each op and shape of a suite, those of its newest run there}: a
    run replaces only the rows of its own kind of machine."""
    rows = [json.loads(line) for line in (RESULTS / f"{suite}.jsonl").read_text().splitlines()]
    last = {(*kind(row), row["op"], row["shape"]): row["time"] for row in rows}
    found = {}
    for row in sorted(rows, key=lambda row: (kind(row)[0], row["op"])):
        if row["time"] == last[(*kind(row), row["op"], row["shape"])]:
            found.setdefault(kind(row), []).append(row)
    return found


def kind(row):
    """(model of CPU, instruction set) that a row was measured on; for the suite of a GPU (its
    model, the part of the suite), as two parts may measure the same op."""
    return (row["gpu"], row["part"]) if "part" in row else (row["cpu"], row["isa"])


def write():
    """Writes every suite's table to the page, and README's headlines."""
    for suite in SUITES:
        lines = []
        for rows in newest(suite).values():
            last = rows[-1]
            what = machine(last), kind(last)[1], f"fastadv {last['commit']}", last["time"][:10]
            lines += [", ".join(what) + ":", "", *markdown(rows), ""]
        replace_between(PAGE, marks(suite), lines[:-1])
    replace_between(README, marks("headline"), headlines())


def marks(name):
    return f"<!-- {name} table: benchmarks/run.py --table -->", f"<!-- end of {name} table -->"


def machine(row):
    return f"{kind(row)[0]}, {row['threads']} threads, torch {row['torch']}"


def markdown(rows):
    """The rows as a table's lines: times in ms where they reach a second, and of the columns that
    not every suite has those with a value."""
    unit, size = ("ms", 1e3) if max(row["us"] for row in rows) > 1e6 else ("us", 1)
    columns = [column for column in COLUMNS if any(row.get(column) is not None for row in rows)]
    head = ["op", "shape", "provider", f"median {unit}", "p20-p80", "speed-up", *columns]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        median, low, high = (f"{row[key] / size:.1f}" for key in ("us", "p20", "p80"))
        cells = [row["op"], row["shape"], row["provider"], median, f"{low}-{high}"]
        cells.append(f"{row['speedup']:.2f}x")
        values = (row.get(column) for column in columns)
        cells += ["" if value is None else str(value) for value in values]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def headlines():
    """README's table: of each of HEADLINES the time as published, and the speed-ups over it, on
    each model of CPU where it was measured."""
    suites = {suite: newest(suite) for suite in RIVALS}
    head = "| | as published | torch's best | fastadv fp32 | fastadv bf16 | measured |"
    lines, where = [head, "|---" * 6 + "|"], set()
    for label, suite, op, shape, *ours in HEADLINES:
        for measured in suites[suite].values():
            rows = {r["provider"]: r for r in measured if (r["op"], r["shape"]) == (op, shape)}
            if not rows:
                continue
            published, *others = (rows[name] for name in RIVALS[suite] if name in rows)
            best = max((row["speedup"] for row in others), default=None)
            ratios = [best, *(rows[name]["speedup"] if name else None for name in ours)]
            cells = [label, duration(published["us"])]
            cells += ["-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
            short = f"{published['cpu'].split()[0].removesuffix('(R)')} {published['isa']}"
            cells.append(f"{short}, {published['time'][:10]}")
            lines.append(f"| {' | '.join(cells)} |")
            where.add(f"{short}: {machine(published)}")
    return [*lines, "", f"{'; '.join(sorted(where))}."]


def duration(us):
    """A time in the unit that fits."""
    size, unit = next(pair for pair in ((1e6, "s"), (1e3, "ms"), (1, "us")) if us >= pair[0])
    value = us / size
    return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"


def replace_between(path, marks, lines):
    """Rewrites what stands between two marks of a text file."""
    before, rest = path.read_text().split(marks[0])
    after = rest.split(marks[1])[1]
    path.write_text("\n".join([before + marks[0], "", *lines, "", marks[1] + after]))
