"""What `--suite gpu` of run.py does before it times anything. Imports nothing of fastadv, which it
installs."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
INSTALL = "-q", "--no-build-isolation", "--no-deps", "--disable-pip-version-check", "-e", "."


def prepare():
    """Installs the checkout, compiled, and runs the tests that are for a GPU or, without one, those
    of what is for GPUs. Exits where something fails, and where there is no GPU to go on with."""
    execute(sys.executable, "-m", "pip", "install", *INSTALL)
    pytest = sys.executable, "-m", "pytest", "-m"
    if not torch.cuda.is_available():
        tests = "tests/kernels", "tests/engine/test_folded.py", "tests/test_graphs.py"
        execute(*pytest, "not gpu and not slow", *tests)
        sys.exit("no GPU is present: what needs none has run, nothing was timed")
    execute(*pytest, "gpu")
    if sanitizer := shutil.which("compute-sanitizer"):
        tests = "gpu", "tests/kernels/test_cuda_device.py"
        execute(sanitizer, "--error-exitcode", "1", *pytest, *tests)


def execute(*command):
    print(*command, flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")
