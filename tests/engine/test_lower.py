"""What the engine takes of a network, what it leaves to torch, and that neither is misread."""

import copy
import functools
import logging
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Branching, network, results, twin
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from fastadv import freeze, models
from fastadv.engine import frozen as frozen_module
from fastadv.engine.folded import Folded
from fastadv.engine.lower import lower
from fastadv.engine.mixed import Mixed
from fastadv.engine.plan import Unsupported
from fastadv.engine.trunk import Trunk
from fastadv.ops import _native

pytestmark = pytest.mark.skipif(not _native.isas(), reason="needs the compiled kernels")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branching("python"), "cannot trace it"),
        (Branching("strides"), "stride depends on the memory layout"),
        (nn.Sequential(nn.Flatten(), nn.Linear(243, 4)), "no convolution that the engine knows"),
    ],
)
def test_what_it_cannot_express_runs_as_modules_and_is_said_once(model, message, caplog):
    frozen_module._say.cache_clear()
    model = model.eval()
    with pytest.raises(Unsupported, match=message):
        lower(model, torch.float32)
    with caplog.at_level(logging.WARNING, "fastadv"):
        frozen, x = freeze(freeze(model)), torch.rand(2, 3, 9, 9)
        assert frozen.trunk is None
        assert torch.equal(frozen(x), model(x))
        frozen(x)
    assert len([r for r in caplog.records if "runs as plain torch" in r.message]) == 1


def test_every_convolutional_network_but_the_option_a_ones_has_a_trunk():
    for name in ("resnet34", "resnet56_b", "wrn28_10", "dm_wrn28_10", "mobilenet_v2"):
        with torch.device("meta"):
            net = models.get(name)
        trunk, _ = lower(net.eval(), torch.float32)
        convolutions = sum(isinstance(m, nn.Conv2d) for m in net.modules())
        assert sum(layer.conv is not None for layer in trunk.plan) == convolutions


def test_the_rest_of_a_network_is_the_head_if_it_is_one_layer():
    """In float32; of several linear layers the segments' dtype is that of all."""
    x = torch.rand(2, 3, 8, 8)
    for name, head in (("resnet20", [torch.float32]), ("gated", [torch.bfloat16] * 2)):
        net = network(name)
        trunk, rest = lower(net, torch.bfloat16)
        assert isinstance(trunk, Mixed)
        assert isinstance(rest, nn.Identity) == (name == "gated")
        linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
        seen = []
        for module in linear:
            module.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1].dtype))
        rest(trunk(x))
        assert seen == head


