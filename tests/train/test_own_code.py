"""Methods, networks and data sets of a user's own, by the command line and by the Python API."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import config

from fastadv import UsageError, data, evaluate, export, methods, models
from fastadv.evaluate.__main__ import main as evaluate_main
from fastadv.runs import log
from fastadv.teacher_cache.__main__ import main as cache_main
from fastadv.train import train
from fastadv.train.__main__ import main
from fastadv.train.cli import parse

EXAMPLE = Path(__file__).parents[2] / "examples/own_method.py"
OWN = """
import torch
from torch import nn

from fastadv import data


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))


def taught():
    torch.manual_seed(3)
    return net()


def stripes(data_dir, seed):
    one = data.load("npz", data_dir, seed=seed)
    return data.Dataset("own stripes", 3, 0, 1, one.train, one.val, one.test)


number = 3
"""
SHORT = "--epochs 2 --milestones 1 --batch-size 48 --steps 1 --eps 0.1 --lr 0.05"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with modules of a user's own, the current one; nothing is registered after it."""
    (tmp_path / "own_parts.py").write_text(OWN)
    shutil.copy(EXAMPLE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    forget(monkeypatch)
    return tmp_path


def forget(monkeypatch):
    """As in a process that has registered nothing and imported no module of a user's."""
    for package in (methods, models.zoo, data):
        monkeypatch.setattr(package, "OWN", {})
    for name in ("own_parts", "own_method"):
        monkeypatch.delitem(sys.modules, name, raising=False)


ALL = (
    "--method-from vfd+own_method:Detached --student-from own_parts:net "
    "--clean-teacher-from own_parts:taught --data-from own_parts:stripes"
)


def test_all_of_a_run_may_be_of_ones_own(own, npz, monkeypatch, capsys):
    """It trains, goes on, is evaluated and exported, each time with the code named again."""
    line = f"{ALL} {SHORT} --data-dir {npz} --set beta=3 --set lambda_adv=1/2"
    main([*line.split(), "--out", "whole"])
    saved = json.loads((own / "whole/config.json").read_text())
    assert saved["method"] == "vfd+own_method:Detached"
    assert (saved["student"], saved["data"]) == ("own_parts:net", "own_parts:stripes")
    assert saved["clean_teacher"] == "own_parts:taught"
    assert saved["method_options"] == {"beta": 3.0, "lambda_adv": 0.5}

    forget(monkeypatch)
    shutil.copytree("whole", "cut")
    (own / "cut/last.safetensors").unlink()
    log.keep_before(own / "cut/metrics.jsonl", 1)  # as if killed between best and last
    main(["--resume", "cut", *ALL.split()])
    a, b = (load_file(own / run / "last.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)

    forget(monkeypatch)
    flags = ["--student-from", "own_parts:net", "--data-from", "own_parts:stripes"]
    evaluate_main(["--checkpoint", "whole", *flags, "--attacks", "fgsm", "--out", "report"])
    report = json.loads((own / "report/whole/report.json").read_text())
    assert (report["architecture"], report["dataset"]) == ("own_parts:net", "own stripes")
    export.main(["--checkpoint", "whole", *flags[:2], "--out", "net.pt"])
    told = "net.pt: weights of own_parts:net, for which RobustBench has no class"
    assert told in capsys.readouterr().out
    weights = torch.load("net.pt", weights_only=True)["state_dict"]
    assert {name: list(value.shape) for name, value in weights.items()} == {
        "1.weight": [16, 64],
        "1.bias": [16],
        "3.weight": [3, 16],
        "3.bias": [3],
    }


@pytest.mark.parametrize(
    ("flag", "missing"),
    [
        (
            "--data-from",
            r"data set 'own_parts:stripes' is code .* again, --data-from own_parts:str",
        ),
        ("--method-from", r"method 'own_method:Detached' is code .* --method-from own_method:Det"),
        (
            "--student-from",
            r"model 'own_parts:net' is code .* --student-from own_parts:net, or --te",
        ),
        (
            "--clean-teacher-from",
            r"model 'own_parts:taught' is code .*, or --teacher-from own_part",
        ),
    ],
)
def test_a_run_imports_no_code_by_itself(own, npz, monkeypatch, flag, missing):
    main([*f"{ALL} {SHORT} --data-dir {npz}".split(), "--out", "run"])
    forget(monkeypatch)
    named = dict(zip(ALL.split()[::2], ALL.split()[1::2], strict=True))
    del named[flag]
    before = {path.name: path.read_bytes() for path in (own / "run").iterdir()}
    with pytest.raises(UsageError, match=missing):
        main(["--resume", "run", *(word for pair in named.items() for word in pair)])
    assert {path.name: path.read_bytes() for path in (own / "run").iterdir()} == before
    forget(monkeypatch)
    with pytest.raises(UsageError, match=r"model 'own_parts:net' is code"):
        evaluate.from_run("run")
    assert "own_parts" not in sys.modules


def test_other_code_than_the_runs_is_refused(own, npz):
    main([*f"{ALL} {SHORT} --data-dir {npz}".split(), "--out", "run"])
    with pytest.raises(
        UsageError, match="--student-from is 'own_parts:taught', but the student of"
    ):
        main(["--resume", "run", *ALL.replace("own_parts:net", "own_parts:taught").split()])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--method-from own_method", "^--method-from is 'own_method', must be module:Class"),
        ("--student-from own_parts:", "^--student-from is 'own_parts:', must be module:function"),
        (
            "--data-from no_parts:read",
            "^--data-from is 'no_parts:read': No module named 'no_parts'",
        ),
        ("--teacher-from own_parts:x", "^--teacher-from .*'own_parts' has no attribute 'x'"),
        ("--student-from own_parts:number", "--student-from .*: build is 3, must be a function"),
        ("--method-from own_parts:net", "--method-from .* must be a class derived from methods.Me"),
        ("--data npz --data-from own_parts:stripes", "^--data and --data-from are both given"),
        ("--method at --method-from own_method:Detached", "^--method and --method-from are both"),
    ],
)
def test_what_names_no_code_is_refused(own, flags, match):
    with pytest.raises(UsageError, match=match):
        parse(flags.split())


def test_the_commands_find_the_current_folder(own):
    line = "--method-from own_method:Detached --data digits --steps 1 --epochs 1 --milestones ,"
    command = [sys.executable, "-m", "fastadv.train", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "run folder: runs/own_method-Detached-digits" in done.stdout
    stale = [*command[:3], "--resume", "runs/own_method-Detached-digits"]
    done = subprocess.run(stale, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: method 'own_method:Detached' is code of a user's own")
    assert len(done.stderr.splitlines()) == 1


def test_a_student_of_ones_own_teaches(own, npz, monkeypatch, capsys):
    line = f"--method at --student-from own_parts:net --data npz --data-dir {npz} {SHORT}"
    main([*line.split(), "--out", "teacher"])
    forget(monkeypatch)
    line = f"--method rslad --student digits_net --data npz --data-dir {npz} {SHORT}"
    line += " --teacher-checkpoint teacher/best.safetensors --teacher-from own_parts:net"
    main([*line.split(), "--out", "student"])
    forget(monkeypatch)
    with pytest.raises(UsageError, match="model 'own_parts:net' is code of a user's own"):
        cache_main(["fill", "cache", "--run", "student", "--views", "1"])
    cache_main(["fill", "cache", "--run", "student", "--views", "1", *line.split()[-2:]])
    assert "1 of 9 views filled, 144 rows computed" in capsys.readouterr().out


def test_the_same_in_python(own, npz):
    import own_method
    import own_parts

    methods.register("detached", own_method.Detached)
    models.register("perceptron", own_parts.net)
    data.register("stripes", own_parts.stripes)
    fields = {"data": "stripes", "student": "perceptron", "student_width": None, "epochs": 1}
    train(config(npz, own / "a", method="detached", **fields))
    checkpoint = own / "a/best.safetensors"
    vanilla = {"method": "vfd+detached", "clean_teacher_checkpoint": str(checkpoint)}
    train(config(npz, own / "b", **fields, **vanilla))
    model, run = evaluate.from_run(own / "b")
    assert (run.method, type(model).__name__) == ("vfd+detached", "Sequential")
    models.register("perceptron", own_parts.taught)  # a notebook's cell may run twice


class Greedy(methods.AT):
    def __init__(self, beta, **options):
        super().__init__(**options)


@pytest.mark.parametrize(
    ("register", "name", "thing", "error", "match"),
    [
        (methods.register, "at", methods.AT, UsageError, "name is 'at', which fastadv has already"),
        (models.register, "wrn34_10", list, UsageError, "name is 'wrn34_10', which fastadv has"),
        (data.register, "digits", list, UsageError, "name is 'digits', which fastadv has already"),
        (methods.register, "vfd+at", methods.AT, UsageError, "must be text without a +"),
        (
            methods.register,
            "own",
            methods.AT(),
            TypeError,
            "must be a class derived from methods.M",
        ),
        (methods.register, "own", Greedy, TypeError, "whose option beta must have a default"),
        (models.register, "own", 3, TypeError, "build is 3, must be a function that returns a net"),
        (data.register, "own", 3, TypeError, "read is 3, must be a function that returns a Data"),
    ],
)
def test_what_cannot_be_registered(own, register, name, thing, error, match):
    with pytest.raises(error, match=match):
        register(name, thing)


WRONG = {
    "images are torch.float32": ("images", lambda images: images.float()),
    r"images are torch.uint8 \[0, 1, 8, 8\]": ("images", lambda images: images[:0]),
    "labels are torch.int32": ("labels", lambda labels: labels.int()),
    r"labels lie in 1..3, must be in 0..2": ("labels", lambda labels: labels + 1),
    r"index are torch.int64 \[3\], must be int64 \[80\]": ("index", lambda index: index[:3]),
}


@pytest.mark.parametrize("match", WRONG)
def test_a_reader_of_ones_own_returns_a_data_set(own, npz, match):
    import own_parts

    field, change = WRONG[match]

    def read(data_dir, seed):
        one = own_parts.stripes(data_dir, seed)
        columns = vars(one.test) | {field: change(getattr(one.test, field))}
        return data.Dataset("x", 3, 0, 1, one.train, one.val, data.ImageSet(**columns))

    data.register("wrong", read)
    with pytest.raises(UsageError, match=f"^wrong: test.{match}"):
        data.load("wrong", npz)
    data.register("nothing", lambda data_dir, seed: None)
    with pytest.raises(UsageError, match="nothing returned a NoneType, must return a data.Dataset"):
        data.load("nothing")
    data.register("picky", lambda data_dir: None)
    with pytest.raises(
        UsageError, match=r"^picky\(data_dir, seed\) raised TypeError: .*takes 1 pos"
    ):
        data.load("picky")


def test_networks_of_ones_own_have_their_own_size(own, npz):
    line = f"--student-from own_parts:net --data digits --method at {SHORT} --out run"
    with pytest.raises(UsageError, match="own_parts:net has 3 classes, digits 10"):
        main(line.split())
    line = f"{line.replace('digits', 'npz')} --data-dir {npz} --student-width 4"
    with pytest.raises(UsageError, match=r"width is 4, but own_parts:net\(\) takes no width"):
        main(line.split())
