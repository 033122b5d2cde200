"""The engine against torch: every kind of network on every instruction set."""

import copy
import logging
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastadv import _native, attacks, freeze, models
from fastadv import frozen as frozen_module
from fastadv.engine import Unsupported, lower
from fastadv.engine import trunk as trunk_module
from fastadv.features import forward_features
from fastadv.testing import using_isa

pytestmark = pytest.mark.skipif(not _native.isas(), reason="needs the compiled kernels")


class Plain(nn.Module):
    """What the networks of `models` do not have: bias, no BatchNorm, odd kernels and sizes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 33, (5, 2), stride=(2, 3), padding=(3, 1), dilation=(1, 2)),
            nn.ReLU6(),
            nn.Conv2d(33, 7, 3, padding=2, dilation=2, bias=False),
            nn.Identity(),
            nn.BatchNorm2d(7, affine=False),
            nn.SiLU(),
            nn.Conv2d(7, 7, 2, groups=7),
            nn.ReLU(),
            nn.Dropout(),
            nn.AvgPool2d((2, 1), stride=1),
            nn.AdaptiveAvgPool2d((3, 2)),
        )
        self.classifier = nn.Linear(7 * 6, 4)

    def forward(self, x):
        x = self.body(F.pad((x - 0.5) / 0.25 * 2, (1, 0, 2, 0)))
        return self.classifier(torch.flatten(x, 1))


class Sums(nn.Module):
    """Residuals of every kind: of sums, of activations, of what was convolved before."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        a = self.stem(x)
        b = F.relu(self.norms[0](a))
        c = self.convs[1](b) + self.convs[0](b)  # the later operand takes the earlier one
        d = self.norms[1](c)  # read without an activation
        e = torch.relu(self.norms[2](self.convs[2](d)).add(c))
        f = e + self.convs[3](e)
        return self.fc(self.convs[4](f).mean((2, 3)))


NETWORKS = {
    "resnet18": lambda: models.get("resnet18", width=20),
    "preact_resnet18": lambda: models.get("preact_resnet18", width=9),
    "mobilenet_v2": lambda: models.get("mobilenet_v2", width=6),
    "wrn": lambda: models.get("wrn10_2"),
    "wrn_silu": lambda: models.get("wrn10_1_silu"),
    "dm_wrn": lambda: models.get("dm_wrn10_1"),
    "digits_net": lambda: models.get("digits_net", in_channels=3),
    "normalized": lambda: models.Normalized(
        models.get("digits_net", in_channels=3),
        torch.tensor([0.4, 0.5, 0.6]),
        torch.full((3,), 0.2),
    ),
    "plain": Plain,
    "sums": Sums,
}


@pytest.fixture(params=_native.isas())
def isa(request):
    with using_isa(request.param):
        yield


def network(name):
    """A network whose BatchNorms have seen images and are not neutral."""
    torch.manual_seed(0)
    net = NETWORKS[name]()
    for _ in range(2):
        net.train()(torch.rand(16, 3, 8, 8))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return net.eval()


def results(model, x, weight):
    """(logits, gradient of their weighted sum)."""
    x = x.detach().clone().requires_grad_()
    logits = model(x)
    (grad,) = torch.autograd.grad((logits * weight).sum(), x)
    return logits.detach(), grad


def twin(net, dtype=torch.float32):
    """A Frozen whose trunk computes in `dtype` on any machine."""
    frozen = freeze(net, dtype)
    frozen.trunk, head = lower(frozen.net, dtype)
    frozen._head = [head]
    return frozen


def error(found, expected):
    return (found.double() - expected).norm() / expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_torch(name, dtype, isa):
    """Logits and input gradient are no farther from float64 than twice torch's own."""
    net = network(name)
    x, weight = torch.rand(17, 3, 8, 8), torch.randn(17, 1)
    exact = results(copy.deepcopy(net).double(), x.double(), weight.double())
    low = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with low:
        plain = results(net, x, weight)
    ours = results(twin(net, dtype), x, weight)
    for found, theirs, expected in zip(ours, plain, exact, strict=True):
        assert found.dtype == torch.float32
        assert error(found, expected) <= 2 * error(theirs, expected) + 1e-6
    assert error(ours[0], exact[0]) > 0  # it is not the float64 network that ran


