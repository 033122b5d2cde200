"""The folder of a run: it is written while the run trains, and read to resume it."""

import dataclasses
import itertools
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import UsageError
from . import checkpoint, log, parallel
from .config import versions

REDRAWN = 10  # seconds; a drawing of the curves takes as long as an epoch of a small network


class Run:
    """The run folder: config.json, metrics.jsonl, best and last .safetensors, curves.png.

    epoch: the next to run, of which `step` steps are done with the sums in `so_far`. state: the
    method's dynamic weights and temperatures, which checkpoints keep. average: an AveragedModel of
    the student, or None. Of several processes the first writes.
    """

    def __init__(self, config, dataset, student, average, method, optimizer, state):
        self.config, self.student, self.method = config, student, method
        self.average, self.optimizer, self.state = average, optimizer, state
        self.dataset = dataset
        self.shape = {
            "num_classes": dataset.num_classes,
            "in_channels": dataset.train.images.shape[1],
            "classes": dataset.classes,
        }
        self.folder = Path(config.out)
        self.metrics = self.folder / "metrics.jsonl"
        self.events = log.Events(self.folder) if config.log else None
        self.epoch, self.step, self.so_far = 0, 0, {}
        self.best, self.worse = -1.0, 0
        self.drawn = self.saved = time.monotonic()

    @property
    def model(self):
        """The network that is evaluated and published: the average once there is one, else the
        student."""
        averaged = self.average is not None and self.average.n_averaged > 0
        return self.average.module if averaged else self.student

    def open(self):
        """Makes the folder. Raises FileExistsError when there is a run in it."""
        if parallel.rank():
            return
        check_free(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"out is {self.folder}, where no folder can be made: {error.strerror}"
            ) from error
        checkpoint.atomic_write(self.folder / "config.json", self.config.to_json())

    def resume(self):
        """Takes up the state of last.safetensors; a run killed in its first epoch starts over.

        Raises UsageError where the file is not of the run that config.json describes, or of other
        classes than the data set has now, and FileNotFoundError where it is missing after that
        epoch.
        """
        path = self.folder / "last.safetensors"
        if path.exists():
            tensors, metadata = checkpoint.load(path)
            check_classes(path, metadata, self.dataset)
            try:
                self._restore(tensors, metadata)
            except (KeyError, RuntimeError, ValueError) as error:
                missing = isinstance(error, KeyError)  # also in runs of older versions
                reason = f"it has no {error}" if missing else str(error).partition("\n")[0]
                raise UsageError(
                    f"{path} is not of the run that config.json beside it describes: {reason}"
                ) from error
        elif any(row["epoch"] > 0 for row in log.read(self.metrics)):
            raise FileNotFoundError(f"{path}: no such file, but {self.metrics} has later epochs")
        self._check_together(path)
        if parallel.rank() == 0:
            for half_written in self.folder.glob(".*.tmp"):
                half_written.unlink()
            log.keep_before(self.metrics, self.epoch)

    def _check_together(self, path):
        """Raises UsageError unless all processes go on from the same step."""
        mine = torch.tensor([self.epoch, self.step])
        if not torch.equal(parallel.least(mine), -parallel.least(-mine)):
            raise UsageError(
                f"{path} ends at step {self.step} of epoch {self.epoch + 1} here and elsewhere on "
                "another machine: the processes must share the run's folder"
            )

    def _restore(self, tensors, metadata):
        part = partial(_with_prefix, tensors)
        self.student.load_state_dict(part("student." if self.average else "model."))
        if self.average:
            self.average.load_state_dict(part("average."))
        self.method.load_state_dict(part("method."))
        state = part("state.")
        self.state = {k: state[k].to(v.device) for k, v in self.state.items()}
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {}
        for key, value in part("optimizer.").items():
            parameter, name = key.split(".")
            optimizer["state"].setdefault(int(parameter), {})[name] = value
        self.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(tensors["rng"])
        self.so_far = part("so_far.")
        if parallel.rank():
            self.so_far.pop("bad_gradients", None)  # the first process has the total
        self.epoch, self.step = metadata["epoch"] + 1, metadata["step"]
        self.best, self.worse = metadata["best"], metadata["worse"]

    @property
    def finished(self):
        """Whether all epochs are done, or the last `patience` validations were no better."""
        patience = self.config.patience
        return self.epoch >= self.config.epochs or (patience and self.worse >= patience)

    def end_step(self, epoch, step, loss, bad_gradients):
        """Writes a checkpoint within an epoch where the last one is `save_every` minutes old.
        loss, bad_gradients: what this process has added up in the epoch. Collective."""
        if self.config.save_every is None:
            return
        due = time.monotonic() - self.saved > 60 * self.config.save_every
        if parallel.total(torch.tensor(int(due and not parallel.rank()))):
            self.epoch, self.step = epoch, step + 1
            # So any number of processes goes on with them.
            self.so_far = {
                "loss": parallel.mean(loss),
                "bad_gradients": parallel.total(bad_gradients),
            }
            if not parallel.rank():
                self.save("last.safetensors")

    def end_epoch(self, row):
        """Logs the row, writes the checkpoints and the figure."""
        self.epoch, self.step, self.so_far = row["epoch"] + 1, 0, {}
        score = row.get("robust_acc" if self.method.adversarial else "clean_acc")
        better = score is not None and score > self.best
        if better:
            self.best, self.worse = score, 0
        elif score is not None:
            self.worse += 1
        if parallel.rank():
            return
        log.append(self.metrics, row)
        if better:
            self.save("best.safetensors")
        self.save("last.safetensors")
        if self.events:
            self.events.add(log.read(self.metrics), last=self.finished)
        if self.finished or time.monotonic() - self.drawn > REDRAWN:
            log.plot(self.folder / "curves.png", {"": log.read(self.metrics)}, self.folder.name)
            self.drawn = time.monotonic()
        text = f"{self.folder.name} epoch {row['epoch'] + 1}/{self.config.epochs}"
        text += f"  loss {row['loss']:.4f}"
        if "clean_acc" in row:
            text += f"  val clean {row['clean_acc']:.1%} pgd20 {row['robust_acc']:.1%}"
        tqdm.write(f"{text}  {row['images_per_s']:.0f} images/s")
        if self.finished and self.epoch < self.config.epochs:
            tqdm.write(
                f"{self.folder.name} ends: the last {self.worse} validations were no better than "
                "the best before"
            )
        if row["bad_gradients"]:
            tqdm.write(
                f"warning: {row['bad_gradients']} attack gradients had NaN or infinity in them"
            )

    def save(self, name):
        optimizer = {
            f"{parameter}.{name}": value
            for parameter, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
            if value is not None
        }
        parts = {
            "model": self.model.state_dict(),
            "method": self.method.state_dict(),
            "state": self.state,
            "optimizer": optimizer,
            "so_far": self.so_far,
        }
        if self.average:
            parts |= {"student": self.student.state_dict(), "average": self.average.state_dict()}
        tensors = {f"{part}.{k}": v for part, values in parts.items() for k, v in values.items()}
        tensors["rng"] = torch.get_rng_state()
        metadata = {
            "epoch": self.epoch - 1,  # the last whole one
            "step": self.step,
            "best": self.best,
            "worse": self.worse,
            **self.shape,
            "versions": versions(),
            "config": dataclasses.asdict(self.config),
        }
        checkpoint.save(self.folder / name, tensors, metadata)
        self.saved = time.monotonic()


def check_free(folder):
    """Raises FileExistsError when there is a run in the folder."""
    if (Path(folder) / "config.json").exists():
        raise FileExistsError(
            f"out is {folder}, which holds a run: go on with it (--resume {folder}; resume=True in "
            "Python), or give another folder"
        )


def check_classes(path, metadata, dataset):
    """Raises UsageError for the first class whose name is not the one that it had in the run that
    wrote the checkpoint at `path`: a network knows classes by their numbers alone. Nothing is
    compared where the data of the run or `dataset` have no names."""
    known = metadata.get("classes") or []
    if not isinstance(known, list):
        raise UsageError(f"{path}: its header is not that of a run (classes is {known!r})")
    pairs = itertools.zip_longest(known, dataset.classes) if known and dataset.classes else ()
    for number, (theirs, ours) in enumerate(pairs):
        if theirs != ours:
            found = "missing" if ours is None else repr(ours)
            wanted = "left out" if theirs is None else repr(theirs)
            raise UsageError(
                f"class {number} of {dataset.name} is {found}, must be {wanted} as in {path}, "
                "which was trained on these classes in this order"
            )


def _with_prefix(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
