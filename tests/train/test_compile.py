"""--compile: the student's own step by torch.compile."""

import pytest
import torch
from small_runs import config, with_teachers
from torch import nn

from fastadv.engine.student import FastStudent
from fastadv.errors import UsageError
from fastadv.methods import METHODS
from fastadv.train import train
from fastadv.train.build import build_method


class Branching(nn.Module):
    """A network that no compiler takes whole: its way depends on a number."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return self.net(x) if x.sum().item() > 0 else self.net(-x)


@pytest.fixture
def traced(monkeypatch):
    """What the compiler takes runs operator by operator; returns the options that it was given."""
    given = []

    def compiled(self, **options):
        given.append(options)
        nn.Module.compile(self, backend="aot_eager", **options)

    monkeypatch.setattr(FastStudent, "compile", compiled)
    yield given
    torch.compiler.reset()


def losses(npz, out, **settings):
    return [row["loss"] for row in train(config(npz, out, epochs=2, **settings))]


def test_a_compiled_run_is_the_run(npz, tmp_path, teacher, traced):
    settings = with_teachers({"method": "rslad"}, teacher)
    plain = losses(npz, tmp_path / "plain", **settings)
    assert traced == []
    found = losses(npz, tmp_path / "compiled", **settings, compile=True)
    assert found == pytest.approx(plain, rel=1e-5)
    assert traced == [{"fullgraph": True, "dynamic": False}]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_compiles(npz, tmp_path, teacher, name):
    """By the compiler as users have it."""
    settings = with_teachers({"method": name}, teacher)
    plain = losses(npz, tmp_path / "plain", **settings)
    found = losses(npz, tmp_path / "compiled", **settings, compile=True)
    # In the second epoch signs near zero have turned, and pixels moved.
    assert found[0] == pytest.approx(plain[0], rel=1e-3)
    torch.compiler.reset()


def test_a_method_that_reads_features_is_refused(npz, tmp_path):
    with pytest.raises(UsageError, match=r"compile is given, must not be with vfd\+at: it reads"):
        build_method(config(npz, tmp_path, method="vfd+at", compile=True))


def test_a_network_that_is_not_taken_whole_is_refused(npz, tmp_path, monkeypatch):
    monkeypatch.setattr("fastadv.train.build.build_student", lambda *_: Branching())
    with pytest.raises(UsageError, match="torch.compile cannot take the student whole: "):
        train(config(npz, tmp_path / "run", compile=True, epochs=1))