@pytest.mark.parametrize("name", ["resnet18", "plain"])
def test_an_image_does_not_depend_on_its_batch_layout_or_threads(name, isa):
    net = twin(network(name), torch.bfloat16).trunk
    x = torch.rand(35, 3, 8, 8)
    weight = torch.randn(net(x).shape)
    features, grad = results(net, x, weight)
    for part in (slice(0, 1), slice(5, 21), slice(16, 35)):
        some = results(net, x[part], weight[part])
        assert torch.equal(some[0], features[part])
        assert torch.equal(some[1], grad[part])
    for other in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        same = results(net, other, weight)
        assert torch.equal(same[0], features)
        assert torch.equal(same[1], grad)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(results(net, x, weight)[1], grad)
    finally:
        torch.set_num_threads(threads)


def test_the_gradient_has_the_layout_of_the_images():
    net, x = twin(network("resnet18")), torch.rand(4, 3, 8, 8)
    x = x.contiguous(memory_format=torch.channels_last)
    assert results(net, x, torch.ones(1))[1].stride() == x.stride()


def test_writes_nothing_outside_and_reads_nothing_unwritten(monkeypatch, isa):
    """Blocks between sentinels, filled with NaN before use."""
    guarded = []

    def take(self, shape, dtype):
        size, guard = torch.Size(shape).numel(), 64
        memory = torch.full((size + 2 * guard,), 77, dtype=dtype)
        guarded.append((memory, size, guard))
        inside = memory[guard : guard + size].view(shape)
        return inside.fill_(float("nan") if dtype.is_floating_point else -1)

    net, x, weight = network("sums"), torch.rand(18, 3, 8, 8), torch.randn(18, 4)
    expected = results(twin(net), x, weight)
    monkeypatch.setattr(trunk_module.Memory, "take", take)
    found = results(twin(net), x, weight)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert guarded
    for memory, size, guard in guarded:
        assert (memory[:guard] == 77).all()
        assert (memory[guard + size :] == 77).all()


def test_nan_stays_with_its_image(isa):
    net, x = twin(network("mobilenet_v2")), torch.rand(18, 3, 8, 8)
    clean = net(x)
    x[3, 1, 2, 2] = float("nan")
    logits = net(x)
    assert logits[3].isnan().all()
    assert torch.equal(logits[4:], clean[4:])
    assert torch.equal(logits[:3], clean[:3])


def test_follows_the_model_at_each_refresh():
    model = network("resnet18")
    frozen, x = twin(model), torch.rand(4, 3, 8, 8)
    assert error(frozen(x), model(x).detach().double()) < 1e-5
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    model.train()(x).square().mean().backward()
    optimizer.step()  # moves weights and BatchNorm's statistics
    model.eval()
    assert error(frozen(x), model(x).detach().double()) > 1e-3
    frozen.refresh()
    assert error(frozen(x), model(x).detach().double()) < 1e-5
    model.conv1.weight.data.mul_(0.5)
    model.bn1.running_mean = model.bn1.running_mean + 1
    pgd = attacks.PGD(steps=0, init="zero")
    pgd(frozen, x, torch.zeros(4, dtype=torch.int64))  # an attack refreshes
    assert error(frozen(x), model(x).detach().double()) < 1e-5


def test_passes_that_overlap_keep_their_own_slopes():
    """Two forward passes before two backward passes; one graph walked twice."""
    net, weight = twin(network("wrn_silu")), torch.randn(2, 10)
    one, two = torch.rand(2, 2, 3, 8, 8)
    expected = [results(net, x, weight)[1] for x in (one, two)]
    leaves = [x.clone().requires_grad_() for x in (one, two)]
    sums = [(net(x) * weight).sum() for x in leaves]
    for leaf, total, grad in zip(leaves, sums, expected, strict=True):
        for _ in range(2):
            assert torch.equal(torch.autograd.grad(total, leaf, retain_graph=True)[0], grad)


