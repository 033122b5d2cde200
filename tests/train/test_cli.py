import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch

from fastadv import UsageError, data, demo, methods, models
from fastadv.runs.config import Config, number
from fastadv.train import train
from fastadv.train.__main__ import main
from fastadv.train.build import build_method, build_nets
from fastadv.train.cli import fresh_folder, parse, parser
from fastadv.train.loop import BF16_GAINS
from fastadv.train.optimizer import learning_rate
from fastadv.train.recipes import digits_teacher, recipe, recipes


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = (
        "--recipe rslad-cifar10-resnet18 --epochs 3 --eps 4/255 --precision bf16 "
        "--set adv_weight=1/2 --milestones 1,2 --data-dir x"
    )
    got, resume = parse(line.split())
    assert not resume
    assert (got.method, got.epochs, got.weight_decay, got.milestones) == ("rslad", 3, 2e-4, (1, 2))
    assert got.eps == pytest.approx(4 / 255)
    assert got.step_size == pytest.approx(1 / 255)
    assert got.precision_attack == got.precision_outer == got.precision_teacher == "bf16"
    assert got.method_options == {"adv_weight": 0.5}
    assert got.out == "runs/rslad-cifar10"
    (tmp_path / "runs/digits").mkdir(parents=True)
    assert str(fresh_folder("digits")) == "runs/digits-2"
    for flags in ("--lr 1", "--epochs 3", "--recipe x", "--precision bf16", "--set beta=1"):
        told = f"--resume takes the run's own settings: {flags.split()[0]} cannot go with it, only"
        with pytest.raises(ValueError, match=told):
            parse(["--resume", "x", *flags.split()])
    with pytest.raises(ValueError, match="--set is 'beta6', must be NAME=VALUE"):
        parse(["--set", "beta6"])
    (tmp_path / "best.safetensors").touch()
    for text, told in (("no", "which has no config.json"), ("best.safetensors", "a file")):
        with pytest.raises(
            FileNotFoundError, match=f"--resume is {text}, {told}: must be the fold"
        ):
            parse(["--resume", text])
    with pytest.raises(ValueError, match="--recipe is 'x', must be one of absld-cifar10-resnet18"):
        parse(["--recipe", "x"])


@pytest.mark.parametrize("method", ["rslad", "vfd+trades", "iad1"])
def test_digits_have_settings_of_their_own(method):
    config, _ = parse(f"--method {method} --data digits --eps 0.1 --set temperature=2".split())
    assert (config.student, config.student_width, config.eps) == ("digits_net", 8, 0.1)
    assert config.lr * config.weight_decay == pytest.approx(5e-5)
    assert config.lr == (1.0 if method == "rslad" else 0.1)
    extra = {
        "rslad": {},
        "iad1": {"begin": 12},
        "vfd+trades": {"lambda_adv": 1.0, "lambda_clean": 1.0},
    }[method]
    assert config.method_options == {"temperature": 2.0} | extra


SETTINGS = json.loads(Path(__file__).with_name("digits_settings.json").read_text())


@pytest.mark.parametrize("name", SETTINGS)
def test_the_digits_settings_stay_as_they_are(name):
    """They are those of the published table of methods, and of the pictures."""
    if name.endswith("teacher"):
        made = Config(**digits_teacher(name))
    else:
        made, _ = parse(["--method", name, "--data", "digits", "--out", "x"])
    expected = Config(**SETTINGS[name], out=made.out)
    assert made == expected
    assert SETTINGS.keys() >= methods.METHODS.keys()


def test_settings_give_way_to_flags():
    config, _ = parse(["--method", "vfd+rslad", "--data", "digits", "--student", "resnet18"])
    assert config.student_width is None
    assert config.method_options == {"lambda_adv": 0.1, "lambda_clean": 0.1}
    config, _ = parse(["--recipe", "rslad-cifar10-resnet18", "--method", "trades"])
    assert config.teacher is None
    line = "--recipe trades-cifar10-resnet18 --method at --set parity=True --set label_smoothing=0"
    config, _ = parse(line.split())
    assert (config.method, config.eps) == ("at", 0.031)
    assert config.method_options == {"parity": True, "label_smoothing": 0.0}
    with pytest.raises(ValueError, match="--recipe is .*, which is not for digits.*leave it out"):
        parse(["--recipe", "trades-cifar10-resnet18", "--data", "digits"])


def test_digits_train_the_teachers_that_a_method_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = {"epochs": 1, "milestones": (), "steps": 1, "student_width": 4}
    whole = demo.digits_teacher
    monkeypatch.setattr(demo, "digits_teacher", lambda which: whole(which) | short)
    line = "--method mtard --data digits --epochs 1 --milestones , --steps 1 --out"
    for run in ("first", "second"):
        main([*line.split(), run])
        saved = Config.from_json((tmp_path / run / "config.json").read_text())
        assert saved.teacher_checkpoint == str(tmp_path / "runs/digits-teacher/best.safetensors")
        teachers = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/best.safetensors")}
        assert len(teachers) == 2
        if run == "first":
            before = teachers
    assert teachers == before
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {
        "digits-teacher",
        "digits-clean-teacher",
        "teacher-cache",
    }
    with pytest.raises(ValueError, match="teacher_checkpoint is missing, which method mtard needs"):
        train(dataclasses.replace(saved, teacher_checkpoint=None, out="third"))


def test_recipes_are_those_of_the_papers():
    rslad = Config(**recipe("rslad-cifar10-resnet18"))
    rates = [learning_rate(rslad, epoch, rslad.epochs) for epoch in (0, 214, 215, 260, 285, 299)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 1e-3, 1e-4, 1e-4])
    trades = Config(**recipe("trades-cifar10-resnet18"))
    assert (trades.eps, trades.step_size, trades.epochs) == (0.031, 0.007, 76)
    assert Config(**recipe("at-cifar10-preactresnet18")).attack_bn == "train"


