"""Imports point one way, from a level to those before it, held by walking every module's ast; and
the tree stays one that explains itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = (
    {"errors", "kernels"},
    {"ops"},
    {"losses", "runs"},
    {"engine", "models", "data"},
    {"attacks"},
    {"methods"},
    {"evaluate", "teacher_cache"},
    {"testing", "info", "compat", "export"},
    {"train"},
    {"demo"},
    {"__main__"},
)
LEVEL = {unit: level for level, units in enumerate(LEVELS) for unit in units}
BANNED = {"methods": {"models", "data", "teacher_cache"}}
KERNELS_MAY_IMPORT = {"torch", "triton"} | sys.stdlib_module_names


def sources():
    """{dotted module name: source}; `fastadv` and `fastadv.ops` name the packages themselves."""
    found = {}
    for folder, package in ((ROOT / "fastadv", "fastadv"), (ROOT / "kernels", "fastadv.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name, path.stem == "__init__"] = path.read_text()
    return found


def imports(module, is_package, source):
    """(absolute dotted name, whether inside a function) of all that a module imports."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: None if is_package else -1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node in inside) for alias in node.names)


def unit_of(module):
    """The package or module under fastadv that a module belongs to; commands may import all."""
    parts = module.split(".")
    return "__main__" if parts[-1] == "__main__" else [*parts, ""][1]


def violations(files):
    """One line per import, module or cycle that breaks the order."""
    found, edges = [], {}
    for (module, is_package), source in files.items():
        unit = unit_of(module)
        if unit and unit not in LEVEL:
            found.append(f"{module} has no level: add {unit} to LEVELS")
            continue
        for name, late in imports(module, is_package, source):
            package, target = [*name.split("."), ""][:2]
            if unit == "kernels" and package not in KERNELS_MAY_IMPORT:
                if not name.startswith("fastadv.kernels"):
                    found.append(f"{module} imports {name}, not torch or triton")
            elif package != "fastadv" or target in ("__version__", unit):
                continue
            elif target == "_C":
                if module != "fastadv.ops._native":
                    found.append(f"{module} imports _C: only ops._native may")
            elif target not in LEVEL:
                found.append(f"{module} imports {name}, which has no level")
            elif unit and (LEVEL[target] > LEVEL[unit] or target in BANNED.get(unit, ())):
                found.append(f"{module} imports {target}, which is not below {unit}")
            elif unit and not late:
                edges.setdefault(unit, set()).add(target)
    return found + [f"{unit} imports itself in the end" for unit in edges if reaches(edges, unit)]


def reaches(edges, unit):
    """Whether a chain of imports that starts at `unit` comes back to it."""
    seen, waiting = set(), [unit]
    while waiting:
        for target in edges.get(waiting.pop(), set()) - seen:
            seen.add(target)
            waiting.append(target)
    return unit in seen


def test_imports_point_one_way():
    files = sources()
    assert ("fastadv.ops.pgd_step", False) in files
    assert ("fastadv.kernels", True) in files
    assert violations(files) == []


def test_every_package_is_installed():
    listed = (ROOT / "pyproject.toml").read_text()
    for init in (ROOT / "fastadv").glob("*/**/__init__.py"):
        name = ".".join(init.parent.relative_to(ROOT).parts)
        assert f'"{name}"' in listed


def test_the_hall_is_not_crowded():
    """A new module goes into one of the packages."""
    assert len(list((ROOT / "fastadv").glob("*.py"))) <= 8


def test_readme_is_read_in_three_minutes():
    """Long tables and long prose go to docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_contributing_has_these_levels():
    order = " < ".join(", ".join(sorted(units)) for units in LEVELS)
    assert order in " ".join((ROOT / "CONTRIBUTING.md").read_text().split())


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("fastadv.ops.margin", "from .. import losses", "imports losses, which is not below ops"),
        ("fastadv.ops.margin", "from ..attacks.pgd import PGD", "imports attacks"),
        ("fastadv.ops.margin", "def f():\n    import fastadv.methods", "imports methods"),
        ("fastadv.methods.at", "from ..models import resnet", "imports models"),
        ("fastadv.methods.at", "from fastadv.data import loader", "imports data"),
        ("fastadv.methods.at", "from .. import teacher_cache", "imports teacher_cache"),
        ("fastadv.losses", "from . import info", "imports info"),
        ("fastadv.info", "from . import train", "imports train"),
        ("fastadv.evaluate.search", "from ..train import loop", "imports train"),
        (
            "fastadv.ops.margin",
            "from ._native import _C\nfrom .. import _C",
            "only ops._native may",
        ),
        ("fastadv.losses", "from . import helpers", "helpers, which has no level"),
        ("fastadv.helpers", "import torch", "fastadv.helpers has no level"),
        ("fastadv.kernels.margin", "import numpy", "imports numpy, not torch or triton"),
        ("fastadv.kernels.margin", "from .. import _native", "not torch or triton"),
        ("fastadv.kernels.margin", "from fastadv import ops", "not torch or triton"),
    ],
)
def test_a_planted_violation_is_caught(module, source, message):
    (found,) = violations({(module, False): source})
    assert message in found


def test_a_cycle_within_a_level_is_caught():
    files = {
        ("fastadv.models", True): "from .. import data",
        ("fastadv.data", True): "from ..engine import freeze",
    }
    assert violations(files) == []
    files["fastadv.engine.frozen", False] = "from ..models import resnet"
    assert len(violations(files)) == 3
    files["fastadv.engine.frozen", False] = "def f():\n    from ..models import resnet"
    assert violations(files) == []  # not at import time


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastadv.ops.margin", "import math\nimport torch\nfrom . import _native"),
        ("fastadv.kernels.margin", "import triton.language as tl\nimport torch\nfrom . import x"),
        ("fastadv.info", "from . import __version__, ops, methods"),
        ("fastadv.train.loop", "from .. import evaluate, info, data"),
        ("fastadv.ops._native", "from .. import _C"),
        ("fastadv.evaluate.__main__", "from ..train import cli"),
        (
            "fastadv.attacks.pgd",
            "from ..engine.frozen import Frozen\nfrom .checks import check_images",
        ),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert violations({(module, False): source}) == []


def test_the_root_may_import_anything_known():
    source = "from . import methods, ops\nfrom .engine import freeze"
    assert violations({("fastadv", True): source}) == []


def test_an_import_loads_no_large_package_but_torch():
    """torch's compiler takes as long to import as all else of torch."""
    large = {"torch._dynamo", "triton", "sympy", "matplotlib", "sklearn", "scipy", "PIL"}
    large.add("tensorboard")
    code = (
        f"import sys, fastadv, fastadv.train, fastadv.evaluate; print(sys.modules.keys() & {large})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
