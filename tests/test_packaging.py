"""The package as others install it: a wheel and an sdist, with a compiler and without."""

import os
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
