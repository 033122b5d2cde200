"""The Triton kernels on the CPU: the tests of the ops, run on Triton's interpreter.

Each runs in a process of its own, since TRITON_INTERPRET is read when triton is imported.
"""

import ast
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


# What runs by default, the interpreter being slow; the whole files are among the slow tests.
SELECTED = {
    "pgd_step": "test_sizes[33-linf] test_sizes[33-l2] test_bits_are_those_of_plain_torch "
    "test_mixed_layouts_do_not_mix_pixels test_nan_and_zero_gradients_do_not_move",
    "apgd_step": "test_sizes[33-linf] test_sizes[33-l2] test_a_box_without_zero[box0-l2] "
    "test_bits_are_those_of_plain_torch test_what_is_kept_and_where_it_goes_on[linf] "
    "test_what_is_kept_and_where_it_goes_on[l2] test_mixed_layouts_do_not_mix_pixels "
    "test_a_sample_with_many_holes_counts_once test_everything_written_counts_as_mutated",
    "softmax_kl": "test_half[10-dtype0] test_nan_stays_in_its_wide_row TestExtremes",
    "cross_entropy": "test_op[0.1-False] test_sizes[16-dtype1] TestExtremes "
    "test_rows_wider_than_the_stash[4097]",
    "margin": "test_sizes[16-dtype1] test_sizes[17-dtype0] test_a_large_row[dtype0] "
    "test_labels_far_out_of_range_read_nothing",
    "random_start": "test_op[True-uniform-linf] test_known_answers test_edges "
    "test_uniform_bits_are_those_of_the_reference test_bits_are_those_of_the_cpu_kernels",
    "feature_distance": "test_op[cosine] test_sizes[17-mse-dtype1] test_shapes[shape0-l2] "
    "test_shapes[shape1-mse] test_every_half_is_read_and_written_as_torch_does[0.0-dtype0] "
    "test_mixed_layouts_do_not_mix_pixels test_nan_and_infinity_stay_in_their_sample "
    "test_zero_vectors_and_zero_distance_have_gradient_zero",
    "augment": "test_op[shape1-True] test_shapes[shape0-False] test_shapes[shape5-False] "
    "test_identity_is_torchs_division test_offsets_outside_read_zeros[True-12]",
    "fold_bn": "test_values[layout0-dtype1] test_values[layout1-dtype0] test_tables_are_made_once "
    "test_a_weight_that_no_three_strides_describe test_follows_new_values_and_new_tensors",
    "dlr": "test_sizes[16-dtype1] test_sizes[17-dtype0] test_a_large_row[dtype0] "
    "test_leaders_a_block_apart_in_a_wide_row test_labels_far_out_of_range_read_nothing",
    "softmax_entropy": "test_sizes[16-0.0-dtype1] test_sizes[17-0.1-dtype0] TestExtremes "
    "test_rows_wider_than_the_stash[dtype1-1e-05-4097] test_small_entropies_are_accurate",
    "mart_bce": "test_sizes[16-dtype1] test_sizes[17-dtype0] TestExtremes "
    "test_rows_wider_than_the_stash[dtype0-4097]",
}
INTERPRETED = {"TRITON_INTERPRET": "1", "FASTADV_BACKEND": "triton", "OMP_NUM_THREADS": "1"}


CHOSEN = [f"{TESTS}/ops/test_{op}.py::{name}" for op in SELECTED for name in SELECTED[op].split()]


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
@pytest.mark.parametrize("op", SELECTED)
def test_interpreted_in_full(op, tmp_path):
    done = run(["-m", "pytest", TESTS / f"ops/test_{op}.py"], tmp_path, **INTERPRETED)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_an_interpreted_run_is_on_the_kernels(tmp_path):
    code = "from fastadv.ops import _library; print({n: op.cpu for n, op in _library.ops.items()})"
    done = run(["-c", code], tmp_path, **INTERPRETED)
    backends = ast.literal_eval(done.stdout)
    others = {name for name, backend in backends.items() if backend != "triton (interpreted)"}
    assert others == {"batch_norm", "batch_norm_backward"}  # which GPUs leave to torch
    assert set(SELECTED) <= {name.rstrip("_") for name in backends}


def test_triton_without_a_device_is_refused(tmp_path):
    alone = {"TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": "-1"}
    done = run(["-c", "import fastadv"], tmp_path, FASTADV_BACKEND="triton", **alone)
    assert done.returncode != 0
    assert "RuntimeError: FASTADV_BACKEND is triton, but no CUDA device" in done.stderr


def test_kernels_import_without_a_device(tmp_path):
    alone = {"TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": "-1", "FASTADV_BACKEND": ""}
    done = run(["-c", f"from fastadv.kernels import {', '.join(SELECTED)}"], tmp_path, **alone)
    assert done.returncode == 0, done.stderr