def test_threads_share_a_twin():
    net, weight = twin(network("resnet18")), torch.randn(4, 10)
    inputs = torch.rand(6, 4, 3, 8, 8)
    expected = [results(net, x, weight)[1] for x in inputs]
    found = [None] * len(inputs)

    def work(i):
        for _ in range(5):
            found[i] = results(net, inputs[i], weight)[1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_features_by_name_and_other_types_come_from_the_modules():
    model = network("resnet18")
    frozen, x = twin(model), torch.rand(2, 3, 8, 8)
    logits, features = forward_features(frozen, x, ("layer2", "penultimate"))
    assert features["layer2"].shape == (2, 40, 4, 4)
    assert torch.equal(logits, model(x))
    assert frozen(torch.rand(0, 3, 8, 8)).shape == (0, 10)
    double = copy.deepcopy(model).double()
    frozen = freeze(double)
    frozen.refresh()
    assert torch.equal(frozen.net(x.double()), double(x.double()))


class Branching(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.other = kind, nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.conv(x)
        if self.kind == "python" and x.sum() > 0:
            return x
        if self.kind == "between":
            x = F.max_pool2d(x, 2)
        if self.kind == "two paths":
            return self.other(x).mean((2, 3)) + x.mean((2, 3))
        return self.other(x).mean((2, 3))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("python", "cannot trace it"),
        ("between", "max_pool2d is not known to the engine"),
        ("two paths", "does not end in one path"),
    ],
)
def test_what_it_cannot_express_runs_as_modules_and_is_said_once(kind, message, caplog):
    frozen_module._say.cache_clear()
    model = Branching(kind).eval()
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
        assert sum(stage.conv is not None for stage in trunk.stages) == convolutions


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


def same(net, x):
    return x


def own_tensor(net, x):
    return x + torch.ones(8)


