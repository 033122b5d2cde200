import collections
import copy
import types

import pytest
import torch
from stand_ins import Wrapped
from torch import nn

from fastadv import freeze, models
from fastadv.attacks import PGD
from fastadv.engine.frozen import InPrecision
from fastadv.ops import _native
from fastadv.testing import using_isa


@pytest.fixture(params=["resnet18", "resnet20"])  # of one segment and of several
def model(request):
    torch.manual_seed(0)
    net = models.get(request.param, width=4)
    net(torch.rand(16, 3, 8, 8))
    return net


def same(found, expected):
    """Whether logits agree to float32 rounding."""
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_agrees_on_memory_of_its_own(model):
    x = torch.rand(4, 3, 8, 8)
    twin = freeze(model)
    model.eval()
    assert same(twin(x), model(x))
    assert twin.trunk is not None or torch.equal(twin(x), model(x))
    pointers = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not any(t.data_ptr() in pointers for t in (*twin.parameters(), *twin.buffers()))
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_stays_in_eval_mode_and_out_of_the_models_way(model):
    twin = freeze(model)
    model.train()
    assert not any(m.training for m in twin.train().modules())
    before = {k: v.clone() for k, v in model.named_buffers()}
    twin(torch.rand(4, 3, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert all(m.training for m in model.modules())


def test_follows_optimiser_steps_batchnorm_and_replaced_tensors(model):
    x = torch.rand(4, 3, 8, 8)
    twin = freeze(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        model.train()(x).square().mean().backward()
        optimizer.step()
    twin.refresh()
    assert same(twin(x), model.eval()(x))
    for p in model.parameters():
        p.data = p.data * 0.5
    model.bn1.running_mean = model.bn1.running_mean + 1
    assert not same(twin(x), model(x))
    twin.refresh()
    assert same(twin(x), model(x))


def test_input_gradient_only(model):
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    freeze(model)(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_is_close_and_returns_float32(model):
    x = torch.rand(4, 3, 8, 8)
    logits = freeze(model, torch.bfloat16)(x)
    assert logits.dtype == torch.float32
    exact = model.eval()(x)
    assert not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, rtol=0.1, atol=0.1)


def test_refuses_other_precisions():
    allowed = (
        "must be torch.float32, torch.bfloat16 or torch.float64, or None for that of the model"
    )
    for dtype, model in (
        (torch.float16, nn.Linear(2, 2)),
        (torch.float16, nn.Linear(2, 2).half()),
        (torch.int64, nn.Flatten()),
        ("float32", nn.Linear(2, 2)),
    ):
        for made in (freeze, InPrecision):
            with pytest.raises(ValueError, match=f"dtype is {dtype}, {allowed}"):
                made(model, dtype)
    for own, dtype in ((torch.float64, torch.float32), (torch.float16, torch.bfloat16)):
        with pytest.raises(
            ValueError, match=f"{dtype}, must be that of the net's parameters, {own}"
        ):
            InPrecision(nn.Linear(2, 2).to(own), dtype)


Named = collections.namedtuple("Named", ("loss", "logits"))
WRAPS = {
    "tuple": lambda logits: (logits, logits.exp()[None]),
    "named": lambda logits: Named(logits.sum(), logits),
    "dict": lambda logits: {"features": logits.exp(), "logits": logits},
    "object": lambda logits: types.SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_twin_returns_the_logits_alone(model, wrap, dtype):
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    twins = [freeze(m, dtype) for m in (model.eval(), Wrapped(model, WRAPS[wrap]))]
    for kind in (twins[1], torch.compile(twins[1], backend="eager")):
        found, expected = kind(x), twins[0](x)
        if wrap == "object" and dtype != torch.float64:  # which cannot be traced: without a trunk
            rounding = 0.1 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)
        else:
            assert torch.equal(found, expected)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.autograd.grad(found.sum(), x)[0].abs().sum() > 0


def test_what_has_no_logits_is_refused(model):
    x = torch.rand(2, 3, 8, 8)
    for wrap in (lambda v: (v, v), lambda v: {"out": v}, lambda v: types.SimpleNamespace(out=v)):
        twin = freeze(Wrapped(model, wrap))
        with pytest.raises(TypeError, match="model returned a .*, must return logits"):
            twin(x)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(model, low):
    """They compute as they are, or cast, from float32 images to float32 logits and gradients."""
    model = model.to(low).eval()
    x = torch.rand(4, 3, 8, 8)
    for made in (freeze(model), InPrecision(model)):
        assert made.dtype == low
        leaf, plain = (x.clone().requires_grad_() for _ in range(2))
        found, expected = made(leaf), model(plain.to(low)).float()
        assert torch.equal(found, expected)
        (grad,) = torch.autograd.grad(found.logsumexp(1).sum(), leaf)
        (wanted,) = torch.autograd.grad(expected.logsumexp(1).sum(), plain)
        assert torch.equal(grad, wanted)
    assert freeze(model).trunk is None
    exact = freeze(model, torch.float32)
    assert same(exact(x), copy.deepcopy(model).float()(x))
    near = freeze(model, torch.bfloat16)
    torch.testing.assert_close(near(x), exact(x), rtol=0.1, atol=0.1)
    with torch.no_grad():
        model.linear.bias.add_(1)
    for twin in (exact, near):
        first = twin(x)
        assert first.dtype == torch.float32
        twin.refresh()
        torch.testing.assert_close(twin(x), first + 1, rtol=0.1, atol=0.1)


def test_float64_end_to_end(model):
    """Of float64 models, and of others where it is asked for; images of either dtype."""
    exact, x = copy.deepcopy(model).double().eval(), torch.rand(4, 3, 8, 8)
    expected = exact(x.double())
    for twin in (freeze(exact), freeze(exact, torch.float64), freeze(model, torch.float64)):
        assert twin.dtype == torch.float64
        assert twin.trunk is None
        for images in (x, x.double()):
            assert torch.equal(twin(images), expected)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(twin(images), expected)
    assert same(freeze(exact, torch.float32)(x.double()), expected.float())
    assert freeze(freeze(model, torch.float64)).dtype == torch.float32  # the model's own again
    with torch.no_grad():
        model.linear.weight.mul_(-1)
    twin.refresh()
    assert torch.equal(twin(x), copy.deepcopy(model).double().eval()(x.double()))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_a_twin_without_a_trunk_compiles_as_a_whole(dtype):
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(4, 3, 2, 2)
    twin = freeze(net, dtype)
    torch.compiler.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(x), twin(x))
        net[1].weight.data.mul_(-2)
        twin.refresh()


def test_networks_without_parameters():
    x = torch.rand(4, 3, 2, 2)
    for dtype in (None, torch.float32, torch.bfloat16, torch.float64):
        logits = freeze(nn.Flatten(), dtype)(x)
        assert torch.equal(logits, x.flatten(1))
        assert logits.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_gradients_of_float64_twins():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.SiLU(), nn.Flatten(), nn.Linear(12, 3)
    )
    twin, x = freeze(net, torch.float64), torch.rand(2, 2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(twin, x)
    assert torch.autograd.gradgradcheck(twin, x)


def test_an_attack_refreshes_a_compiled_twin():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    compiled = torch.compile(freeze(net), backend="eager")
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    attack = PGD(steps=2, init="zero")
    first = attack(compiled, x, y)
    with torch.no_grad():
        net[0].weight.mul_(-1)
    second = attack(compiled, x, y)
    assert not torch.equal(first, second)
    assert torch.equal(second, attack(net, x, y))


@pytest.mark.parametrize("model", [None, "resnet18", nn.Linear])
def test_only_a_module_is_frozen(model):
    with pytest.raises(TypeError, match=f"model is {model!r}, must be a torch.nn.Module"):
        freeze(model)


def test_weights_are_loaded_into_the_model_not_its_twin(model):
    twin = freeze(model)
    with pytest.raises(RuntimeError, match=r"load into the model, then call refresh\(\)"):
        twin.load_state_dict(twin.state_dict())


@pytest.mark.parametrize("isa", _native.isas())
def test_bfloat16_is_computed_where_the_processor_has_it(isa):
    """And in float32 elsewhere, which is faster there and nearer."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 7)).eval()
    x = torch.rand(4, 3, 4, 4)
    with using_isa(isa):
        twin = freeze(model, torch.bfloat16)
    assert torch.equal(twin(x), model(x)) == (isa not in _native.WITH_BF16)
