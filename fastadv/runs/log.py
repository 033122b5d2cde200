"""Metrics of a run: one JSON object per line, and the field's standard figure."""

import io
import json
import os
from pathlib import Path

from ..errors import MissingPackage, UsageError
from .checkpoint import atomic_write


def append(path, row):
    """Adds `row` as one line that is on the disk when this returns."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path):
    """All rows; a last line cut short by a crash is left out. Raises UsageError, naming file and
    line, for others that are no row of a run."""
    rows, lines = [], Path(path).read_text().splitlines() if Path(path).exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("epoch"), int):
            rows.append(row)
        elif row is not None or number < len(lines):
            raise UsageError(f"{path}: line {number} is no row of a run: {line[:50]!r}")
    return rows


def keep_before(path, epoch):
    """Drops the rows of epoch `epoch` and later, which a resumed run will write again."""
    rows = [row for row in read(path) if row["epoch"] < epoch]
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))


# Under which names TensorBoard groups the numbers of a row; others of a row have their own.
TAGS = {
    "loss": "loss/train",
    "clean_acc": "accuracy/clean",
    "robust_acc": "accuracy/pgd20",
    "lr": "rate/lr",
    "images_per_s": "speed/images_per_s",
    "bad_gradients": "attack/bad_gradients",
    "teacher_cached": "cache/teacher",
    "clean_teacher_cached": "cache/clean_teacher",
}


def need_tensorboard():
    """Raises MissingPackage, an ImportError that says what to install, without TensorBoard."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise MissingPackage("log needs tensorboard: pip install fastadv[log]") from error


class Events:
    """TensorBoard's event files of a run in `folder`: its rows, by epochs counted from 1.

    They only repeat metrics.jsonl. The first row that a process adds brings those before it along,
    and hides what earlier files have. So after a kill no epoch is shown twice or missing, and a
    run may begin without them. Raises OSError when the disk refuses.
    """

    def __init__(self, folder):
        self.folder, self.writer = folder, None

    def add(self, rows, last):
        """Writes the newest of `rows`, which are all so far; `last`: no other will come."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=1)
        else:
            rows = rows[-1:]
        for row in rows:
            for name, value in row.items():
                if name != "epoch" and isinstance(value, (int, float)):
                    self.writer.add_scalar(TAGS.get(name, name), value, row["epoch"] + 1)
        self.writer.close() if last else self.writer.flush()


def plot(path, curves, title):
    """Clean (solid) and robust (dashed) validation accuracy over epochs as a PNG.

    curves: {label: rows of a metrics.jsonl}. Draws nothing where matplotlib is not installed.
    """
    figure = new_figure((7, 4.5))
    if figure is None:
        return
    axes = figure.subplots()
    for i, (label, rows) in enumerate(curves.items()):
        rows = [row for row in rows if "clean_acc" in row]
        epochs = [row["epoch"] + 1 for row in rows]
        for key, style, kind in (("clean_acc", "-", "clean"), ("robust_acc", "--", "PGD-20")):
            values = [100 * row[key] for row in rows]
            axes.plot(epochs, values, style, color=f"C{i}", label=f"{label}, {kind}".lstrip(", "))
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 100), title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)


def new_figure(size):
    """An empty figure of (width, height) in inches, None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=size, layout="constrained")


def save_figure(figure, path):
    """Writes it as a PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())