class Tricky(nn.Module):
    """A convolution, something easily misread, another convolution."""

    def __init__(self, between, before=None, after=None, **conv):
        super().__init__()
        self.between, self.before, self.after = between, before, after
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, **({"padding": 1} | conv))
        self.norm = nn.BatchNorm2d(4)
        self.batch_norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.identity, self.dropout = nn.Identity(), nn.Dropout()
        self.inplace = nn.ReLU(inplace=True)
        self.register_buffer("image", torch.rand(3, 8, 8))
        self.register_buffer("row", torch.rand(8))
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.register_buffer("variance", torch.rand(3, 1, 1))
        self.register_buffer("counter", torch.zeros(()))
        self.register_buffer("factor", torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        x = self.first(x if self.before is None else self.before(self, x))
        x = self.second(self.between(self, x))
        return x.mean((2, 3)) if self.after is None else self.after(self, x)


def added_in_place(net, x):
    y = net.second(x)
    kept = y
    y += x
    return F.relu(kept) + net.second(y)


def image_in_place(net, x):
    y = x * 1.0
    kept = y
    y += 0.5
    return kept


def statement_in_place(net, x):
    x = x * 1.0
    x.add_(0.5)
    return x


def activated_in_place(net, x):
    y = net.norm(x)
    return net.second(net.inplace(y)) + y


def autocast(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        return net.second(x).float()


def view_in_place(net, x):
    y = F.elu(x)
    y.flatten(1).relu_()
    return net.second(y)


def part_overwritten(net, x):
    y = F.elu(net.second(x))
    y[:, 1] = 0
    return y


def buffer_in_place(net, x):
    net.counter.add_(1)
    return F.elu(x) * net.counter


def alias_in_place(net, x):
    y = net.norm(x)
    z = net.identity(y)
    z.mul_(2)
    return net.second(y)


def pool_in_place(net, x):
    z = F.avg_pool2d(x, 1).mul_(2)
    return F.elu(x) + z


def power_in_place(net, x):
    k = y = F.elu(x)
    y **= 2
    return k


def without_gradient(net, x):
    with torch.no_grad():
        gate = net.second(x)
    return F.elu(x) * gate


def view_as_another(net, x):
    return F.elu(x).view_as(x)


def normalised(net, x, *, swapped=False, eps=1e-5):
    """As subclasses of BatchNorm2d do it, but for what is asked for."""
    norm = net.norm
    weight, bias = (norm.bias, norm.weight) if swapped else (norm.weight, norm.bias)
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, weight, bias, norm.training, eps=eps
    )


def norm_in_place(net, x):
    y = normalised(net, F.elu(x))
    return net.inplace(net.identity(y)) + y


def asserted(net, x):
    """As timm's subclass of BatchNorm2d does it."""
    torch._assert(x.ndim == 4, f"has {x.ndim} dimensions")
    return F.relu(normalised(net, x))


def same(net, x):
    return x


def own_tensor(net, x):
    return x + torch.ones(8)


# (network, whether the engine computes any of it)
TRICKY = {
    "added in place": (Tricky(added_in_place), False),
    "autocast": (Tricky(autocast), False),
    "activated in place": (Tricky(activated_in_place), False),
    "image in place": (Tricky(same, image_in_place), False),
    "view in place": (Tricky(view_in_place), False),
    "part overwritten": (Tricky(part_overwritten), False),
    "buffer in place": (Tricky(buffer_in_place), False),
    "alias in place": (Tricky(alias_in_place), False),
    "pool in place": (Tricky(pool_in_place), False),
    "power in place": (Tricky(power_in_place), False),
    "without gradient": (Tricky(without_gradient), False),
    "pooled and viewed": (
        Tricky(same, None, lambda net, x: F.max_pool2d(x, 2).view(x.size(0), -1)),
        True,
    ),
    "viewed behind torch": (
        Tricky(lambda net, x: F.elu(x), None, lambda net, x: x.view(x.size(0), -1)),
        True,
    ),
    "view as another": (Tricky(view_as_another), True),
    "statement in place": (Tricky(same, statement_in_place), False),
    "dropout before the norm": (
        Tricky(lambda net, x: net.second(F.relu(net.norm(net.dropout(x)))) + x),
        True,
    ),
    "dropout as a function": (
        Tricky(lambda net, x: net.second(F.relu(net.norm(F.dropout(x, training=False)))) + x),
        True,
    ),
    "identity before ReLU": (Tricky(lambda net, x: net.second(F.relu(net.identity(x))) + x), True),
    "residual by its identity": (
        Tricky(lambda net, x: (lambda y: net.second(y) + y)(net.identity(net.norm(x)))),
        True,
    ),
    "times two": (Tricky(lambda net, x: net.second(x).add(x, alpha=2)), True),
    "with a mean": (Tricky(lambda net, x: net.second(x) + F.adaptive_avg_pool2d(x, 1)), True),
    "of two sizes": (
        Tricky(lambda net, x: net.second(x) + net.second(F.adaptive_avg_pool2d(x, 1))),
        True,
    ),
    "subtracted": (Tricky(lambda net, x: net.second(x) - x), True),
    "a third": (Tricky(lambda net, x: net.second(x) + x + net.norm(x)), True),
    "activated twice": (Tricky(lambda net, x: F.relu(F.silu(x)) + x), True),
    "itself": (Tricky(lambda net, x: x + x), True),
    "shared": (Tricky(lambda net, x: net.norm(net.second(net.norm(net.second(x))))), True),
    "pooled by keyword": (Tricky(lambda net, x: F.avg_pool2d(x, kernel_size=2)), True),
    "pooled with a border": (Tricky(lambda net, x: F.avg_pool2d(x, 3, 1, 1)), True),
    "pooled by a list": (Tricky(lambda net, x: F.avg_pool2d(x, [2])), True),
    "pooled by size": (Tricky(lambda net, x: F.avg_pool2d(x, x.shape[-1] // 4)), True),
    "called by keyword": (Tricky(lambda net, x: net.second(input=x)), True),
    "statistics of the batch": (Tricky(lambda net, x: net.batch_norm(x)), True),
    "padded with zeros": (Tricky(lambda net, x: F.pad(x, (1, 0, 2, 1))), True),
    "padded with ones": (Tricky(lambda net, x: F.pad(x, (1, 1, 1, 1), value=1.0)), True),
    "reflected": (Tricky(lambda net, x: F.pad(x, (1, 1, 1, 1), mode="reflect")), True),
    "cropped": (Tricky(lambda net, x: F.pad(x, (-1, 0, 0, 0))), True),
    "dropped out": (Tricky(lambda net, x: F.dropout(x, 0.5, net.training)), True),
    "circular": (Tricky(same, padding_mode="circular"), True),
    "same": (Tricky(same, padding="same"), True),
    "two groups": (Tricky(same, groups=2), True),
    "minus an image": (Tricky(same, lambda net, x: x - net.image), True),
    "minus a row": (Tricky(same, lambda net, x: x - net.row), True),
    "minus a mean": (Tricky(same, lambda net, x: (x - net.mean) / net.variance + 0.1), True),
    "by a double": (Tricky(same, lambda net, x: x * net.factor), True),
    "by an expression": (Tricky(same, lambda net, x: x / (net.variance + 0.1).sqrt()), True),
    "a tensor of its own": (Tricky(same, own_tensor), False),
    "the other way": (Tricky(same, lambda net, x: 1 - x), True),
    "image twice": (Tricky(same, lambda net, x: x + x), True),
    "viewed": (Tricky(same, None, lambda net, x: x.view(x.size(0), -1)), True),
    "in vain": (Tricky(lambda net, x: (net.second(F.elu(x)), x)[1]), True),
    "norm's function": (Tricky(lambda net, x: F.relu(normalised(net, net.second(x)))), True),
    "norm's function, swapped": (Tricky(lambda net, x: normalised(net, x, swapped=True)), True),
    "norm's function, other eps": (Tricky(lambda net, x: normalised(net, x, eps=0.5)), True),
    "norm of torch's in place": (
        Tricky(lambda net, x: net.inplace(net.identity(normalised(net, F.elu(x))))),
        True,
    ),
    "sum in place": (Tricky(lambda net, x: net.inplace(net.identity(F.elu(x) + x))), True),
    "norm in place, read twice": (Tricky(norm_in_place), False),
    "dimensions": (Tricky(lambda net, x: asserted(net, x) * x.ndim), True),
    "centred": (Tricky(same, None, lambda net, x: x.flatten(1) - net.factor.float()), True),
}


@pytest.mark.parametrize("executor", [Trunk, Folded])
@pytest.mark.parametrize("name", TRICKY)
def test_nothing_is_lowered_wrongly(name, executor):
    """With a trunk or without, the numbers are the model's, also after its buffers changed."""
    net, taken = TRICKY[name]
    net = copy.deepcopy(net).eval()
    for value in (net.norm.running_mean, net.norm.running_var, net.norm.weight, net.norm.bias):
        nn.init.uniform_(value, 0.3, 2)
    frozen = twin(net, executor=executor) if taken else freeze(net)
    assert (frozen.trunk is not None) == taken
    for batch in (3, 17):
        x = torch.rand(batch, 3, 8, 8)
        weight = torch.randn(1)
        expected = results(net, x.clone(), weight)
        for found, wanted in zip(results(frozen, x, weight), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.mul_(0.7)
        frozen.refresh()
    if (name, executor) == ("of two sizes", Trunk):
        assert frozen.trunk is None  # which only shows in use


def test_a_subclass_of_batch_norm_is_as_good_as_batch_norm():
    """One segment has all, with the norm in the convolution: no assertion reads between the two."""
    trunk, _ = lower(Tricky(asserted, after=asserted).eval(), torch.float32)
    assert not isinstance(trunk, Mixed)
    assert [layer.norm is None for layer in trunk.plan] == [False, False, True]  # the exit last
    assert not any(layer.affine for layer in trunk.plan)


class Optional(Tricky):
    """Has further arguments, which nobody gives; fx would make unknown tensors of them. One has the
    name of the head's own."""

    def forward(self, x, features=None, factor=2.0, *rest, gate=None, **named):
        for other in (features, gate, named.get("mask"), *rest):
            x = x if other is None else x * other
        return super().forward(x * factor if factor > 1 else x)


class Settled(Tricky):
    """Sets an attribute to what it is."""

    def forward(self, x):
        self.factor_of_images = 0.5**3
        return super().forward(x * self.factor_of_images)


class Listing(Tricky):
    """Depends on how often it was called, by an item of a list."""

    def __init__(self, between):
        super().__init__(between)
        self.calls = [0]

    def forward(self, x):
        self.calls[0] += 1
        return super().forward(x) * self.calls[0]


class Filling(Tricky):
    """Keeps a feature in a dictionary."""

    def __init__(self, between):
        super().__init__(between)
        self.kept = {}

    def forward(self, x):
        self.kept["first"] = self.first(x)
        return super().forward(x)


class Counting(Tricky):
    """Depends on how often it was called."""

    def forward(self, x):
        self.counter += 1
        return super().forward(x) * self.counter


class Keeping(Tricky):
    """Keeps its image, as those do whose features are read afterwards."""

    def forward(self, x):
        self.seen = x
        return super().forward(self.seen)


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        (Optional, True),
        (Settled, True),
        (Listing, False),
        (Filling, False),
        (Counting, False),
        (Keeping, False),
    ],
)
def test_what_a_forward_takes_and_keeps_beside_the_image(kind, taken):
    net, x = kind(same).eval(), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        net(x)
    frozen = freeze(net)
    assert (frozen.trunk is not None) == taken
    for _ in range(2):
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-5)
    assert kind is not Keeping or frozen.net.seen is x


class Named(nn.Module):
    """A convolution, and around it modules whose names a torch.fx.GraphModule has for itself."""

    def __init__(self, name):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.names = [name + end for end in ("", "_0")]
        for named in self.names:
            self.add_module(named, nn.ELU())

    def forward(self, x):
        before, after = (self.get_submodule(name) for name in self.names)
        return after(self.conv(before(x))).flatten(1)


@pytest.mark.parametrize("name", ["graph", "code", "meta", "recompile", "fastadv_segments", "elu"])
@pytest.mark.parametrize("which", [0, 1])
def test_names_of_modules_stay_apart_from_those_of_graphs(name, which):
    net, x = Named(name).eval(), torch.rand(2, 3, 8, 8)
    if which:
        net.names.reverse()
    frozen = freeze(net)
    assert (frozen.trunk is None) == (name != "elu")
    torch.testing.assert_close(frozen(x), net(x))


def out_of_an_argument(net, x):
    return torch.mul(x, 2.0, out=torch.empty_like(x))


def into_a_buffer(net, x):
    return torch.mul(net.image.mean(), 2.0, out=net.counter) * x


@pytest.mark.parametrize("written", [out_of_an_argument, into_a_buffer])
def test_what_is_written_to_an_argument_is_written(written):
    for where in range(3):
        steps = [lambda _, x: F.elu(x)] * 3
        steps[where] = written
        before, between, after = steps
        net = Tricky(between, before, lambda net, x, f=after: f(net, x).mean((2, 3))).eval()
        frozen, x = freeze(net), torch.rand(2, 3, 8, 8)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(frozen(x), net(x))


@pytest.mark.parametrize("executor", [Trunk, Folded])
def test_images_of_other_shapes_are_the_models_to_judge(executor):
    """No image at all, one without a batch, and one channel that the normalisation makes three."""
    net = Tricky(lambda _, x: F.elu(x), lambda net, x: x - net.mean, lambda _, x: x.mean((-2, -1)))
    for shape in ((0, 3, 8, 8), (3, 8, 8), (2, 1, 8, 8)):
        x, frozen = torch.rand(shape), twin(net.eval(), executor=executor)
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-5)
    with pytest.raises((RuntimeError, ValueError)):
        frozen(torch.rand(2, 4, 8, 8))


def test_what_waits_for_a_module_gets_it():
    frozen, x = freeze(network("resnet18")), torch.rand(2, 3, 8, 8)
    calls = []
    hook = frozen.net.layer1.register_full_backward_hook(lambda *_: calls.append(1))
    results(frozen, x, torch.ones(1))
    assert calls == [1]
    hook.remove()
    assert freeze(network("resnet18")).trunk is not None
    hook = register_module_forward_hook(lambda module, *_: calls.append(module))
    frozen(x)
    hook.remove()
    assert frozen.net.layer1 in calls
    patched = network("resnet18")
    patched.conv1.forward = lambda v: nn.functional.conv2d(v, patched.conv1.weight, padding=1) + 1
    assert freeze(patched).trunk is None


class Random(nn.Module):
    """A network behind noise whose size a generator draws, other than on torch's tensors."""

    def __init__(self, draw):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(576, 4))
        self.draw = draw

    def forward(self, x):
        return self.net(x * (1 + self.draw()))