def test_a_method_is_built_of_its_config():
    made = build_method(Config(method="ard", milestones=(3, 7), eps=0.1, steps=4))
    assert made.milestones == (3, 7)
    attack = made.attack
    assert (attack.eps, attack.step_size, attack.steps, attack.init) == (0.1, 0.025, 4, "uniform")
    assert attack.clip_start is False  # the paper's own start
    assert build_method(Config(method="ard", init="uniform")).attack.clip_start is False
    assert build_method(Config(method="ard", init="gaussian")).attack.clip_start is None
    assert made.attack_bn == "train"
    assert build_method(Config(method="ard", attack_bn="eval")).attack_bn == "eval"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_networks_have_their_own_precision(npz, teacher, precision, dtype):
    dataset = data.load("npz", npz)
    for part in ("attack", "outer", "teacher"):
        settings = {"method": "rslad", "teacher_checkpoint": teacher, "student": "digits_net"}
        made = Config(**settings, **{f"precision_{part}": precision})
        nets, _ = build_nets(made, dataset, build_method(made))
        found = {"attack": nets.student_twin, "outer": nets.student, "teacher": nets.teacher}
        for name, net in found.items():
            assert net.dtype == (dtype if name == part else torch.float32), name


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_a_run(name):
    config = Config(**recipe(name))
    assert name.split("-")[0] == config.method.split("+")[0]
    assert config.data == name.split("-")[-2]
    assert config.student.replace("_", "") == name.split("-")[-1].replace("_", "")
    method = build_method(config)
    for which in method.teachers:
        assert getattr(config, which), f"{name} names no {which}"
    for network in {config.student, config.teacher, config.clean_teacher} - {None}:
        with torch.device("meta"):
            models.get(network, 10)
    published = recipes()[name]["published"]
    assert all(20 < v < 95 for k, v in published.items() if k != "provenance")
    assert published["provenance"]


def test_help_shows_defaults_as_flags_have_them():
    text = " ".join(parser(None).format_help().split())
    for shown in ("(default: 100,150)", "8/255 (default: 0.03137)", "(default: resnet18)"):
        assert shown in text
    assert "None" not in text
    assert "--student-from module:function in place of --student, a network of your own" in text


def test_recipes_are_listed(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--list-recipes"])
    assert not exit.value.code
    text = capsys.readouterr().out
    for name in recipes():
        assert f"\n{name} " in text
    line = next(line for line in text.splitlines() if line.startswith("rslad-cifar10-resnet18"))
    assert line.split() == ["rslad-cifar10-resnet18", "83.38", "51.49"]
    assert "transcription of the RSLAD paper" in text


@pytest.mark.parametrize("text", ["8/0", "x", "", "1/2/3"])
def test_numbers(text):
    assert number("8/255") == 8 / 255
    with pytest.raises(ValueError, match="is not a number such as"):
        number(text)


def test_bfloat16_is_suggested_where_attacks_gain_by_it(npz, tmp_path, monkeypatch, capsys):
    line = f"--data npz --data-dir {npz} --student digits_net --epochs 1 --steps 1 --milestones ,"
    for run, (isa, options, gain) in enumerate(
        [
            ("amx", "--method at", "2 to 9"),
            ("avx512_bf16", "--method at", "1 to 2"),
            ("avx512", "--method at", None),
            ("amx", "--method at --precision bf16", None),
            ("amx", "--method at --attack-bn train", None),  # the student itself is attacked
            ("amx", "--method natural", None),
            ("amx", "--method at --student vit_tiny", None),  # which the engine does not take
        ]
    ):
        monkeypatch.setattr("fastadv.train.loop.isa", lambda isa=isa: isa)
        main([*line.split(), *options.split(), "--out", str(tmp_path / str(run))])
        said = [text for text in capsys.readouterr().out.splitlines() if "--precision" in text]
        start = f"this CPU has {isa}: --precision bf16 makes attacks about {gain} times as fast"
        assert [text.startswith(start) for text in said] == ([True] if gain else []), options
    monkeypatch.setattr("fastadv.train.loop.isa", lambda: "amx")
    main(["--resume", str(tmp_path / "0")])
    assert "--precision" not in capsys.readouterr().out


def test_the_suggestion_is_what_was_measured():
    """README's rows of PGD-10 end in: fastadv fp32, fastadv bf16, measured."""
    gains = {}
    for row in (Path(__file__).parents[2] / "README.md").read_text().splitlines():
        if row.startswith("| PGD-10, "):
            *_, fp32, bf16, measured = row.strip("| ").split(" | ")
            gain = float(bf16.rstrip("x")) / float(fp32.rstrip("x"))
            gains.setdefault(measured.split()[1].rstrip(","), []).append(gain)
    rounded = {isa: sorted({f"{min(of):.0f}", f"{max(of):.0f}"}) for isa, of in gains.items()}
    rounded = {isa: of for isa, of in rounded.items() if of != ["1"]}  # which compute in float32
    assert {isa: " to ".join(of) for isa, of in rounded.items()} == BF16_GAINS


def test_advice_waits_until_a_run_is_accepted(npz, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastadv.train.loop.isa", lambda: "amx")
    line = f"--method at --data npz --data-dir {npz} --student digits_net --epochs 1 --steps 1"
    (tmp_path / "config.json").write_text("a run")
    for wrong in (f"--out {tmp_path}", "--cutout 99", "--set no_such=1", "--student vit_tinny"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of milestones that one epoch does not reach
            with pytest.raises((UsageError, FileExistsError)):
                main([*line.split(), *wrong.split()])
        assert "--precision" not in capsys.readouterr().out
