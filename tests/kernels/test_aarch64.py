"""The kernels for CPUs build for aarch64, and give there what they give on x86.

CMake builds them for aarch64 and, without what only x86 knows, for this machine. aarch64.cpp calls
them all, once natively and once under qemu. The baseline is held to the references by the tests of
the ops.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

TOOLS = ["cmake", "g++", "aarch64-linux-gnu-g++", "qemu-aarch64"]
MISSING = [tool for tool in TOOLS if not shutil.which(tool)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compares with x86"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
ROOT = Path(__file__).parents[2]
FLAGS = "-std=gnu++17 -O1 -fopenmp -static -Wall -Wextra -Werror"
POW = "random_start/uniform/l2"  # alone calls libm; all else, sums too, must agree to the bit
ULP = 2.0**-24  # of pixels below 1


def run(*command):
    """What a command prints; its whole output in the failure where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(folder, compiler, processor):
    """The harness with the kernels that CMake builds for this processor; a warning is an error."""
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": processor,
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_CXX_FLAGS": "-Werror",
        "CMAKE_CUDA_COMPILER": "",
        "CMAKE_BUILD_TYPE": "Release",
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    run("cmake", "-S", ROOT, "-B", folder, *defined)
    run("cmake", "--build", folder, "--target", "fastadv_cpu", "--parallel", "2")
    source, library = Path(__file__).with_name("aarch64.cpp"), folder / "libfastadv_cpu.a"
    run(compiler, *FLAGS.split(), source, library, "-o", folder / "harness")
    return folder / "harness"


def parse(printed):
    """(instruction sets, names of all kernels, [(name, tensor)]) of what the harness prints."""
    isas, kernels, *lines = printed.splitlines()
    outputs = []
    for name, dtype, data in map(str.split, lines):
        numbers = torch.frombuffer(bytearray.fromhex(data), dtype=getattr(torch, dtype))
        outputs.append((name, numbers))
    return isas, kernels.split(), outputs


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the harness prints on x86 and on aarch64."""
    folder = tmp_path_factory.mktemp("aarch64")
    x86 = build(folder / "x86", "g++", "any")
    arm = build(folder / "arm", "aarch64-linux-gnu-g++", "aarch64")
    return parse(run(x86)), parse(run("qemu-aarch64", arm))


def same_bits(a, b):
    """Where two numbers are the same, sign of zero included, or both NaN. The NaN that an operation
    makes has another sign on x86 than on aarch64."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (a.view(integer) == b.view(integer)) | ((a != a) & (b != b))


def test_all_kernels_run_on_the_baseline_alone(printed):
    for isas, kernels, outputs in printed:
        assert isas == "1 scalar"
        assert set(kernels) == {name.partition("/")[0] for name, _ in outputs}


def test_aarch64_gives_the_numbers_of_x86(printed):
    (*_, x86), (*_, arm) = printed
    wrong = []
    for (name, expected), (other, got) in zip(x86, arm, strict=True):
        assert (name, expected.dtype) == (other, got.dtype)
        same = same_bits(expected, got)
        if name.startswith(POW):
            same |= (expected - got).abs() <= 2 * ULP
        if not same.all():
            wrong.append(f"{name}: {(~same).sum()} of {same.numel()} differ")
    assert not wrong, "\n".join(wrong)