DRAWN = np.random.default_rng(0)


def drawn():
    return sum(DRAWN.random() for _ in range(2))


def by_default(generator=DRAWN):
    return generator.random()


class Drawing:
    """What draws by what its class names."""

    draw = staticmethod(lambda: DRAWN.random())

    def __call__(self):
        return self.twice

    @property
    def twice(self):
        return 2 * self.draw()


def of_torch():
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.rand((), generator=generator).item()


@functools.lru_cache(0)
def cached():
    return DRAWN.random()


THIS = sys.modules[__name__]


def of_a_module():
    return THIS.DRAWN.random()


@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        lambda: np.random.random(),  # noqa: NPY002
        lambda: torch.rand(()).item(),
        random.Random(0).random,
        np.random.default_rng(0).random,
        np.random.RandomState(0).random_sample,
        of_torch(),
        lambda: drawn(),
        lambda: by_default(),
        functools.partial(lambda g: g.random(), np.random.default_rng(0)),
        Drawing(),
        Drawing.draw,
        lambda: cached(),
        lambda: of_a_module(),
    ],
    ids=[
        *("python", "numpy", "torch", "Random", "Generator", "RandomState", "of_torch"),
        *("name", "default", "partial", "property", "staticmethod", "cached", "module"),
    ],
)
def test_numbers_drawn_in_a_forward_stay_random(draw):
    x, frozen = torch.rand(2, 3, 8, 8), freeze(Random(draw).eval())
    assert frozen.trunk is None
    assert not torch.equal(frozen(x), frozen(x))


def test_a_traced_network_is_traced_again():
    """The code that torch.fx makes has no module."""
    net = network("resnet18")
    traced, x = torch.fx.symbolic_trace(net), torch.rand(2, 3, 8, 8)
    assert freeze(traced).trunk is not None
    torch.testing.assert_close(freeze(traced)(x), net(x))
