"""The benchmarks that train, run as commands: minutes long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

METHODS = Path(__file__).parents[1] / "benchmarks/methods.py"


@pytest.mark.slow
def test_every_method_becomes_robust_on_the_digits(tmp_path):
    """One seed; the natural student keeps a few percent under PGD-20."""
    command = [sys.executable, METHODS, "--seeds", "0", "--out", tmp_path]
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (tmp_path / "methods.jsonl").read_text().splitlines()]
    rates = {row["method"]: row for row in rows}
    assert rates["natural"]["pgd20"] < 0.1
    for name, row in rates.items():
        assert row["clean"] > 0.9, name
        if name not in ("natural", "funmatch"):
            assert row["pgd20"] > rates["natural"]["pgd20"] + 0.5, name
