"""The package as others install it: a wheel and an sdist, with a compiler and without."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT = shutil.ignore_patterns("*.egg-info", "*.so", "__pycache__")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
STEP = """
import sys
import fastadv, torch
from fastadv import attacks, kernels, models, ops
from fastadv.ops import _native
from fastadv.train.recipes import recipes

assert fastadv.__file__.startswith(sys.prefix), fastadv.__file__
assert recipes()
x, grad = torch.full((2, 3, 4, 4), 0.5), torch.ones(2, 3, 4, 4)
x_adv = ops.pgd_step(x, grad, x, eps=8 / 255, step_size=2 / 255)
assert torch.allclose(x_adv, x + 2 / 255)
attacks.PGD(steps=2)(models.get("resnet20", width=4), x, torch.tensor([0, 1]))
print(_native.missing)
"""


def run(*command, **environment):
    """What a command prints; its whole output in the failure where it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copied(to):
    """The sources as a fresh clone has them, in a new folder."""

    def ignored(folder, names):
        of_root = {name for name in names if name.startswith(".") or name in ("build", "runs")}
        return {*BUILT(folder, names), *(of_root if Path(folder) == ROOT else ())}

    return shutil.copytree(ROOT, to, ignore=ignored)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    tree = copied(folder / "fastadv")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, tree)
    return next(folder.glob("fastadv-*.tar.gz"))


# A compiler that knows all flags and not the intrinsic $LACKS.
OLD_COMPILER = """#!/bin/sh
for word; do
  case $word in *.cxx) grep -qs "$LACKS" "$word" && exit 1;; esac
done
exec c++ "$@"
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="no x86")
@pytest.mark.skipif(not all(map(shutil.which, ("cmake", "ninja", "c++"))), reason="no CMake")
@pytest.mark.parametrize(
    ("lacks", "left_out"),
    [("_mm512_dpbf16_ps", {"avx512_bf16", "amx"}), ("_tile_dpbf16ps", {"amx"})],
)
def test_an_old_compiler_builds_without_what_it_does_not_know(lacks, left_out, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(OLD_COMPILER)
    compiler.chmod(0o755)
    without = f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_CUDA_COMPILER="
    run("cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", *without, LACKS=lacks)
    targets = run("ninja", "-C", tmp_path / "build", "-t", "targets", "all")
    built = set(re.findall(r"fastadv_(\w+)\.dir/csrc/cpu/kernels", targets))
    assert {"scalar", "avx2", "avx512"} <= built
    assert not built & left_out


def test_all_requirements_are_pinned():
    """But Triton, which is left to torch."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    required = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    required += [requirement for extra in extras for requirement in extra]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in required}
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert names - set(pins) == {"fastadv", "triton"}


@pytest.fixture
def python(tmp_path):
    """The interpreter of a new environment that finds this one's torch, and no fastadv."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    found = tmp_path / "venv" / "bin" / "python"
    packages = run(found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A path that a .pth file adds is searched, but the .pth files in it, such as that of an
    # editable installation, are not read.
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return found


@pytest.mark.slow
def test_an_sdist_has_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    files = [
        path for folder in ("csrc", "kernels", "fastadv") for path in (ROOT / folder).rglob("*")
    ]
    sources = {".py", ".json", ".cpp", ".h", ".inl", ".cu"}
    needed = {str(path.relative_to(ROOT)) for path in files if path.suffix in sources}
    needed |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    needed |= {"constraints.txt", "CHANGELOG.md", "CITATION.cff", "docs/conf.py"}
    assert needed <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "no compiler"])
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_runs(kind, compiler, request, python, tmp_path):
    environment = {} if compiler else {"CC": "/bin/false", "CXX": "/bin/false"}
    if kind == "wheel":
        tree = copied(tmp_path / "fastadv")
        run(*PIP, "wheel", "--no-deps", "-w", tmp_path, tree, **environment)
        package = next(tmp_path.glob("fastadv-*.whl"))
    else:
        package = request.getfixturevalue("sdist")
    run(*PIP, "--python", python, "install", "--no-deps", package, **environment)
    missing = run(python, "-I", "-c", STEP).strip()
    assert (missing == "None") == compiler, missing
    printed = run(python, "-I", "-m", "fastadv.info")
    assert (" in use; can run " in printed) == compiler
