"""Whether fastadv's Square finds as many examples as the official one: both over many seeds.

    pip install --no-deps --target build/peers pyautoattack
    PYTHONPATH=build/peers python benchmarks/square_spread.py     # 20 seeds each, half an hour
    python benchmarks/square_spread.py --table                    # its sentence anew

Square is a random search, so that one count of each side (see agreement.py) tells little. Here each
side attacks the first 300 test images of a TRADES network on the digits, linf eps 0.15, with 5,000
queries, once per seed; Welch's t-test asks whether the mean counts of images that stay right are
equal. A row per seed goes to benchmarks/results/square_spread.jsonl.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from agreement import digits_networks, official_attack
from scipy.stats import ttest_ind
from tables import PAGE, replace_between
from timing import RESULTS, machine

from fastadv import data, evaluate

MARKS = "<!-- square spread: benchmarks/square_spread.py -->", "<!-- end of square spread -->"
PATH = RESULTS / "square_spread.jsonl"
IMAGES = 300


def counts(model, split, eps, seed):
    """How many images stay right under each side's search by a seed."""
    attack = official_attack("square", model, eps, False, seed)
    x, y = split.images.float() / 255, split.labels
    with torch.no_grad():
        right = model(x).argmax(1) == y
        x_adv = attack(x[right], y[right])
        official = int((model(x_adv).argmax(1) == y[right]).sum())
    ours = evaluate.correct(model, split, "square", eps=eps, seed=seed)
    return {"seed": seed, "official": official, "ours": int(ours.sum())}


def sentence():
    """What the newest run's rows say."""
    rows = [json.loads(line) for line in PATH.read_text().splitlines()]
    rows = [row for row in rows if row["time"] == rows[-1]["time"]]
    sides = [[row[side] for row in rows] for side in ("official", "ours")]
    official, ours = (
        f"{statistics.mean(side):.1f} ± {statistics.stdev(side):.1f}" for side in sides
    )
    p = ttest_ind(*sides, equal_var=False).pvalue
    last = rows[-1]
    return [
        f"Square on the TRADES network of the digits, {len(rows)} seeds a side: of {IMAGES} images",
        f"{official} stay right under the official search and {ours} under fastadv's (mean ±",
        f"standard deviation; Welch's test of equal means: p = {p:.2g}).",
        f"{last['cpu']}, torch {last['torch']}, fastadv {last['commit']}, {last['time'][:10]}.",
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--table", action="store_true", help="rewrite the sentence and stop")
    args = parser.parse_args()
    if not args.table:
        networks = dict(digits_networks(Path(tempfile.mkdtemp(prefix="fastadv-square-"))))
        model, config = evaluate.from_run(networks["digits, trades"])
        split = data.load("digits").test.take(torch.arange(IMAGES))
        where = machine()
        for seed in range(args.seeds):
            row = counts(model, split, config.eps, seed)
            print(row, flush=True)
            with open(PATH, "a") as file:
                file.write(json.dumps(row | where) + "\n")
    replace_between(PAGE, MARKS, sentence())


if __name__ == "__main__":
    main()
