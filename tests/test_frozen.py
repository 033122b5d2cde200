import pytest
import torch
from torch import nn

from fastadv import freeze, models
from fastadv.attacks import PGD


@pytest.fixture(params=["resnet18", "resnet20"])  # with a trunk of the engine and without
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
    with pytest.raises(ValueError, match="dtype is torch.float16, must be"):
        freeze(nn.Linear(2, 2), torch.float16)


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
