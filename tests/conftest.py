import functools
import io
import os

import numpy as np
import pytest

# Threads that wait must sleep: the tests run more of them than there are cores. Before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# Files whose tests take minutes. They begin first, so that no process waits for them at the end.
LONG = ("test_triton_interpret.py", "test_train.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    """Three classes of noisy 8x8 stripes, learnable in an epoch or two."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 240)
    images = rng.integers(60, 140, (240, 8, 8)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, label * 3] += 100
    path = tmp_path_factory.mktemp("data") / "stripes.npz"
    np.savez(
        path,
        train_images=images[:160],
        train_labels=labels[:160],
        test_images=images[160:],
        test_labels=labels[160:],
    )
    return path


@pytest.fixture(scope="session")
def teacher(npz, tmp_path_factory):
    """The best checkpoint of a robust network's run; that of a natural one lies in ../natural."""
    from small_runs import config  # they load torch

    from fastadv.train import train

    out = tmp_path_factory.mktemp("teacher") / "run"
    train(config(npz, out, student_width=8))
    train(config(npz, out.with_name("natural"), method="natural", student_width=6))
    return out / "best.safetensors"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """What somebody who watches sees of the bars, of which none is delayed."""
    from fastadv.runs import progress

    shown = Terminal()
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(progress, "tqdm", functools.partial(progress.tqdm, file=shown))
    return shown
