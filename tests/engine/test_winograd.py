"""3 x 3 convolutions by Winograd's algorithm: against float64, and where it is chosen."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from networks import network, results, twin
from torch import nn

from fastadv import models
from fastadv.engine import winograd
from fastadv.engine.lower import lower
from fastadv.engine.trunk import Trunk
from fastadv.ops import _native
from fastadv.testing import using_isa

pytestmark = pytest.mark.skipif(not _native.isas(), reason="needs the compiled kernels")

# (channels read, channels written, height, width, images, zeros left, right, top, bottom)
SHAPES = [
    (32, 32, 8, 8, 16, (1, 1, 1, 1)),
    (40, 70, 7, 9, 17, (1, 1, 1, 1)),
    (64, 32, 4, 4, 3, (1, 1, 1, 1)),
    (32, 96, 9, 11, 35, (2, 2, 2, 2)),
    (33, 31, 10, 12, 1, (0, 0, 0, 0)),
    (32, 32, 6, 7, 18, (2, 0, 1, 3)),
    (300, 64, 6, 6, 5, (1, 1, 1, 1)),
]


def chain(into, out, zeros):
    """A convolution that Winograd's algorithm computes, with all that may precede and finish it."""
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, into, 1), nn.BatchNorm2d(into), nn.ReLU()),
        nn.ZeroPad2d(zeros) if len({*zeros}) > 1 else nn.Identity(),
        nn.Conv2d(into, out, 3, padding=zeros[0] if len({*zeros}) == 1 else 0),
        nn.Sequential(nn.BatchNorm2d(out), nn.SiLU(), nn.Conv2d(out, 8, 1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean, 0, 0.2)
    return net.eval()


class Padded(nn.Module):
    def __init__(self, net, zeros):
        super().__init__()
        self.net, self.zeros = net, zeros

    def forward(self, x):
        x = self.net[2](F.pad(self.net[0](x), self.zeros))
        return self.net[4](self.net[3](x))


def computed(trunk):
    """How many layers Winograd's algorithm computed in the last pass."""
    return sum(taps.tilings is not None for taps in trunk.workspace.taps)


def errors(net, x, found):
    """The largest errors of (logits, gradient) from float64, relative to the largest value."""
    weight = torch.linspace(-1, 1, 8)
    exact = results(copy.deepcopy(net).double(), x.double(), weight.double())
    pairs = zip(results(found, x, weight), exact, strict=True)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize(("into", "out", "height", "width", "images", "zeros"), SHAPES)
def test_bfloat16_errs_as_its_sums_do(into, out, height, width, images, zeros, isa, monkeypatch):
    """Of activations rounded to bfloat16 the products are float32's: by Winograd's algorithm a twin
    errs no more than by products of bfloat16, up to what chance makes of few numbers."""
    torch.manual_seed(0)
    net, x = chain(into, out, zeros), torch.rand(images, 3, height, width)
    net, found = Padded(net, zeros) if len({*zeros}) > 1 else net, {}
    monkeypatch.setattr(winograd, "PAYS", dict.fromkeys(winograd.PAYS, 1.0))
    for on in "01":
        monkeypatch.setattr(winograd, "ON", on)
        monkeypatch.setattr(winograd, "takes_bfloat16", lambda: True)
        with using_isa(isa):
            trunk, head = lower(net, torch.bfloat16, Trunk)
            found[on] = errors(net, x, lambda v, t=trunk, h=head: h(t(v)))
        assert computed(trunk) == int(on)
    for by_winograd, by_sums in zip(found["1"], found["0"], strict=True):
        assert by_winograd < 2 * by_sums


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize(("into", "out", "height", "width", "images", "zeros"), SHAPES)
def test_agrees_with_float64(into, out, height, width, images, zeros, isa):
    """To a few times torch's own error; with maps that tiles do not fill, groups that images do not
    fill, and blocks that channels do not fill."""
    net, x = chain(into, out, zeros), torch.rand(images, 3, height, width)
    net = Padded(net, zeros) if len({*zeros}) > 1 else net
    with using_isa(isa):
        made = twin(net, executor=Trunk)
        found = errors(net, x, made)
        assert computed(made.trunk) == 1
    for ours, torchs in zip(found, errors(net, x, net), strict=True):
        assert ours < 4 * torchs + 1e-6


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_whole_networks_stay_close(name):
    net, x = network(name), torch.rand(16, 3, 16, 16)
    weight = torch.randn(16, 1)
    made = twin(net, executor=Trunk)
    (logits, gradient), (exact, exact_gradient) = (
        results(net, x, weight) for net, x in ((made, x), (copy.deepcopy(net).double(), x.double()))
    )
    assert computed(made.trunk) > 5
    assert (logits - exact).norm() < 1e-4 * exact.norm()
    assert (gradient.sign() == exact_gradient.sign()).double().mean() > 0.9998


@pytest.mark.parametrize(
    ("size", "layers"),
    [(32, 13), (16, 10), (8, 7), (4, 4)],  # of ResNet-18, whose maps shrink to a half thrice
)
def test_small_maps_are_summed_directly(size, layers):
    made = twin(models.get("resnet18", width=8).eval(), executor=Trunk)
    made(torch.rand(2, 3, size, size))
    assert computed(made.trunk) == layers


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize(("size", "layers"), [(32, 10), (16, 7), (8, 4), (4, 0)])
def test_bfloat16_is_summed_directly_where_its_products_cost_less(isa, size, layers):
    with using_isa(isa):
        made = twin(models.get("resnet18", width=8).eval(), torch.bfloat16, executor=Trunk)
        made(torch.rand(2, 3, size, size))
        assert computed(made.trunk) == (layers if isa == "avx512_bf16" else 0)


def test_images_of_two_sizes_have_weights_of_their_own():
    """A layer may be computed in one way for the one and in the other for the other."""
    torch.manual_seed(0)  # with other numbers a ReLU may turn, which is no error
    net, weight = models.get("resnet18", width=8).eval(), torch.randn(3, 1)
    made = twin(net, executor=Trunk)
    for sizes in ((32, 4), (32, 8), (8, 32)):
        for size in sizes:
            x = torch.rand(3, 3, size, size)
            pairs = zip(results(made, x, weight), results(net, x, weight), strict=True)
            for found, wanted in pairs:
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.1)
        made.refresh()


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setattr(winograd, "ON", "0")
    made = twin(models.get("resnet18", width=8).eval(), executor=Trunk)
    made(torch.rand(2, 3, 32, 32))
    assert computed(made.trunk) == 0
    environment = os.environ | {"FASTADV_WINOGRAD": "0"}
    command = [sys.executable, "-c", "from fastadv.engine import winograd; print(winograd.ON)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_weights_follow_where_another_instruction_set_computes_in_another_way():
    """As where a twin that was used is loaded on another machine."""
    if not {"avx512_bf16", "avx512"} <= {*_native.isas()}:
        pytest.skip("needs two instruction sets that differ")
    net, x = models.get("resnet18", width=8).eval(), torch.rand(2, 3, 32, 32)
    made = twin(net, torch.bfloat16, executor=Trunk)
    with using_isa("avx512_bf16"), torch.no_grad():
        made(x)
        logits = made(x)
    loaded = copy.deepcopy(made.trunk)
    with using_isa("avx512"), torch.no_grad():
        found = made._head[0](loaded(x))
        assert computed(loaded) == 0
    torch.testing.assert_close(found, logits, rtol=0.05, atol=0.05)
