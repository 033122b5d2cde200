"""`--log tensorboard`: what TensorBoard shows of a run are the rows of its metrics.jsonl."""

import errno
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import pytest
from small_runs import config, with_teachers

from fastadv.demo import with_teachers as with_digits_teachers
from fastadv.errors import MissingPackage, UsageError
from fastadv.runs import Config, folder, log
from fastadv.runs.folder import Run
from fastadv.train import train
from fastadv.train.__main__ import main

MODULE = "torch.utils.tensorboard"
NAMES = {
    "loss": "loss/train",
    "clean_acc": "accuracy/clean",
    "robust_acc": "accuracy/pgd20",
    "lr": "rate/lr",
    "images_per_s": "speed/images_per_s",
    "bad_gradients": "attack/bad_gradients",
}


class Board:
    """Stands in for TensorBoard: shown is {tag: {step: [values]}}, of all that was flushed."""

    def __init__(self):
        self.shown, self.folders, self.open, self.full_at = {}, [], 0, None

    def SummaryWriter(self, log_dir, purge_step):
        self.folders.append(log_dir)
        self.open += 1
        for values in self.shown.values():
            for step in [step for step in values if step >= purge_step]:
                del values[step]
        return Writer(self)


class Writer:
    def __init__(self, board):
        self.board, self.waiting = board, []

    def add_scalar(self, tag, value, step):
        assert type(value) in (int, float)
        self.waiting.append((tag, value, step))

    def flush(self):
        for tag, value, step in self.waiting:
            if step == self.board.full_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            values = self.board.shown.setdefault(tag, defaultdict(list))
            values[step].append(value)
        self.waiting = []

    def close(self):
        self.flush()
        self.board.open -= 1


@pytest.fixture
def board(monkeypatch):
    made = Board()
    module = ModuleType(MODULE)
    module.SummaryWriter = made.SummaryWriter
    monkeypatch.setitem(sys.modules, MODULE, module)
    return made


def expected(run, names):
    """What should be shown of a run: each number of each row, once."""
    rows = log.read(run / "metrics.jsonl")
    return {
        tag: {row["epoch"] + 1: [row[name]] for row in rows if name in row}
        for name, tag in names.items()
    }


def killed(monkeypatch, what, at, call):
    """Runs `call`, in which the call number `at` of the method `what` of Run is a kill."""
    original, count = getattr(Run, what), 0

    def dies(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Run, what, dies)
        with pytest.raises(KeyboardInterrupt):
            call()


def test_every_number_of_every_epoch_is_shown(npz, tmp_path, board):
    out = tmp_path / "run"
    rows = train(config(npz, out, log="tensorboard", eval_every=2))
    assert {name for row in rows for name in row} == {"epoch"} | NAMES.keys()
    assert board.shown == expected(out, NAMES)
    assert {tag: [*steps] for tag, steps in board.shown.items()} == {
        tag: [2, 3] if "accuracy" in tag else [1, 2, 3] for tag in NAMES.values()
    }
    assert (board.folders, board.open) == ([str(out)], 0)


@pytest.mark.parametrize(("method", "which"), [("rslad", "teacher"), ("mtard", "clean_teacher")])
def test_caches_have_a_group(npz, teacher, tmp_path, board, method, which):
    options = with_teachers({"method": method, "epochs": 1}, teacher)
    train(config(npz, tmp_path / "run", log="tensorboard", **options))
    cached = {f"{which}_cached": f"cache/{which}"}
    assert board.shown == expected(tmp_path / "run", NAMES | cached)


def test_other_numbers_are_shown_under_their_names(tmp_path, board):
    row = {"epoch": 4, "loss": 1.0, "ranks": 2, "note": "text"}
    log.Events(tmp_path).add([row], last=True)
    assert board.shown == {"loss/train": {5: [1.0]}, "ranks": {5: [2]}}


def test_each_epoch_is_shown_when_it_ends(npz, tmp_path, board, monkeypatch):
    options = {"log": "tensorboard", "save_every": 1e-9}
    killed(monkeypatch, "end_step", 6, lambda: train(config(npz, tmp_path / "run", **options)))
    assert board.shown == expected(tmp_path / "run", NAMES)
    assert [*board.shown["loss/train"]] == [1]