# (network, whether the engine takes it)
TRICKY = {
    "added in place": (Tricky(added_in_place), False),
    "activated in place": (Tricky(activated_in_place), False),
    "image in place": (Tricky(same, image_in_place), False),
    "statement in place": (Tricky(same, statement_in_place), False),
    "dropout before the norm": (
        Tricky(lambda net, x: net.second(F.relu(net.norm(net.dropout(x)))) + x),
        False,
    ),
    "dropout as a function": (
        Tricky(lambda net, x: net.second(F.relu(net.norm(F.dropout(x, training=False)))) + x),
        False,
    ),
    "identity before ReLU": (Tricky(lambda net, x: net.second(F.relu(net.identity(x))) + x), False),
    "residual by its identity": (
        Tricky(lambda net, x: (lambda y: net.second(y) + y)(net.identity(net.norm(x)))),
        True,
    ),
    "times two": (Tricky(lambda net, x: net.second(x).add(x, alpha=2)), False),
    "with a mean": (Tricky(lambda net, x: net.second(x) + F.adaptive_avg_pool2d(x, 1)), False),
    "of two sizes": (
        Tricky(lambda net, x: net.second(x) + net.second(F.adaptive_avg_pool2d(x, 1))),
        True,
    ),
    "subtracted": (Tricky(lambda net, x: net.second(x) - x), False),
    "a third": (Tricky(lambda net, x: net.second(x) + x + net.norm(x)), False),
    "activated twice": (Tricky(lambda net, x: F.relu(F.silu(x)) + x), False),
    "itself": (Tricky(lambda net, x: x + x), False),
    "shared": (Tricky(lambda net, x: net.norm(net.second(net.norm(net.second(x))))), True),
    "pooled by keyword": (Tricky(lambda net, x: F.avg_pool2d(x, kernel_size=2)), False),
    "pooled with a border": (Tricky(lambda net, x: F.avg_pool2d(x, 3, 1, 1)), False),
    "pooled by a list": (Tricky(lambda net, x: F.avg_pool2d(x, [2])), True),
    "pooled by size": (Tricky(lambda net, x: F.avg_pool2d(x, x.shape[-1] // 4)), False),
    "called by keyword": (Tricky(lambda net, x: net.second(input=x)), False),
    "statistics of the batch": (Tricky(lambda net, x: net.batch_norm(x)), False),
    "padded with zeros": (Tricky(lambda net, x: F.pad(x, (1, 0, 2, 1))), True),
    "padded with ones": (Tricky(lambda net, x: F.pad(x, (1, 1, 1, 1), value=1.0)), False),
    "reflected": (Tricky(lambda net, x: F.pad(x, (1, 1, 1, 1), mode="reflect")), False),
    "cropped": (Tricky(lambda net, x: F.pad(x, (-1, 0, 0, 0))), False),
    "dropped out": (Tricky(lambda net, x: F.dropout(x, 0.5, net.training)), True),
    "circular": (Tricky(same, padding_mode="circular"), False),
    "same": (Tricky(same, padding="same"), False),
    "two groups": (Tricky(same, groups=2), False),
    "minus an image": (Tricky(same, lambda net, x: x - net.image), False),
    "minus a row": (Tricky(same, lambda net, x: x - net.row), False),
    "minus a mean": (Tricky(same, lambda net, x: (x - net.mean) / net.variance + 0.1), True),
    "by a double": (Tricky(same, lambda net, x: x * net.factor), True),
    "by an expression": (Tricky(same, lambda net, x: x / (net.variance + 0.1).sqrt()), False),
    "a tensor of its own": (Tricky(same, own_tensor), False),
    "the other way": (Tricky(same, lambda net, x: 1 - x), False),
    "image twice": (Tricky(same, lambda net, x: x + x), False),
    "viewed": (Tricky(same, None, lambda net, x: x.view(x.size(0), -1)), True),
    "centred": (Tricky(same, None, lambda net, x: x.flatten(1) - net.factor.float()), True),
}


@pytest.mark.parametrize("name", TRICKY)
def test_nothing_is_lowered_wrongly(name):
    """With a trunk or without, the numbers are the model's, also after its buffers changed."""
    net, taken = TRICKY[name]
    net = copy.deepcopy(net).eval()
    for value in (net.norm.running_mean, net.norm.running_var, net.norm.weight, net.norm.bias):
        nn.init.uniform_(value, 0.3, 2)
    frozen = freeze(net)
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
    assert frozen.trunk is None or name != "of two sizes"  # which only shows in use


def test_what_waits_for_a_module_gets_it():
    frozen, x = freeze(network("resnet18")), torch.rand(2, 3, 8, 8)
    calls = []
    hook = frozen.net.layer1.register_full_backward_hook(lambda *_: calls.append(1))
    results(frozen, x, torch.ones(1))
    assert calls == [1]
    hook.remove()
    assert freeze(network("resnet18")).trunk is not None
    patched = network("resnet18")
    patched.conv1.forward = lambda v: nn.functional.conv2d(v, patched.conv1.weight, padding=1) + 1
    assert freeze(patched).trunk is None


def test_inputs_of_every_kind():
    net = network("resnet18")
    frozen, x, weight = freeze(net), torch.rand(32, 3, 8, 8), torch.randn(1)
    expected = results(frozen, x[::16].clone(), weight)[1]
    assert torch.equal(results(frozen, x[::16], weight)[1], expected)
    wide = torch.rand(1, 1, 8, 8).expand(4, 3, 8, 8)
    assert same_numbers(results(frozen, wide, weight), results(net, wide, weight))
    results(frozen, x[:1].as_strided((1, 3, 8, 8), (9999, 64, 8, 1)), weight)
    assert same_numbers(results(frozen, x, weight), results(net, x, weight))
    negative = torch._neg_view(x)
    assert same_numbers(results(frozen, negative, weight), results(net, -x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(frozen(x), frozen(x))
    assert torch.equal(copy.deepcopy(frozen)(x), frozen(x))
    with pytest.raises(RuntimeError, match=r"\[2, 1, 8, 8\] to have 3 channels"):
        frozen(torch.rand(2, 1, 8, 8))


def same_numbers(found, expected):
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


def test_a_backward_pass_needs_the_weights_of_its_forward_pass():
    frozen, x = freeze(network("resnet18")), torch.rand(2, 3, 8, 8, requires_grad=True)
    logits = frozen(x)
    frozen.refresh()
    with pytest.raises(RuntimeError, match="refreshed between this forward pass and its backward"):
        logits.sum().backward()


def test_memory_is_that_of_the_latest_images():
    frozen = freeze(network("resnet18"))
    for size in (8, 12, 16):
        results(frozen, torch.rand(16, 3, size, size), torch.ones(1))
    held = frozen.trunk.plan.memory.tensors
    assert {shape[1] for shape, _ in held} == {256, 64, 16, 4, 1}


def test_errors_name_the_images():
    trunk = twin(network("resnet18")).trunk
    with pytest.raises(ValueError, match=r"x has shape \(2, 1, 8, 8\), must be \[B, 3, H, W\]"):
        trunk(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match="x is 1 x 8, too small"):
        freeze(Branching("").eval())(torch.rand(2, 3, 1, 8))
