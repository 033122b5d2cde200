"""The engine against torch: every kind of network on every instruction set."""

import copy
import threading

import pytest
import torch
from networks import NETWORKS, Branching, error, network, results, twin
from torch import nn

from fastadv import attacks, freeze
from fastadv.engine import workspace
from fastadv.engine.features import forward_features
from fastadv.ops import _native
from fastadv.testing import using_isa

pytestmark = pytest.mark.skipif(not _native.isas(), reason="needs the compiled kernels")


@pytest.fixture(params=_native.isas())
def isa(request):
    with using_isa(request.param):
        yield


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
    ends = (0, 1), (3, 8), (1, 10), (0, 13), (5, 21), (2, 26), (4, 35), (16, 35)
    for part in (slice(*pair) for pair in ends):
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
    monkeypatch.setattr(workspace.Memory, "take", take)
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


@pytest.mark.parametrize("sizes", [(8, 8), (8, 12)])
def test_threads_share_a_twin(sizes):
    net, weight = twin(network("resnet18")), torch.randn(4, 10)
    inputs = [torch.rand(4, 3, size, size) for size in sizes * 3]
    expected = [results(net, x, weight)[1] for x in inputs]
    net.refresh()  # so that the threads fold
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


def test_a_gradient_with_the_negative_bit_is_negated():
    net = twin(nn.Sequential(nn.Conv2d(3, 32, 5), nn.Flatten()).eval())
    x, weight = torch.rand(2, 3, 5, 5, requires_grad=True), torch.randn(2, 32)
    plain, negative = (
        torch.autograd.grad(net(x), x, gradient)[0]
        for gradient in (weight, torch._neg_view(weight))
    )
    assert torch.equal(negative, -plain)


def test_the_default_device_is_not_the_twins():
    net, x = twin(network("gated")), torch.rand(2, 3, 8, 8)
    expected = results(net, x, torch.ones(1))
    with torch.device("meta"):
        found = net(x.requires_grad_())
        (grad,) = torch.autograd.grad(found, x, torch.ones_like(found, device="cpu"))
    assert torch.equal(found, expected[0])
    assert torch.equal(grad, expected[1])


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
    frozen = twin(network("resnet18"))
    for size in (8, 12, 16):
        results(frozen, torch.rand(16, 3, size, size), torch.ones(1))
    held = frozen.trunk.workspace.memory.tensors
    assert {shape[1] for shape, _ in held} == {256, 64, 16, 4, 1}


def test_errors_name_the_images():
    trunk = twin(network("resnet18")).trunk
    with pytest.raises(ValueError, match=r"x has shape \(2, 1, 8, 8\), must be \[B, 3, H, W\]"):
        trunk(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match="x is 1 x 8, too small"):
        twin(Branching("").eval())(torch.rand(2, 3, 1, 8))


def test_pooling_into_windows_of_unequal_size():
    """8 pixels in 3 windows: of 3, 4 and 3, whose means divide by as many."""
    torch.manual_seed(0)
    pooled = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Conv2d(8, 6, 3)
    model = nn.Sequential(*pooled, nn.Flatten(), nn.Linear(6, 5)).eval()
    frozen, x = freeze(model), torch.rand(4, 3, 8, 8, requires_grad=True)
    assert frozen.trunk is not None or not _native.isas()
    for got, wanted in zip(
        *((y := net(x), torch.autograd.grad(y.square().sum(), x)[0]) for net in (frozen, model)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
