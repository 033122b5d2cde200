"""The Triton kernels on the CPU: the tests of the ops, run on Triton's interpreter.

Each runs in a process of its own, since TRITON_INTERPRET is read when triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parents[1]


def run(arguments, cwd, **env):
    """The finished process; an empty value takes the variable away."""
    env = {name: value for name, value in (os.environ | env).items() if value}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("op", ["pgd_step", "softmax_kl"])
def test_interpreted(op, tmp_path):
    arguments = ["-m", "pytest", TESTS / f"ops/test_{op}.py"]
    env = {"TRITON_INTERPRET": "1", "FASTADV_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    done = run(arguments, tmp_path, **env)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_an_interpreted_run_is_on_the_kernels(tmp_path):
    code = "from fastadv import _library; print({op.cpu for op in _library.ops.values()})"
    done = run(["-c", code], tmp_path, TRITON_INTERPRET="1", FASTADV_BACKEND="triton")
    assert "triton (interpreted)" in done.stdout, done.stderr


def test_triton_without_a_device_is_refused(tmp_path):
    alone = {"TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": "-1"}
    done = run(["-c", "import fastadv"], tmp_path, FASTADV_BACKEND="triton", **alone)
    assert done.returncode != 0
    assert "RuntimeError: FASTADV_BACKEND is triton, but no CUDA device" in done.stderr


def test_kernels_import_without_a_device(tmp_path):
    alone = {"TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": "-1", "FASTADV_BACKEND": ""}
    done = run(["-c", "from fastadv.kernels import pgd_step, softmax_kl"], tmp_path, **alone)
    assert done.returncode == 0, done.stderr
