"""Installs and tests the checkout, as `--suite gpu` of run.py does before it times anything. This
file imports nothing of fastadv, as it installs fastadv."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
INSTALL = "-q", "--no-build-isolation", "--no-deps", "--disable-pip-version-check", "-e", "."
# Fails if a compiled part is missing: the extension is optional, so that pip does not report that
# it could not be built.
BUILT = """
import shutil, sys, torch
from fastadv.ops import _native
wanted = torch.cuda.is_available() and shutil.which("nvcc")
sys.exit(_native.missing or (wanted and _native.cuda_missing()) or 0)
"""


def prepare():
    """Installs the checkout, compiled, and runs the tests that need a GPU; without one, the tests
    of GPU code that run on a CPU. Exits if something fails, and if there is no GPU to time."""
    execute(sys.executable, "-m", "pip", "install", *INSTALL)
    execute(sys.executable, "-c", BUILT)
    pytest = sys.executable, "-m", "pytest", "-m"
    if not torch.cuda.is_available():
        tests = "tests/kernels", "tests/engine/test_folded.py", "tests/attacks/test_graphs.py"
        execute(*pytest, "not gpu and not slow", *tests)
        sys.exit("no GPU is present: what needs none has run, nothing was timed")
    tests = "tests/kernels", "tests/ops/test_fold_bn.py", "tests/attacks/test_graphs.py"
    execute(*pytest, "gpu", *tests, "tests/data/test_loader_views.py")
    if sanitizer := shutil.which("compute-sanitizer"):
        tests = "gpu", "tests/kernels/test_cuda_device.py"
        options = "--error-exitcode", "1", "--report-api-errors", "no"
        execute(sanitizer, *options, *pytest, *tests)


def execute(*command):
    """Runs a command in the checkout, and exits if it fails."""
    print(*command, flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")
