"""Twins under create_graph, torch.func and forward-mode derivatives: right, or refused."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_mode
import torch.nn.functional as F
from networks import Undecided, error, folded, network, results, twin
from torch import func, nn

from fastadv import freeze
from fastadv.engine.frozen import InPrecision
from fastadv.ops import _native

CPU = pytest.param(
    twin, marks=pytest.mark.skipif(not _native.isas(), reason="needs the compiled kernels")
)
MAKES = [CPU, folded]
ONLY = "plain first-order gradients only: .* call the model itself, in eval mode"


def loss(model, x):
    return model(x).logsumexp(1).sum()


def curvature(model, x):
    """The gradient of |d loss / d x|^2: second-order."""
    x = x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(model, x), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


@pytest.mark.skipif(not _native.isas(), reason="needs the compiled kernels")
def test_the_trunk_of_a_cpu_refuses_what_it_has_no_gradient_for():
    frozen = twin(network("wrn_silu"))
    x = torch.rand(3, 3, 8, 8, requires_grad=True)
    loss(frozen, x).backward(retain_graph=True)  # which it has
    with pytest.raises(RuntimeError, match=ONLY):
        torch.autograd.grad(loss(frozen, x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=ONLY):
        loss(frozen, x).backward(create_graph=True)
    with pytest.raises(RuntimeError, match=ONLY):
        torch.autograd.functional.hessian(lambda v: loss(frozen, v), x)
    with pytest.raises(RuntimeError, match=ONLY):
        torch.autograd.functional.jacobian(frozen, x, vectorize=True)
    logits = frozen(x)
    ones = torch.ones_like(logits)
    with pytest.raises(RuntimeError, match=ONLY):
        torch.autograd.grad(logits, x, ones[None], is_grads_batched=True)
    logits = frozen(x)
    with forward_mode.dual_level(), pytest.raises(RuntimeError, match=ONLY):
        torch.autograd.grad(logits, x, forward_mode.make_dual(ones, ones))


@pytest.mark.parametrize("name", ["resnet18", "wrn_silu", "plain", "normalized", "sums"])
def test_other_trunks_are_differentiable_twice(name):
    """Second-order gradients no farther from float64 than twice torch's own."""
    net, x = network(name), torch.rand(3, 3, 8, 8)
    exact = curvature(copy.deepcopy(net).double(), x.double())
    assert exact.norm() > 0
    limit = 2 * error(curvature(net, x), exact) + 1e-5
    assert error(curvature(folded(net), x), exact) <= limit
    assert error(curvature(freeze(net, torch.float64), x.double()), exact) < 1e-12


def test_what_runs_as_modules_is_differentiable_twice():
    net = nn.Sequential(Undecided(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 6), nn.Flatten()).eval()
    x = torch.rand(3, 3, 8, 8)
    frozen = freeze(net)
    assert frozen.trunk is None
    assert torch.equal(curvature(frozen, x), curvature(net, x))


def direction(model, x):
    return func.jvp(lambda v: model(v), (x,), (torch.ones_like(x),))


def dual(model, x):
    with forward_mode.dual_level():
        return tuple(forward_mode.unpack_dual(model(forward_mode.make_dual(x, torch.ones_like(x)))))


def one_image(model):
    return lambda image: model(image[None]).logsumexp(1).sum()


TRANSFORMS = {
    "grad": lambda model, x: func.grad(lambda v: loss(model, v))(x),
    "grad and value": lambda model, x: func.grad_and_value(lambda v: loss(model, v))(x),
    "vmap": lambda model, x: func.vmap(lambda image: model(image[None])[0])(x),
    "vmap of grad": lambda model, x: func.vmap(func.grad(one_image(model)))(x),
    "vmap of batches": lambda model, x: func.vmap(model)(x[:, None]),
    "jvp": direction,
    "vjp": lambda model, x: func.vjp(model, x)[1](torch.ones(len(x), 10)),
    "jacrev": lambda model, x: func.jacrev(model)(x[:1]),
    "jacfwd": lambda model, x: func.jacfwd(model)(x[:1]),
    "grad of grad": lambda model, x: func.grad(
        lambda v: func.grad(lambda w: loss(model, w))(v).square().sum()
    )(x),
    "dual numbers": dual,
    "functional": lambda model, x: torch.autograd.functional.jacobian(model, x[:1]),
}


@pytest.mark.parametrize("make", [*MAKES, freeze])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_see_the_modules(name, make):
    net, x = network("resnet18"), torch.rand(3, 3, 8, 8)
    frozen = make(net)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)  # modules, but as they were
    net.eval()
    expected = TRANSFORMS[name](copy.deepcopy(frozen.net), x)
    found = TRANSFORMS[name](frozen, x)
    for got, want in zip(
        *(v if isinstance(v, tuple) else (v,) for v in (found, expected)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
        assert want.abs().sum() > 0


@pytest.mark.parametrize("make", [*MAKES, freeze])
def test_afterwards_the_trunk_is_back(make):
    net, x = network("resnet18"), torch.rand(3, 3, 8, 8)
    frozen = make(net)
    before = results(frozen, x, torch.ones(1))
    func.grad(lambda v: loss(frozen, v))(x)
    assert all(map(torch.equal, results(frozen, x, torch.ones(1)), before))


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("key", ["layer1.0.conv1.weight", "bn1.weight", "linear.bias"])
def test_tensors_lent_to_a_twin_count(make, key):
    """torch.func.functional_call, with the gradient to them."""
    net, x = network("resnet18"), torch.rand(3, 3, 8, 8)
    frozen = make(net)
    lent = (frozen.net.state_dict()[key] + 0.3).requires_grad_()
    grads = []
    for model, name in ((frozen, f"net.{key}"), (frozen.net, key)):
        logits = func.functional_call(model, {name: lent}, (x,))
        grads.append(torch.autograd.grad(logits.logsumexp(1).sum(), lent)[0])
        assert error(logits.detach(), frozen(x)) > 1e-3
    assert torch.equal(*grads)


def test_compiled_transforms():
    net, x = network("plain"), torch.rand(2, 3, 8, 8)
    frozen = folded(net)
    expected = func.grad(lambda v: loss(net, v))(x)
    compiled = torch.compile(lambda v: func.grad(lambda w: loss(frozen, w))(v), backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-6)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.silu(self.norm(self.conv(x))).flatten(1)


def test_low_precision_under_transforms_is_that_of_autocast():
    torch.manual_seed(0)
    net, x = Scaled().eval(), torch.rand(3, 3, 8, 8)
    for made in (freeze(net, torch.bfloat16), InPrecision(net, torch.bfloat16)):
        found = func.grad(lambda v, made=made: loss(made, v))(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=made.is_low()):
            expected = func.grad(lambda v: loss(lambda w: net(w).float(), v))(x)
        assert torch.equal(found, expected)
