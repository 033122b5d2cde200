"""The executor of devices other than CPUs against torch, on the CPU."""

import copy
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, error, folded, network, results
from torch import nn

from fastadv import freeze
from fastadv.engine import folded as module
from fastadv.engine.folded import Folded
from fastadv.engine.lower import lower
from fastadv.engine.plan import Unsupported
from fastadv.engine.trunk import Trunk
from fastadv.ops import _library, _native
from fastadv.testing import using_isa

bias_relu = sys.modules["fastadv.ops.bias_relu"]  # the file, whose name the op has too
FUSED = {*NETWORKS} - {"wrn_silu", "dm_wrn"}  # which have ReLUs


def buffers_of(frozen):
    return dict(frozen.trunk.named_buffers())


@pytest.fixture
def fuse(monkeypatch):
    """Runs ReLUs in ops.bias_relu from now on, as on a GPU; returns the list of its calls."""
    calls = []

    def relu(*args):
        calls.append(args)
        return bias_relu.Fused.apply(*args)

    def call():
        monkeypatch.setattr(module, "bias_relu", relu)
        monkeypatch.setattr(Folded, "fused_relu", True, raising=False)
        return calls

    return call


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_torch(name, dtype, fused, fuse):
    """Logits and input gradient are no farther from float64 than twice torch's own."""
    calls = fuse() if fused else []
    net = network(name)
    x, weight = torch.rand(17, 3, 8, 8), torch.randn(17, 1)
    exact = results(copy.deepcopy(net).double(), x.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain = results(net, x, weight)
    ours = results(folded(net, dtype), x, weight)
    for found, theirs, expected in zip(ours, plain, exact, strict=True):
        assert found.dtype == torch.float32
        assert error(found, expected) <= 2 * error(theirs, expected) + 1e-6
        assert F.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.97
    assert error(ours[0], exact[0]) > (1e-4 if dtype == torch.bfloat16 else 0)
    assert bool(calls) == (fused and name in FUSED)


def test_two_readers_get_a_copy_each(fuse, monkeypatch):
    """The gradients at the start of a residual block come apart, for the op to add up."""
    backward, pairs = bias_relu._backward, []

    def noted(grad, other, bits):
        pairs.append(other is not None)
        return backward(grad, other, bits)

    monkeypatch.setattr(bias_relu, "_backward", noted)
    calls, net = fuse(), network("resnet20")
    frozen, x = folded(net), torch.rand(2, 3, 8, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(frozen(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert any(before is not None for _, _, before, _ in calls)
    assert sum(pairs) == 7  # of 9 blocks; two have a shortcut that reads something else
    second = torch.autograd.grad(found.square().sum(), x)
    wanted = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(second, wanted, rtol=1e-3, atol=1e-5)


def test_activations_have_their_cap():
    model, x, weight = network("plain"), 40 * torch.rand(4, 3, 8, 8), torch.randn(4, 1)
    pairs = zip(results(folded(model), x, weight), results(model, x, weight), strict=True)
    assert all(error(found, expected.double()) < 1e-5 for found, expected in pairs)


@pytest.mark.parametrize("name", ["wrn", "plain"])
def test_follows_the_model_where_its_weights_are(name):
    """Without a new address: optimisers' steps, BatchNorm's statistics, .data, new tensors."""
    model = network(name)
    frozen, x = folded(model), torch.rand(4, 3, 8, 8)
    addresses = {key: b.data_ptr() for key, b in buffers_of(frozen).items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    conv = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]

    def step():
        model.train()(x).square().mean().backward()
        optimizer.step()
        model.eval()

    def replaced():
        norm.running_mean = norm.running_mean + 1

    for change in (step, lambda: conv.weight.data.mul_(0.5), replaced):
        change()
        assert error(frozen(x), model(x).detach().double()) > 1e-3
        frozen.refresh()
        assert error(frozen(x), model(x).detach().double()) < 1e-5
    assert {key: b.data_ptr() for key, b in buffers_of(frozen).items()} == addresses


def test_compiled_code_follows_too():
    """The whole twin is one graph, which a refresh does not make anew."""
    model = network("sums")
    frozen, x, weight = folded(model), torch.rand(4, 3, 8, 8), torch.randn(4, 1)
    torch.compiler.reset()
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert all(map(torch.equal, results(compiled, x, weight), results(frozen, x, weight)))
        model.convs[2].weight.data.mul_(0.5)
        model.norms[1].running_var.mul_(2)
        frozen.refresh()
        torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")


def test_only_the_input_has_a_gradient():
    model = network("resnet18")
    frozen, x = folded(model), torch.rand(2, 3, 8, 8, requires_grad=True)
    assert not any(b.requires_grad for b in buffers_of(frozen).values())
    logits = frozen(x)
    logits.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in model.parameters())
    frozen.refresh()
    with pytest.raises(RuntimeError, match="refreshed between this forward pass and its backward"):
        logits.sum().backward()


def test_low_precision_and_layout_hold_throughout(monkeypatch):
    """Between the entry and the head all is bfloat16 and channels_last."""
    seen, convolve = [], F.conv2d

    def watched(source, weight, bias, *args):
        seen.extend(t.dtype for t in (source, weight, bias) if t is not None)
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (source, weight))
        return convolve(source, weight, bias, *args)

    frozen = folded(network("preact_resnet18"), torch.bfloat16)
    monkeypatch.setattr(F, "conv2d", watched)
    with torch.autocast("cpu", torch.float16):  # the caller's is none of the twin's
        logits = frozen(torch.rand(2, 3, 8, 8))
    assert set(seen) == {torch.bfloat16}
    assert logits.dtype == torch.float32


def test_layout_and_mode_of_the_caller_do_not_matter():
    model, x = network("mobilenet_v2"), torch.rand(4, 3, 8, 8)
    frozen, weight = folded(model), torch.randn(4, 1)
    expected = results(frozen, x, weight)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    assert all(map(torch.equal, results(frozen, nhwc, weight), expected))
    assert all(map(torch.equal, results(copy.deepcopy(frozen), x, weight), expected))
    with torch.inference_mode():
        made = folded(model)
        made.refresh()
        assert torch.equal(made(x), expected[0])
    assert all(map(torch.equal, results(made, x, weight), expected))


def test_without_gradients_memory_is_freed_on_the_way(monkeypatch):
    alive, most, convolve = [], [], F.conv2d

    def watched(*args):
        out = convolve(*args)
        alive.append(weakref.ref(out))
        most.append(sum(r() is not None for r in alive))
        return out

    frozen = folded(network("resnet18"))
    monkeypatch.setattr(F, "conv2d", watched)
    with torch.no_grad():
        frozen(torch.rand(2, 3, 8, 8))
    assert len(alive) == 20
    assert max(most) <= 3


@pytest.mark.skipif(_library.backend() == "reference", reason="freeze() then lowers nothing")
def test_devices_choose_the_executor():
    net = network("normalized").to("meta")
    frozen = freeze(net)
    assert isinstance(frozen.trunk, Folded)
    assert len(list(frozen.buffers())) == len(list(net.buffers()))  # nobody sees the folded ones
    assert not any(module.training for module in frozen.modules())
    assert frozen.trunk(torch.rand(2, 3, 8, 8, device="meta")).is_meta  # with nothing on the CPU
    with pytest.raises(Unsupported, match=r"its weights are torch\.float64"):
        lower(net.double(), torch.float32)
    net.mu = torch.zeros(1, 3, 1, 1)
    with pytest.raises(Unsupported, match="its tensors are on 2 devices"):
        lower(net, torch.float32)


@pytest.mark.skipif(not _native.isas(), reason="needs the compiled kernels")
@pytest.mark.skipif(_library.backend() == "reference", reason="freeze() then lowers nothing")
@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_cpu_without_wide_vectors_runs_torchs_convolutions(isa, size):
    """But for those that Winograd's algorithm takes."""
    convs = [nn.Conv2d(32, 32, size, padding=size // 2) for _ in range(3)]
    net = nn.Sequential(nn.Conv2d(3, 32, 3), *convs, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with using_isa(isa):
        twin = freeze(net)
        folded = isa == "scalar" or (isa == "avx2" and size != 3)
        assert type(twin.trunk) is (Folded if folded else Trunk)
        x = torch.rand(4, 3, 8, 8)
        assert torch.allclose(twin(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not _native.isas(), reason="needs the compiled kernels")
@pytest.mark.skipif(_library.backend() == "reference", reason="freeze() then lowers nothing")
@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 64])
def test_short_segments_with_depthwise_convolutions_pay_in_bfloat16(isa, dtype, groups):
    middle = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 64, 5, 1, 2, 1, groups), nn.Conv2d(64, 32, 1)
    ends = nn.Conv2d(3, 32, 1), nn.Tanh(), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = nn.Sequential(*ends[:2], *middle, *ends[2:]).eval()
    with using_isa(isa):
        by_us = isinstance(freeze(net, dtype).trunk.segments[1], Trunk)
        low = dtype == torch.bfloat16 and isa in _native.WITH_BF16
        assert by_us == (low and groups > 1)
