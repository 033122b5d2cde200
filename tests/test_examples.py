"""The files of examples/: each does what its plain original does."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastadv import attacks, compat, models

EXAMPLES = Path(__file__).parents[1] / "examples"
PAIRS = "trades", "rslad", "accelerate_at", "lightning_at"
PACKAGES = {"accelerate_at": "accelerate", "lightning_at": "lightning"}


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name, anew."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(EXAMPLES)

    def imported(name):
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    yield imported
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def digits(example, monkeypatch):
    """The module that they share, with few images, in float64, where rounding turns no sign, and
    starts that are always equal."""
    module = example("digits")
    batches, (x, y) = module.batches, module.images()
    monkeypatch.setattr(module, "batches", lambda: itertools.islice(batches(), 3))
    monkeypatch.setattr(module, "images", lambda: (x[:1300].double(), y[:1300]))

    def noise(x):
        generator = torch.Generator().manual_seed(len(x))
        return torch.rand(x.shape, generator=generator, dtype=x.dtype)

    def start(self, x, *_, **__):
        if self.init == "gaussian":
            return x + 0.001 * noise(x)
        return (x + self.eps * (2 * noise(x) - 1)).clamp(0, 1)

    for name in ("rand_like", "randn_like"):
        monkeypatch.setattr(torch, name, noise)
    monkeypatch.setattr(attacks.PGD, "start", start)
    return module


def weights(example, digits, name):
    """(the weights before training, after it) of an example's network."""
    module = example(name)
    torch.manual_seed(0)
    nets = [digits.network(8).double()]
    if name.startswith("rslad"):
        nets.append(digits.network(16).double().eval())
    before = nn.utils.parameters_to_vector(nets[0].parameters()).detach().clone()
    torch.manual_seed(1)
    trained = module.train(*nets, epochs=1)
    return before, nn.utils.parameters_to_vector(trained.parameters()).detach()


@pytest.mark.parametrize("name", PAIRS)
def test_an_example_trains_as_its_original_does(example, digits, name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    before, plain = weights(example, digits, f"{name}_plain")
    also_before, ours = weights(example, digits, name)
    assert torch.equal(before, also_before)
    assert (ours - plain).norm() < 1e-6 * (plain - before).norm()


@pytest.mark.slow
def test_the_compiled_example_trains_as_the_other_does(example, digits):
    before, plain = weights(example, digits, "trades")
    _, compiled = weights(example, digits, "compiled_trades")
    assert (compiled - plain).norm() < 1e-6 * (plain - before).norm()
    torch.compiler.reset()


def test_the_network_of_timm_is_attacked(example, digits):
    pytest.importorskip("timm")
    net = example("timm_trades").network()
    assert net(torch.rand(2, 1, 32, 32)).shape == (2, 10)


def test_an_exported_checkpoint_is_attacked(example, tmp_path, monkeypatch):
    module, path = example("autoattack_eval"), tmp_path / "model.pt"
    net = models.get("digits_net", 10, 1)
    torch.save({"state_dict": net.state_dict()}, path)
    short = lambda *args, **_: compat.AutoAttack(  # noqa: E731
        *args, norm="Linf", eps=0.1, version="custom", attacks_to_run=["apgd-ce"], verbose=False
    )
    monkeypatch.setattr(module, "AutoAttack", short)
    options = ["--model", "digits_net", "--data", "digits", "--images", "16"]
    assert 0 <= module.main([str(path), *options]) <= 0.5


@pytest.mark.parametrize("name", ["autoattack_eval"])
def test_the_evaluation_differs_in_its_import_alone(name):
    ours, plain = ((EXAMPLES / f"{name}{end}.py").read_text() for end in ("", "_plain"))
    changed = {*ours.splitlines()} ^ {*plain.splitlines()}
    assert {line for line in changed if "import" in line} == {
        "from autoattack import AutoAttack",
        "from fastadv.compat import AutoAttack",
    }
    assert len(changed) == 6  # two lines of the docstring too


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for cell in json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    robust = namespace["robust"]  # of the last network, by radius
    assert robust[0] > 0.8 > 0.5 > robust[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trades", "rslad"])
def test_an_example_makes_a_network_robust(example, name):
    module, digits = example(name), example("digits")
    torch.manual_seed(0)
    teachers = [digits.robust_teacher()] if name == "rslad" else []
    clean, robust = digits.accuracy(module.train(digits.network(), *teachers))
    assert clean > 80
    assert robust > 50
