"""What `--suite gpu` of run.py does before it times anything. Imports nothing of fastadv, which it
installs."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
INSTALL = "-q", "--no-build-isolation", "--no-deps", "--disable-pip-version-check", "-e", "."
# pip takes a module that was not built for none that is wanted.
BUILT = """
import shutil, sys, torch
from fastadv.ops import _native
wanted = torch.cuda.is_available() and shutil.which("nvcc")
sys.exit(_native.missing or (wanted and _native.cuda_missing()) or 0)
"""


def prepare():
    """Installs the checkout, compiled, and runs the tests that are for a GPU or, without one, those
    of what is for GPUs. Exits where something fails, and where there is no GPU to go on with."""
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
    print(*command, flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")
