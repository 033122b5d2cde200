"""VFD+AT with other choices of layer, distance, normalisation and weights, on validation images.

    python benchmarks/vfd.py                       # all, three seeds
    python benchmarks/vfd.py --only cosine --seeds 0 --out DIR     # rows go to DIR

The paper's abstract leaves these choices open (see `fastadv.methods.VFD`). Each row changes one of
them from the default, and nothing else; networks, teachers and settings are those of
benchmarks/methods.py. Test images play no part, so that the table of methods stays a test of what
is chosen here. Rows are appended to benchmarks/results/vfd.jsonl.
"""

import json
import statistics

from methods import arguments, cells, measure, teachers
from timing import machine

METHOD = "vfd+at"
CHOICES = {
    "default": {},
    "without": {"lambda_adv": 0.0, "lambda_clean": 0.0},
    "last maps": {"layers": ("conv4",)},
    "three layers": {"layers": ("conv2", "conv4", "penultimate")},
    "l2": {"distance": "l2"},
    "cosine": {"distance": "cosine"},
    "normalised": {"normalise": True},
    "weights 0.1": {"lambda_adv": 0.1, "lambda_clean": 0.1},
    "weights 10": {"lambda_adv": 10.0, "lambda_clean": 10.0},
    "x_adv alone": {"lambda_clean": 0.0},
    "x alone": {"lambda_adv": 0.0},
}


def table(rows):
    """Markdown: means over seeds, in percent, with their standard deviation, and the mean
    difference from the default of the same seed, with its standard error."""
    lines = ["| choice | clean | PGD-20 | PGD-20 minus default |", "|---|---|---|---|"]
    robust = {(row["choice"], row["seed"]): 100 * row["pgd20"] for row in rows}
    for choice in dict.fromkeys(row["choice"] for row in rows):
        mine = [row for row in rows if row["choice"] == choice]
        gains = [
            value - robust["default", seed]
            for (name, seed), value in robust.items()
            if name == choice != "default" and ("default", seed) in robust
        ]
        gain = f"{statistics.mean(gains):+.1f}" if gains else "-"
        if len(gains) > 1:
            gain += f" ± {statistics.stdev(gains) / len(gains) ** 0.5:.1f}"
        lines.append(f"| {' | '.join([choice, *cells(mine), gain])} |")
    return lines


def main():
    args = arguments(__doc__, "vfd", CHOICES)
    checkpoints, where, rows = teachers(args.folder), machine(), []
    for seed in args.seeds:
        for choice in args.only:
            place = args.folder / choice.replace(" ", "-")
            rates = measure(METHOD, seed, place, checkpoints, "val", **CHOICES[choice])
            rows.append({"choice": choice, "seed": seed, **rates})
            with open(args.results, "a") as file:
                file.write(json.dumps(rows[-1] | where) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
