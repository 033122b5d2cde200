"""AWP against the authors' procedure: a proxy model that takes one step of ascent."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastadv import methods, models
from fastadv.train.awp import AWP


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def authors_step(model, proxy, optimizer, x_adv, y, gamma):
    """Copy, ascend on the copy, rescale the difference, train at w + d, take d off again."""
    proxy.load_state_dict(model.state_dict())
    proxy.train()
    ascent = torch.optim.SGD(proxy.parameters(), lr=0.01)
    ascent.zero_grad()
    (-F.cross_entropy(proxy(x_adv), y)).backward()
    ascent.step()
    moved = dict(proxy.named_parameters())
    moves = {}
    for name, w in model.named_parameters():
        if w.dim() > 1 and "weight" in name:
            difference = moved[name].detach() - w.detach()
            moves[name] = w.detach().norm() / (difference.norm() + 1e-20) * difference
    for name, w in model.named_parameters():
        w.data.add_(gamma * moves.get(name, 0))
    optimizer.zero_grad()
    F.cross_entropy(model(x_adv), y).backward()
    optimizer.step()
    for name, w in model.named_parameters():
        w.data.sub_(gamma * moves.get(name, 0))


def test_follows_the_authors_for_three_steps():
    torch.manual_seed(0)
    plain = models.get("digits_net", in_channels=1, width=4).double().train()
    ours, proxy = copy.deepcopy(plain), copy.deepcopy(plain)
    optimizers = sgd(plain), sgd(ours)
    awp, method, nets = AWP(ours, 0.01), methods.get("at"), methods.Nets(ours)
    for _ in range(3):
        x_adv, y = torch.rand(16, 1, 8, 8).double(), torch.randint(10, (16,))
        authors_step(plain, proxy, optimizers[0], x_adv, y, 0.01)
        batch = methods.Batch(x_adv, y, x_adv=x_adv)
        with awp.raised(lambda batch=batch: method.outer(nets, batch, {})[0]):
            optimizers[1].zero_grad()
            method.outer(nets, batch, {})[0].backward()
            optimizers[1].step()
        for (name, a), b in zip(
            plain.state_dict().items(), ours.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=name)


def test_the_move_raises_the_loss_and_goes_also_after_an_exception():
    torch.manual_seed(0)
    net = models.get("digits_net", in_channels=1, width=4)
    x, y = torch.rand(32, 1, 8, 8), torch.randint(10, (32,))
    awp, before = AWP(net, 0.05), copy.deepcopy(net.state_dict())

    def objective():
        return F.cross_entropy(net(x), y)

    with torch.no_grad():
        low = objective()
    net.load_state_dict(before)
    moved = {}

    def inside():
        with awp.raised(objective), torch.no_grad():
            for name, weight in net.named_parameters():
                moved[name] = (weight - before[name]).norm()
            assert objective() > low
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        inside()
    for name, distance in moved.items():
        share = 0.05 if before[name].dim() > 1 else 0.0
        assert float(distance) == pytest.approx(share * float(before[name].norm()), rel=1e-3), name
    for name, weight in net.named_parameters():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)
        assert weight.grad is None


def test_only_weights_move():
    """Not what has two dimensions and is called something else, such as an embedding."""
    net = models.get("vit_tiny", width=12)
    moved = {id(w) for w in AWP(net, 0.01).weights}
    others = {n for n, w in net.named_parameters() if w.dim() > 1 and id(w) not in moved}
    assert others == {"positions"}


def test_gamma_must_not_be_negative():
    with pytest.raises(ValueError, match="awp_gamma is -1, must not be negative"):
        AWP(models.get("digits_net"), -1)
