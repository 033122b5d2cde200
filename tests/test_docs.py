"""What README and the pages of docs/ say is true: code runs, commands parse, links lead there."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastadv import attacks, data, evaluate, export, losses, methods, models, ops
from fastadv.data.__main__ import arguments as data_arguments
from fastadv.evaluate.__main__ import arguments as evaluate_arguments
from fastadv.evaluate.__main__ import check as evaluate_check
from fastadv.teacher_cache.__main__ import arguments as cache_arguments
from fastadv.train import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def blocks(page, *languages):
    """The fenced blocks of a page in these languages, in order."""
    found = re.findall(r"^```(\S*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [text for language, text in found if language in languages]


def commands(page):
    """The commands in the shell blocks of a page, each a list of words; comments left out."""
    text = "\n".join(blocks(page, "", "bash", "console")).replace("\\\n", " ")
    starts = ("python ", "torchrun ", "make ", "pip ")
    return [
        shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(starts)
    ]


def parse_train(argv):
    alone = {"--resume", "--list-recipes", "--help"}
    if alone & set(argv):
        cli.parser(None).parse_args(argv)
    elif argv:
        config, _ = cli.parse(argv)
        methods.get(config.method, **config.method_options)


def parse_evaluate(argv):
    evaluate_check(evaluate_arguments(argv))


def parse_cache(argv):
    _, rest = cache_arguments(argv)
    parse_train(rest)


def parse_export(argv, monkeypatch):
    class Parsed(Exception):
        pass

    def parsed(path):
        raise Parsed

    monkeypatch.setattr(export, "from_run", parsed)
    with pytest.raises(Parsed):
        export.main(argv)


def no_arguments(argv):
    assert argv == []


def parse(module, argv, monkeypatch):
    """Raises, or exits, where the command does not take these arguments."""
    if module == "fastadv.export":
        parse_export(argv, monkeypatch)
    else:
        {
            "fastadv.train": parse_train,
            "fastadv.evaluate": parse_evaluate,
            "fastadv.teacher_cache": parse_cache,
            "fastadv.data": data_arguments,
            "fastadv.info": no_arguments,
            "fastadv.demo": no_arguments,
        }[module](argv)


@pytest.fixture(autouse=True)
def nothing_stays_registered(monkeypatch):
    for register in (data.register, methods.register, models.register):
        monkeypatch.setattr(sys.modules[register.__module__], "OWN", {})


@every_page
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@every_page
def test_commands_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")  # what --method-from imports
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(page):
        if "-m" in words and words[words.index("-m") + 1].startswith("fastadv."):
            at = words.index("-m") + 1
            parse(words[at], words[at + 1 :], monkeypatch)
        elif words[0] == "python":
            assert (ROOT / words[1]).exists(), words
        elif words[0] == "make":
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in words[1:]), words


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("fastadv.train", ["--method", "no-such"]),
        ("fastadv.train", ["--recipe", "no-such"]),
        ("fastadv.train", ["--no-such", "1"]),
        ("fastadv.train", ["--method", "at", "--set", "no_such=1"]),
        ("fastadv.evaluate", ["--checkpoint", "a", "--attacks", "no-such"]),
        ("fastadv.teacher_cache", ["info", "DIR", "--no-such"]),
        ("fastadv.export", ["--checkpoint", "a"]),
    ],
)
def test_a_wrong_command_is_seen(module, argv, monkeypatch):
    with pytest.raises((Exception, SystemExit)):
        parse(module, argv, monkeypatch)


@every_page
def test_flags_exist(page):
    """Each flag that a page names in its text is one of a command's."""
    sources = [*(ROOT / "fastadv").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    known = {flag for path in sources for flag in re.findall(r'"(--[a-z-]+)"', path.read_text())}
    known |= {*cli.parser(None)._option_string_actions, "--nproc-per-node", "--max-restarts"}
    named = set(re.findall(r"`(--[a-z-]+)", page.read_text()))
    assert named <= known


def anchors(page):
    """The names by which GitHub and Sphinx know a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            there = page if not path else page.parent / path
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@pytest.fixture(scope="module")
def inventory(tmp_path_factory):
    """The names in the API reference, as `make docs` builds it: a warning is an error."""
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    out = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", ROOT / "docs", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from sphinx.util.inventory import InventoryFile

    with open(out / "objects.inv", "rb") as file:
        found = InventoryFile.load(file, "", lambda base, name: name)
    return {name.rpartition(".")[2] for kind in found.values() for name in kind}


def test_the_pages_build_and_know_every_public_name(inventory):
    public = {
        name
        for name, f in vars(losses).items()
        if inspect.isfunction(f) and f.__module__ == losses.__name__
    }
    for package in (attacks, data, evaluate, methods, models, ops):
        public |= {name for name in package.__all__ if callable(getattr(package, name))}
    assert {name for name in public if not name.startswith("_")} <= inventory


def test_the_papers_that_the_code_names_are_cited():
    citation = (ROOT / "CITATION.cff").read_text()
    yaml = pytest.importorskip("yaml")
    assert {"cff-version", "message", "title", "authors"} <= yaml.safe_load(citation).keys()
    for folder in ("attacks", "methods"):
        for path in (ROOT / "fastadv" / folder).glob("*.py"):
            for paper in re.findall(r"arXiv:? ?(\d{4}\.\d{5})", path.read_text()):
                assert f"arXiv:{paper}" in citation, path
