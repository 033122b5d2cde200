"""A test of the tests: each fault of faults.json, planted by itself, must make one of them fail.

The package is copied, so that a killed run leaves nothing behind; a fault in C++ is compiled.
A fault is [file, text that occurs once in it, text in its place, tests (files, or FILE::TEST) that
should see it].
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = json.loads((Path(__file__).parent / "faults.json").read_text())
COPIED = ("fastadv", "kernels", "csrc", "tests", "benchmarks")
FILES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE")


def copy(to):
    """What the tests need of the project, importable from `to`."""
    without = shutil.ignore_patterns("__pycache__", "results")
    for folder in COPIED:
        shutil.copytree(ROOT / folder, to / folder, ignore=without)
    for name in FILES:
        shutil.copy(ROOT / name, to)
    (to / "fastadv" / "kernels").symlink_to(to / "kernels")


def rebuild(to):
    """Compiles `to`'s C++, without CUDA, in place of the module that was copied."""
    built = to / "built"
    for folder in (built, to / "build"):  # whose CMake cache names a build environment that is gone
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", built, to]
    env = os.environ | {"CMAKE_ARGS": "-DCMAKE_CUDA_COMPILER="}
    subprocess.run(command, env=env, check=True, capture_output=True)
    (module,) = (built / "fastadv").glob("_C.*")
    shutil.copy(module, to / "fastadv" / module.name)


def run(to, tests):
    """Whether the tests pass in `to`, and what they print. A crash is no pass."""
    selected = ["-m", "not slow and not gpu", "-x", "-q", "-p", "no:cacheprovider", "-n", "0"]
    command = [sys.executable, "-m", "pytest", *tests.split(), *selected]
    done = subprocess.run(command, cwd=to, capture_output=True, text=True, check=False)
    assert done.returncode <= 1, done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode == 0, done.stdout


def occurrences(file, text):
    return (ROOT / file).read_text().count(text)


def test_every_fault_can_be_planted():
    """Each text is still there, once: a fault that cannot be planted would be seen by any test."""
    assert len(FAULTS) >= 60
    lost = [(file, old) for file, old, _, _ in FAULTS if occurrences(file, old) != 1]
    assert not lost
    files = {test.partition("::")[0] for *_, tests in FAULTS for test in tests.split()}
    assert all((ROOT / file).exists() for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("tests", list(dict.fromkeys(tests for *_, tests in FAULTS)))
def test_every_fault_is_seen(tests, tmp_path):
    copy(tmp_path)
    sound, printed = run(tmp_path, tests)
    assert sound, f"fails without a fault: {printed[-2000:]}"
    survivors = []
    for file, old, new in (fault[:3] for fault in FAULTS if fault[3] == tests):
        path = tmp_path / file
        text = path.read_text()
        path.write_text(text.replace(old, new))
        if file.startswith("csrc"):
            rebuild(tmp_path)
        passed, _ = run(tmp_path, tests)
        path.write_text(text)
        if file.startswith("csrc"):
            for module in (ROOT / "fastadv").glob("_C.*"):
                shutil.copy(module, tmp_path / "fastadv" / module.name)
        if passed:
            survivors.append(f"{file}: {new}")
    assert not survivors, "no test saw\n" + "\n".join(survivors)