KILLS = {
    "within an epoch": ("end_step", 6, {"save_every": 1e-9}),
    "before a row": ("end_epoch", 2, {}),
    "between a row and its checkpoint": ("save", 3, {"eval_every": 3}),
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_resumed_run_shows_each_epoch_once(npz, tmp_path, board, monkeypatch, kill):
    what, at, options = KILLS[kill]
    settings = config(npz, tmp_path / "run", log="tensorboard", epochs=4, **options)
    killed(monkeypatch, what, at, lambda: train(settings))
    assert 0 < len(board.shown["loss/train"]) < 4
    train(settings, resume=True)
    assert board.shown == expected(tmp_path / "run", NAMES)
    assert [*board.shown["loss/train"]] == [1, 2, 3, 4]


def test_an_epoch_that_earlier_files_have_is_hidden(npz, tmp_path, board, monkeypatch):
    """Whatever lost it: a copy of the folder, say, that has its last file and no other."""
    settings = config(npz, tmp_path / "run", log="tensorboard")
    killed(monkeypatch, "end_epoch", 2, lambda: train(settings))
    board.shown["loss/train"][2] = board.shown["loss/train"][9] = [77.0]
    train(settings, resume=True)
    assert board.shown == expected(tmp_path / "run", NAMES)


def test_a_run_may_begin_without(npz, tmp_path, board, monkeypatch):
    out = tmp_path / "run"
    killed(monkeypatch, "end_epoch", 2, lambda: train(config(npz, out)))
    assert board.shown == {}
    main(["--resume", str(out), "--log", "tensorboard"])
    assert board.shown == expected(out, NAMES)


def test_only_the_first_process_writes(npz, tmp_path, board, monkeypatch):
    monkeypatch.setattr(folder, "parallel", SimpleNamespace(rank=lambda: 1))
    train(config(npz, tmp_path / "run", epochs=1, log="tensorboard"))
    assert board.folders == []


def test_a_full_disk_ends_the_run_and_loses_no_epoch(npz, tmp_path, board):
    settings = config(npz, tmp_path / "run", log="tensorboard")
    board.full_at = 2
    with pytest.raises(OSError, match="No space left"):
        train(settings)
    board.full_at = None
    trained = []
    end_epoch = Run.end_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "end_epoch", lambda self, row: trained.append(end_epoch(self, row)))
        train(settings, resume=True)
    assert len(trained) == 1  # the last: the second one had its checkpoint
    assert board.shown == expected(tmp_path / "run", NAMES)


def test_without_tensorboard(npz, tmp_path, monkeypatch):
    """It is asked for before anything is done, and only where it is needed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, MODULE, None)
    message = r"^log needs tensorboard: pip install fastadv\[log\]$"
    with pytest.raises(MissingPackage, match=message):
        train(config(npz, tmp_path / "run", log="tensorboard"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(MissingPackage, match=message):
        with_digits_teachers(Config(method="rslad", data="digits", log="tensorboard"))
    assert not (tmp_path / "runs").exists()  # where the digits' teachers are trained
    train(config(npz, tmp_path / "run", epochs=1))
    with pytest.raises(MissingPackage, match=message):
        main(["--resume", "run", "--log", "tensorboard"])


@pytest.mark.parametrize("value", ["wandb", "", "TensorBoard"])
def test_nothing_else_is_known(value):
    with pytest.raises(UsageError, match=f"^log is '{value}', must be tensorboard or left out$"):
        Config(log=value)


def test_a_record_is_read_without_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)
    assert Config.from_json(Config(log="tensorboard").to_json()).log == "tensorboard"


def test_tensorboard_reads_it(npz, tmp_path, monkeypatch):
    """The package itself, where it is installed."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    settings = config(npz, out, log="tensorboard")
    killed(monkeypatch, "end_epoch", 3, lambda: train(settings))
    train(settings, resume=True)
    assert len([*out.glob("events.out.tfevents.*")]) == 2
    events = EventAccumulator(str(out)).Reload()
    assert {*events.Tags()["scalars"]} == {*NAMES.values()}
    for tag, wanted in expected(out, NAMES).items():
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(step, pytest.approx(value)) for step, (value,) in wanted.items()]
