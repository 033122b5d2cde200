"""The tests of the ops that have a Triton kernel, with what they say of it: see the last lines of
tests/ops/test_pgd_step.py, for one."""

import importlib
import sys
from pathlib import Path

OPS = Path(__file__).parents[1] / "ops"
sys.path.insert(0, str(OPS))

# {op: its test module}; a kernel without tests of its own is no op's, but shared.
MODULES = {
    path.stem: importlib.import_module(f"test_{path.stem}")
    for path in sorted((OPS.parents[1] / "kernels").glob("*.py"))
    if (OPS / f"test_{path.stem}.py").exists()
}
