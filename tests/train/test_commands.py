"""What goes wrong at a command line ends in one sentence, and changes nothing."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from small_runs import config

from fastadv import UsageError, export
from fastadv.evaluate import __main__ as evaluation
from fastadv.runs import checkpoint, log
from fastadv.teacher_cache import __main__ as cache
from fastadv.train import __main__ as command


@pytest.fixture(scope="module")
def run(npz, tmp_path_factory):
    """The folder of a run of three epochs."""
    out = tmp_path_factory.mktemp("run") / "run"
    command.train(config(npz, out))
    return out


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SWITCHES = [
    ("info", "FASTADV_CPU_ISA", "sse"),
    ("info", "FASTADV_WINOGRAD", "off"),
    *((name, "FASTADV_BACKEND", "fast") for name in ("info", "train", "evaluate", "export")),
    *((name, "FASTADV_BACKEND", "fast") for name in ("demo", "teacher_cache")),
]


@pytest.mark.parametrize(("module", "name", "value"), SWITCHES)
def test_a_wrong_switch(module, name, value):
    command = [sys.executable, "-m", f"fastadv.{module}", "--help"]
    environment = os.environ | {name: value}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {name} is '{value}', must be one of ")
    assert len(done.stderr.splitlines()) == 1


def test_a_wrong_switch_in_a_program_of_ones_own():
    """There it is an exception like any other."""
    command = [sys.executable, "-c", "import fastadv"]
    environment = os.environ | {"FASTADV_BACKEND": "fast"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ValueError: FASTADV_BACKEND is 'fast'")


PLANTED = {
    "train": ("fastadv.runs.log.append", "--method natural --data digits --epochs 1 --out {out}"),
    "evaluate": ("fastadv.evaluate.report.describe", "--checkpoint {run} --attacks clean"),
    "export": ("fastadv.models.export", "--checkpoint {run} --out {out}"),
    "teacher_cache": ("fastadv.teacher_cache.store.caches", "info {run}"),
}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning", "ignore:milestones")
@pytest.mark.parametrize("error", [UsageError, OSError, ValueError, ImportError])
@pytest.mark.parametrize("command", PLANTED)
def test_only_what_a_user_can_mend_is_one_line(run, tmp_path, monkeypatch, command, error):
    """What is wrong in fastadv itself keeps its traceback."""

    def planted(*_, **__):
        raise error("planted")

    function, line = PLANTED[command]
    monkeypatch.setattr(function, planted)
    arguments = line.format(run=run / "best.safetensors", out=tmp_path / "out").split()
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    if error in (UsageError, OSError):
        with pytest.raises(SystemExit, match="^error: planted$"):
            runpy.run_module(f"fastadv.{command}", run_name="__main__")
    else:
        with pytest.raises(error, match="^planted$"):
            runpy.run_module(f"fastadv.{command}", run_name="__main__")


VALUES = {
    "--eps 8": "eps is 8.0, must be in .*did you mean 8.0/255",
    "--init normal": "init is 'normal', must be one of",
    "--attack-bn on": "attack_bn is 'on', must be 'eval' or 'train'",
    "--policy strong": "policy is 'strong', must be one of",
    "--student resnet": "^student: model is 'resnet', must be one of digits_net, ",
    "--method rslad --teacher resnet --teacher-checkpoint x.pt": "^teacher: model is 'resnet'",
    "--data mnist": "^data is 'mnist', must be one of digits, cifar10, ",
    "--student wrn9_2": "wrn9_2|depth is 9",
    "--method advfunmatch --set temperature=0": "temperature of method advfunmatch is 0.0, must be",
    "--method vfd+at --set layers=x": "layer is 'x', must be penultimate, logits or a module",
    "--method vfd+at --set distance=x": "distance is 'x', must be one of mse",
    "--data-dir no.npz": r"^data_dir is '.*no.npz', which does not exist: must be an",
    "--lr 1e30 --batch-size 16": "loss is (nan|inf) in epoch 1: training diverged; lower lr",
}


@pytest.mark.filterwarnings("ignore:milestones")
@pytest.mark.parametrize("flags", VALUES)
def test_a_value_of_a_flag_is_a_users(npz, teacher, tmp_path, flags):
    """Also where it is the library that refuses it."""
    line = f"--method at --data npz --data-dir {npz} --student digits_net --student-width 4"
    line += f" --epochs 1 --steps 1 --out {tmp_path / 'run'} {flags}"
    if "vfd" in flags:
        line += f" --clean-teacher-checkpoint {teacher}"
    if "advfunmatch" in flags:
        line += f" --teacher-checkpoint {teacher}"
    with pytest.raises((UsageError, OSError), match=VALUES[flags]):
        command.main(line.split())


def test_a_checkpoint_of_no_run_names_the_flag_that_it_needs(npz, run, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    line = (
        f"--method mtard --data npz --data-dir {npz} --student digits_net --clean-teacher-checkpo"
    )
    for name in ("w.pt", "w.safetensors"):
        told = f"{name} is not of a run, must be a run's folder or a .safetensors in it"
        for main, flags, hint in [
            (command.main, f"{line}int {{}} --teacher-checkpoint {run}", "need --clean-teacher"),
            (command.main, f"{line}int {run} --teacher-checkpoint {{}}", "need --teacher"),
            (evaluation.main, "--checkpoint {}", "need --model, the name of their network"),
        ]:
            with pytest.raises(UsageError, match=f"{told}; weights from elsewhere {hint}$"):
                main(flags.format(tmp_path / name).split())
        with pytest.raises(UsageError, match=f"{told}$"):
            evaluation.main(f"--checkpoint {run} --source {tmp_path / name}".split())


def test_a_run_has_a_folder(npz, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/run", "/proc/run"):
        with pytest.raises(OSError, match=f"^out is {out}, where no folder can be made: "):
            command.train(config(npz, out, epochs=1))
    assert (tmp_path / "file").read_text() == "mine"


WRONG = {
    "{": None,  # a last line cut short is left out
    '{"epoch": 3, "lo': None,
    "5": "line 4 is no row of a run: '5'",
    '{"a": 1}': "line 4 is no row of a run: '{\"a\": 1}'",
    '{"epoch": "3"}': "line 4 is no row of a run",
    "{\n{}": "line 4 is no row of a run: '{'",
    '{"ep\n{"epoch": 3}': "line 4 is no row of a run",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_log_is_rows_of_a_run(copied, text):
    path = copied / "metrics.jsonl"
    rows = log.read(path)
    with open(path, "a") as file:
        file.write(text)
    before = state(copied)
    if WRONG[text] is None:
        assert log.read(path) == rows
        command.main(["--resume", str(copied)])
        assert path.read_text() == "".join(json.dumps(row) + "\n" for row in rows)
    else:
        with pytest.raises(ValueError, match=rf"metrics\.jsonl: {WRONG[text]}"):
            command.main(["--resume", str(copied)])
        assert state(copied) == before


def changed(folder, **fields):
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"student_width": 8},
        {"student": "resnet18"},
        {"ema": 0.9},
        {"method": "iad1", "teacher_checkpoint": True},
        {"method": "vfd+at", "clean_teacher_checkpoint": True},
    ],
)
def test_a_checkpoint_of_another_run_is_refused(copied, teacher, fields):
    changed(copied, **{k: str(teacher) if v is True else v for k, v in fields.items()})
    before = state(copied)
    with pytest.raises(ValueError, match=r"last\.safetensors is not of the run that config\.json"):
        command.main(["--resume", str(copied)])
    assert state(copied) == before


def test_a_checkpoint_of_no_run_is_refused(copied):
    checkpoint.save(copied / "last.safetensors", {"rng": torch.get_rng_state()}, {"epoch": 1})
    with pytest.raises(ValueError, match=r"last\.safetensors is not of the run .* describes: "):
        command.main(["--resume", str(copied)])
    (copied / "last.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"last\.safetensors: truncated, damaged"):
        command.main(["--resume", str(copied)])


def test_a_run_whose_state_is_lost_does_not_start_over(copied):
    (copied / "last.safetensors").unlink()
    before = state(copied)
    with pytest.raises(FileNotFoundError, match=r"last\.safetensors: no such file, but .* later"):
        command.main(["--resume", str(copied)])
    assert state(copied) == before
    log.keep_before(copied / "metrics.jsonl", 1)  # as if killed between best and last
    command.main(["--resume", str(copied)])
    assert len(log.read(copied / "metrics.jsonl")) == 3


def test_a_finished_run_is_called_one(copied, capsys):
    before = state(copied)
    command.main(["--resume", str(copied)])
    assert "run: training ended with epoch 3, none is left" in capsys.readouterr().out
    assert state(copied) == before


def test_export_says_what_is_wrong(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "junk.safetensors").write_text("junk")
    best = str(run / "best.safetensors")
    for source, out, match in [
        (best, tmp_path, "--out is .*, a folder, must be a file such as"),
        (best, tmp_path / "file/x.pt", "--out is .*/file/x.pt, but there is no folder .*/file$"),
        (best, tmp_path / "no/x.pt", "--out is .*/no/x.pt, but there is no folder .*/no$"),
        (
            tmp_path / "file",
            tmp_path / "x.pt",
            r"file is not of a run, must .* \.safetensors in it$",
        ),
        (tmp_path, tmp_path / "x.pt", "no such file .a run's is DIR/best.safetensors"),
        (tmp_path / "junk.safetensors", tmp_path / "x.pt", "truncated, damaged"),
    ]:
        with pytest.raises((OSError, ValueError), match=match):
            export.main(["--checkpoint", str(source), "--out", str(out)])
    assert {path.name for path in tmp_path.iterdir()} == {"file", "junk.safetensors"}


@pytest.mark.parametrize("command", ["info", "verify", "prune"])
def test_a_folder_of_caches_is_one(tmp_path, command):
    (tmp_path / "file").touch()
    for name in ("file", "no"):
        with pytest.raises(ValueError, match=f"{tmp_path / name}: no such folder"):
            cache.main([command, str(tmp_path / name)])
    if command != "prune":  # which has nothing to do then
        with pytest.raises(ValueError, match=f"{tmp_path}: no caches in it"):
            cache.main([command, str(tmp_path)])


COMMANDS = {"train": command, "evaluate": evaluation, "teacher_cache": cache}
NUMBER, WHOLE = "is not a number such as 0.031 or 8/255", "is not a whole number"
WRONG_FLAGS = {
    "train --milestones 10,x": "argument --milestones: '10,x' is not a list of epochs such as 100,",
    "train --epochs 1.5": f"argument --epochs: '1.5' {WHOLE};",
    "train --student-width many": f"argument --student-width: 'many' {WHOLE};",
    "train --eps 8/x": f"argument --eps: '8/x' {NUMBER};",
    "train --ema x": f"argument --ema: 'x' {NUMBER};",
    "train --precision fp16": "argument --precision: invalid choice: 'fp16' ",
    "train --epoch 3": "unrecognized arguments: --epoch 3;",  # flags are not completed
    "evaluate --limit x": f"argument --limit: 'x' {WHOLE};",
    "evaluate --eps x": f"argument --eps: 'x' {NUMBER};",
    "evaluate --norm l3": "argument --norm: invalid choice: 'l3' ",
    "evaluate --check x": "unrecognized arguments: --check x;",
    "teacher_cache fill": "the following arguments are required: DIR;",
    "teacher_cache fill DIR --view 3": "unrecognized arguments: --view 3;",
    "teacher_cache fill DIR --eps x": f"argument --eps: 'x' {NUMBER};",
    "teacher_cache info DIR --eps 1": "unrecognized arguments: --eps 1;",
    **{
        f"teacher_cache {flag} {count}": f"argument {flag.split()[-1]}: '{count}' {WHOLE} of at "
        "least 1;"
        for flag in ("fill DIR --views", "verify DIR --sample")
        for count in ("0", "-2", "x", "1.5")
    },
}


@pytest.mark.parametrize("line", WRONG_FLAGS)
def test_a_wrong_flag_is_named_in_one_line(capsys, line):
    name, *flags = line.split()
    with pytest.raises(SystemExit) as ended:
        COMMANDS[name].main(flags)
    assert ended.value.code == 2
    (text,) = capsys.readouterr().err.splitlines()
    program = " ".join([name, *flags[:1]] if name == "teacher_cache" else [name])
    assert text.startswith(f"error: {WRONG_FLAGS[line]}")
    assert text.endswith(f"; `python -m fastadv.{program} --help` lists all flags")


@pytest.mark.parametrize(
    "line",
    ["train", "evaluate", "teacher_cache fill", "teacher_cache verify", "teacher_cache prune"],
)
def test_help_explains_every_flag(capsys, line):
    name, *rest = line.split()
    with pytest.raises(SystemExit):
        COMMANDS[name].main([*rest, "--help"])
    lines = capsys.readouterr().out.splitlines()
    flags = [number for number, text in enumerate(lines) if text.startswith("  -")]
    assert flags
    for number in flags:
        beside = re.match(r"  \S.*?  +\S", lines[number])
        assert beside or lines[number + 1].startswith(" " * 12), lines[number]


def test_damaged_weights_and_data_name_themselves(npz, tmp_path):
    (tmp_path / "junk.pt").write_text("junk\n")
    (tmp_path / "junk.npz").write_text("junk")
    taught = {"method": "rslad", "teacher": "resnet18", "epochs": 1}
    for name, match in [
        ("junk.pt", r"junk\.pt: .*not a torch file$"),
        ("", "is a folder, must be a file"),
    ]:
        settings = taught | {"teacher_checkpoint": tmp_path / name}
        with pytest.raises((ValueError, OSError), match=match):
            command.train(config(npz, tmp_path / "run", **settings))
    with pytest.raises(ValueError, match=r"junk\.npz: not a readable .* \(no archive, or pickled"):
        command.train(config(tmp_path / "junk.npz", tmp_path / "run"))
    np.savez(tmp_path / "objects.npz", train_images=np.array([None]))
    with pytest.raises(ValueError, match=r"objects\.npz: not a readable .* \(no archive, or pickl"):
        command.train(config(tmp_path / "objects.npz", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
