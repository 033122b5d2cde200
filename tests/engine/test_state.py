"""A twin is one network at one time: the model at its last refresh, whatever computes a part."""

import contextlib
import copy

import pytest
import torch
from networks import Undecided, folded, network, twin
from torch import nn
from torch.nn.utils import parametrizations

from fastadv import freeze, models
from fastadv.engine.features import forward_features
from fastadv.ops import _native

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Custom(nn.Module):
    """Parameters and buffers of every kind outside torch's modules."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(12))
        self.register_buffer("shift", torch.rand(12), persistent=False)
        self.register_buffer("order", torch.randperm(12))
        self.register_buffer("nothing", None)

    def forward(self, x):
        return (x.mean((2, 3)) * self.scale + self.shift)[:, self.order]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x).relu())


def pooled():
    return nn.AdaptiveAvgPool2d(1), nn.Flatten()


HEADS = {
    "linear": lambda: (*pooled(), nn.Linear(12, 5)),
    "flatten": lambda: (nn.Flatten(), nn.Linear(192, 5)),
    "pooling": lambda: (
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 9),
        nn.GELU(),
        nn.Linear(9, 5),
    ),
    "norm": lambda: (*pooled(), nn.BatchNorm1d(12), nn.Linear(12, 5)),
    "custom": lambda: (Custom(), nn.Linear(12, 5)),
    "tied": lambda: (*pooled(), Tied()),
    "none": pooled,
}


def body(convolution=nn.Conv2d):
    return (
        nn.Conv2d(3, 6, 3, padding=1, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        convolution(6, 12, 3, padding=1),
        nn.BatchNorm2d(12),
    )


def parametrised(*args, **options):
    return parametrizations.weight_norm(nn.Conv2d(*args, **options))


def trained(net):
    """The network after a few passes in train mode, in channels_last."""
    for _ in range(3):
        net.train()(torch.rand(16, 3, 8, 8))
    return net.eval().to(memory_format=torch.channels_last)


# How a twin is made: without a trunk, in torch's convolutions, in our kernels, and with a layer of
# torch's between both.
EXECUTORS = {
    "plain": (freeze, Undecided),
    "folded": (folded, nn.Conv2d),
    "mixed folded": (folded, parametrised),
}
if _native.isas():
    EXECUTORS |= {"trunk": (twin, nn.Conv2d), "mixed": (twin, parametrised)}


@pytest.fixture(params=[(e, h) for e in EXECUTORS for h in HEADS], ids="-".join)
def pair(request):
    """(model, its twin)"""
    executor, head = request.param
    torch.manual_seed(0)
    make, convolution = EXECUTORS[executor]
    model = trained(nn.Sequential(*body(convolution), *HEADS[head]()))
    made = make(model)
    assert (made.trunk is None) == (executor == "plain")
    return model, made


def step(fused):
    def change(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, fused=fused)
        model.train()(X).square().mean().backward()
        optimizer.step()
        model.eval()

    return change


def by_data(model):
    for p in model.parameters():
        p.data = p.data * 1.5 + 0.1


def by_data_in_place(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.mul_(2) if tensor.is_floating_point() else tensor.data.copy_(tensor.flip(0))


def replaced_buffers(model):
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.flip(0) * 2 if name != "order" else buffer.flip(0))


def replaced_parameters(model):
    """Also of a parametrised weight, whose name here is that of what it is made from."""
    with torch.no_grad():
        fresh = {id(p): nn.Parameter(p * 1.5 + 0.1) for p in model.parameters()}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module._parameters[name] = fresh[id(p)]


def loaded(assign):
    def change(model):
        other = copy.deepcopy(model)
        by_data_in_place(other)
        model.load_state_dict(other.state_dict(), assign=assign)

    return change


def other_layout(model):
    by_data_in_place(model.to(memory_format=torch.contiguous_format))


CHANGES = {
    "step": step(False),
    "fused step": step(True),
    "data": by_data,
    "data in place": by_data_in_place,
    "buffers": replaced_buffers,
    "parameters": replaced_parameters,
    "load_state_dict": loaded(False),
    "other layout": other_layout,
}


def answers(made):
    """Logits and input gradient of the whole, logits and features with hooks in it, which runs
    modules."""
    x = X.clone().requires_grad_()
    logits = made(x)
    (grad,) = torch.autograd.grad(logits.logsumexp(1).sum(), x)
    hooked, features = forward_features(made, X, ("0", "4"))
    return [logits.detach(), grad, hooked.detach(), *features.values()]


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_shows_before_a_refresh_and_all_of_it_after(pair, change):
    model, made = pair
    before = answers(made)
    where = [t.data_ptr() for t in (*made.parameters(), *made.buffers())]
    CHANGES[change](model)
    assert all(map(torch.equal, answers(made), before))
    made.refresh()
    after, expected = answers(made), answers(model)
    assert not torch.equal(after[0], before[0])
    for found, wanted in zip(after, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, after[2:], expected[2:]))  # modules on equal tensors
    assert made.trunk is not None or torch.equal(after[0], expected[0])
    if change != "other layout":
        assert where == [t.data_ptr() for t in (*made.parameters(), *made.buffers())]


def test_tensors_have_the_models_layout_and_none_of_its_memory(pair):
    model, made = pair
    for change in (lambda _: None, other_layout):
        change(model)
        made.refresh()
        mine, its = made.net.state_dict(), model.state_dict()
        assert list(mine) == list(its)
        assert all(mine[key].stride() == its[key].stride() for key in its)
        assert all(mine[key].data_ptr() != its[key].data_ptr() for key in its)
        assert not any(p.requires_grad for p in made.parameters())


def test_an_unchanged_layout_of_views_moves_nothing():
    """A parameter that is part of a larger tensor, and a buffer that is expanded."""
    model = trained(nn.Sequential(*body(), *HEADS["custom"]()))
    flat = torch.rand(24)
    model[5].scale.data = flat[::2]
    model[5].shift = torch.rand(1).expand(12)
    made = freeze(model)
    where = [t.data_ptr() for t in (*made.parameters(), *made.buffers())]
    flat.mul_(2)
    assert not torch.allclose(made(X), model(X), rtol=1e-4)
    made.refresh()
    torch.testing.assert_close(made(X), model(X), rtol=1e-4, atol=1e-5)
    assert where == [t.data_ptr() for t in (*made.parameters(), *made.buffers())]


def test_a_backward_pass_needs_the_weights_of_its_forward_pass(pair):
    model, made = pair
    x = X.clone().requires_grad_()
    logits = made(x)
    if logits.grad_fn is None or not any(map(torch.is_tensor, made.parameters())):
        pytest.skip("nothing to differentiate")
    by_data_in_place(model)
    made.refresh()
    with pytest.raises(RuntimeError, match="refreshed between this forward pass and its backward"):
        logits.sum().backward()


@pytest.mark.parametrize("make", [make for make, _ in EXECUTORS.values()])
def test_other_dtypes_and_back(make):
    """model.double() and what a user does to a twin itself hold until the next refresh."""
    model = trained(nn.Sequential(*body(), *HEADS["norm"]()))
    made = make(model)
    first = made(X)
    model.double()
    assert torch.equal(made(X), first)
    made.refresh()
    assert made.dtype == torch.float32 or made(X).dtype == torch.float64
    torch.testing.assert_close(made(X).double(), model(X.double()), rtol=1e-5, atol=1e-6)
    model.float()
    made.refresh()
    assert torch.equal(made(X), first)
    made.double()
    torch.testing.assert_close(made(X), first.double(), rtol=1e-5, atol=1e-6)
    made.refresh()
    assert torch.equal(made(X), first)


def test_a_buffer_may_get_another_shape():
    model = trained(nn.Sequential(*body(), *HEADS["custom"]()))
    made = freeze(model)
    model[5].shift = torch.rand(())
    made.refresh()
    torch.testing.assert_close(made(X), model(X), rtol=1e-4, atol=1e-5)


def unbiased(model):
    model[-1] = nn.Linear(12, 5, bias=False)


def narrower(model):
    """With another padding, which no tensor tells."""
    model[3] = nn.Conv2d(6, 12, 1)


def untied(model):
    model[-1].two.weight = nn.Parameter(model[-1].two.weight.detach().clone())


def tied(model):
    model[-1].two.bias = model[-1].one.bias


@pytest.mark.parametrize(
    ("head", "change"),
    [("linear", unbiased), ("linear", narrower), ("tied", untied), ("tied", tied)],
)
def test_another_network_is_no_refresh(head, change):
    model = trained(nn.Sequential(*body(), *HEADS[head]()))
    made = freeze(model)
    first = made(X)
    change(model)
    with pytest.raises(RuntimeError, match="Sequential has other parameters .* freeze it anew"):
        made.refresh()
    assert torch.equal(made(X), first)
    made = freeze(model)
    torch.testing.assert_close(made(X), model(X), rtol=1e-4, atol=1e-5)


def test_weights_that_are_no_leaves_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    net[0].folded = net[0].weight * 2
    with pytest.raises(RuntimeError, match="deepcopy"):
        freeze(net)


@pytest.mark.skipif(not _native.isas(), reason="needs the compiled kernels")
def test_weights_are_folded_when_they_are_needed(monkeypatch):
    """Once for many forward passes, not at all for a twin that nobody asks."""
    model, count = trained(nn.Sequential(*body(), *HEADS["norm"]())), []
    made = twin(model)
    fold = type(made.trunk).fold
    monkeypatch.setattr(type(made.trunk), "fold", lambda *args: (count.append(1), fold(*args)))
    for _ in range(3):
        made.refresh()
    assert count == []
    with torch.inference_mode():
        made(X)
    made(X), answers(made)
    assert count == [1]


@pytest.mark.parametrize("make", [make for make, _ in EXECUTORS.values()])
@pytest.mark.parametrize("entered", [torch.inference_mode, torch.no_grad, contextlib.nullcontext])
def test_the_mode_of_the_caller_does_not_matter(make, entered):
    model = trained(nn.Sequential(*body(), *HEADS["norm"]()))
    with entered():
        made = make(model)
        by_data_in_place(model)
        made.refresh()
        made(X)
    for found, wanted in zip(answers(made), answers(model), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_twin_is_a_twin_of_the_copied_model():
    model = network("resnet18")
    made = copy.deepcopy(freeze(model))
    by_data_in_place(model)
    by_data(made._source[0])
    made.refresh()
    torch.testing.assert_close(made(X), made._source[0](X), rtol=1e-4, atol=1e-5)


def test_a_refresh_refuses_nothing_that_is_not_of_the_twin():
    made, x = freeze(nn.Identity()), torch.rand(2, 3, requires_grad=True)
    made(x).sum().backward()
    made.refresh()
    x.sum().backward()
    assert (x.grad == 2).all()


def test_networks_without_a_trunk():
    """What has no trunk at all."""
    torch.manual_seed(0)
    for model in (models.get("vit_tiny"), nn.Sequential(nn.Flatten(), nn.Linear(192, 5))):
        made = freeze(trained(model))
        before = made(X)
        by_data_in_place(model)
        assert torch.equal(made(X), before)
        made.refresh()
        assert torch.equal(made(X), model(X))
