"""The Triton kernels on the CPU: the tests of the ops, run on Triton's interpreter.

Each runs in a process of its own, since TRITON_INTERPRET is read when triton is imported.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_tests import MODULES

pytest.importorskip("triton")
TESTS = Path(__file__).parents[1]


def run(arguments, cwd, **env):
    """The finished process; an empty value takes the variable away."""
    env = {name: value for name, value in (os.environ | env).items() if value}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


INTERPRETED = {"TRITON_INTERPRET": "1", "FASTADV_BACKEND": "triton", "OMP_NUM_THREADS": "1"}


# What runs by default, the interpreter being slow; the whole files are among the slow tests.
CHOSEN = [f"{m.__file__}::{name}" for m in MODULES.values() for name in m.INTERPRETED]


def test_interpreted(tmp_path):
    done = run(["-m", "pytest", *CHOSEN], tmp_path, **INTERPRETED)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_on_a_gpu(backend, tmp_path):
    """`testing.check_values` takes a GPU along; with "triton" the CPU runs plain torch, for which
    one test is too strict."""
    tests = *CHOSEN, "-k", "not small_entropies"
    done = run(["-m", "pytest", *tests], tmp_path, FASTADV_BACKEND=backend, TRITON_INTERPRET="")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("op", MODULES)
def test_interpreted_in_full(op, tmp_path):
    done = run(
        ["-m", "pytest", "-m", "not gpu", TESTS / f"ops/test_{op}.py"], tmp_path, **INTERPRETED
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_an_interpreted_run_is_on_the_kernels(tmp_path):
    code = "from fastadv.ops import _library; print({n: op.cpu for n, op in _library.ops.items()})"
    done = run(["-c", code], tmp_path, **INTERPRETED)
    backends = ast.literal_eval(done.stdout)
    others = {name for name, backend in backends.items() if backend != "triton (interpreted)"}
    assert others == {"batch_norm", "batch_norm_backward"}  # which GPUs leave to torch
    kernels = {name.rstrip("_") for name in backends} - others
    assert kernels == {*MODULES, "bias_relu_backward"}  # which bias_relu's file has too


def test_triton_without_a_device_is_refused(tmp_path):
    alone = {"TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": "-1"}
    done = run(["-c", "import fastadv"], tmp_path, FASTADV_BACKEND="triton", **alone)
    assert done.returncode != 0
    assert "RuntimeError: FASTADV_BACKEND is triton, but no CUDA device" in done.stderr


def test_kernels_import_without_a_device(tmp_path):
    alone = {"TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": "-1", "FASTADV_BACKEND": ""}
    done = run(["-c", f"from fastadv.kernels import {', '.join(MODULES)}"], tmp_path, **alone)
    assert done.returncode == 0, done.stderr
