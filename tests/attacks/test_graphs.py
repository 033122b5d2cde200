"""Attacks as CUDA graphs. Without a GPU a graph is replayed by running its function again."""

import dataclasses
import functools
import importlib

import pytest
import torch
from stand_ins import Player
from torch import nn

from fastadv import freeze, methods
from fastadv.attacks import APGD, PGD, graphs
from fastadv.engine.folded import Folded

EPS = 8 / 255


@pytest.fixture
def player(monkeypatch):
    played = Player()
    monkeypatch.setattr(graphs, "capture", played)
    monkeypatch.setattr(graphs, "on_gpu", lambda x: x.numel() > 0)
    return played


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 7)
    return nn.Sequential(*layers)


def batch(count=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 8, 8, generator=g), torch.randint(7, (count,), generator=g)


def pgd():
    return PGD(EPS, EPS / 4, 4)


def same(captured, model, x, y=None, **options):
    """Whether one more call gives what a PGD gives from the same random state."""
    state = torch.get_rng_state()
    found = captured(model, x, y, **options)
    torch.set_rng_state(state)
    plain = pgd()
    return torch.equal(found, plain(model, x, y, **options)) and torch.equal(
        captured.bad_gradients, plain.bad_gradients
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_replays_are_the_attack(model, player, frozen):
    captured, net = graphs.Captured(pgd()), freeze(model) if frozen else model
    for seed in range(5):
        assert same(captured, net, *batch(seed=seed))
    assert player.counts == (1, 3)  # the first call checks the model, the second is remembered
    x, y = batch()
    assert same(captured, net, x, y, start=x, index=torch.arange(6) + 90)
    assert player.counts == (1, 4)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_new_weights_need_no_new_graph(model, player):
    captured, twin = graphs.Captured(pgd()), freeze(model)
    for _ in range(3):
        captured(twin, *batch())
    before = captured(twin, *batch(), start=batch()[0])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1.5)
    model[1].running_mean.add_(0.3)
    assert same(captured, twin, *batch())
    assert not torch.equal(captured(twin, *batch(), start=batch()[0]), before)
    assert player.captures == 1


def test_a_smaller_batch_is_filled_up(model, player):
    captured = graphs.Captured(pgd())
    for count in (6, 6, 6, 4, 1, 6):
        assert same(captured, model, *batch(count, seed=count))
    assert player.counts == (1, 4)
    assert same(captured, model, *batch(9))
    assert same(captured, model, *batch(9))
    assert player.counts == (2, 6)


def test_bad_gradients_of_the_filling_do_not_count(player):
    net = Rooted().eval()
    captured, (x, y) = graphs.Captured(pgd()), batch()
    x[4] = 0  # where the root has no gradient
    inner = functools.partial(_ce, net)
    for _ in range(3):
        captured.ascend(inner, x, y, start=x)
    assert captured.bad_gradients == 4
    captured.ascend(inner, x[:3], y[:3], start=x[:3])
    assert captured.bad_gradients == 0
    assert player.counts == (1, 3)


class Rooted(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :7] * x.square().sum((1, 2, 3)).sqrt()[:, None]


class Holder:
    def __init__(self, net):
        self.net = net

    def inner(self, x_adv, y):
        return _ce(self.net.eval(), x_adv, y)


def _first(_, net, x_adv, y):
    return _ce(net.eval(), x_adv, y)


def _ce(net, x_adv, y):
    return nn.functional.cross_entropy(net(x_adv), y, reduction="none")


def test_what_is_not_the_same_is_captured_anew(model, player):
    x, y = batch()
    nhwc, turned = x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT
    other = nn.Sequential(*model)
    for then, captures in (
        (lambda captured: captured(model, x, y), 1),
        (lambda captured: captured(model, x, y, loss="margin"), 2),
        (lambda captured: captured(model, x, loss="kl", target_logits=torch.rand(6, 7)), 2),
        (lambda captured: captured(model, nhwc, y), 2),
        (lambda captured: captured(model, turned, y), 2),
        (lambda captured: captured(other, x, y), 1),  # one call to check it, one to remember
    ):
        captured, player.captures = graphs.Captured(pgd()), 0
        for _ in range(3):
            captured(model, x, y)
        for _ in range(2):
            then(captured)
        assert player.captures == captures


def test_a_twin_of_a_gpu_is_captured(model, player, monkeypatch):
    """Its trunk is a module and writes its weights in place."""
    monkeypatch.setattr(importlib.import_module("fastadv.engine.lower"), "Trunk", Folded)
    captured, twin = graphs.Captured(pgd()), freeze(model)
    assert isinstance(twin.trunk, Folded)
    for seed in range(4):
        assert same(captured, twin, *batch(seed=seed))
        with torch.no_grad():
            model[0].weight.mul_(-1.2)
    assert player.counts == (1, 2)


def test_another_attack_is_captured_anew(model, player):
    captured = graphs.Captured(pgd())
    for _ in range(3):
        captured(model, *batch())
    captured.attack.eps = EPS / 4
    for _ in range(2):
        x_adv = captured(model, *batch())
        assert (x_adv - batch()[0]).abs().max() < EPS / 3
    assert player.captures == 2


def test_a_tensor_that_moved_is_not_forgotten(model, player):
    captured = graphs.Captured(pgd())
    for _ in range(3):
        captured(model, *batch())
    model[0].weight.data = model[0].weight + 1
    assert same(captured, model, *batch())
    assert player.counts == (1, 1)
    assert same(captured, model, *batch())
    assert player.counts == (2, 2)


@dataclasses.dataclass(slots=True)
class Settings:
    net: nn.Module
    sign: float  # may change between two attacks


def test_what_cannot_be_recognised_is_never_captured(model, player):
    x, y = batch()
    captured = graphs.Captured(pgd())
    for _ in range(3):
        captured.ascend(lambda v, y: _ce(model.eval(), v, y), x, y)
    for _ in range(3):
        captured.ascend(functools.partial(_ce, model, y=y), x)  # other labels would pass unseen
    for nets in ([model], {"net": model}, object(), Settings(model, 1.0)):
        for _ in range(3):
            captured.ascend(functools.partial(_first, nets, model), x, y)
    for _ in range(3):
        captured.ascend(functools.partial(Holder(model).inner), x, y)
    model[1].train()
    for _ in range(3):
        captured.ascend(functools.partial(_ce, model), x, y)  # samples depend on each other
    assert captured(model, x[:0], y[:0]).shape == (0, 3, 8, 8)
    assert player.counts == (0, 0)


@pytest.mark.parametrize("name", ["rslad", "advfunmatch"])
def test_methods_attack_by_replays(model, player, name):
    torch.manual_seed(3)
    teacher = freeze(nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten(), nn.Linear(64, 7)))
    x, y = batch()
    nets = methods.Nets(student=model, teacher=teacher)
    plain, graphed = methods.get(name, attack=pgd()), methods.get(name)
    graphed.attack = graphs.Captured(pgd())
    for method in (plain, graphed):
        torch.manual_seed(5)
        method.found = [
            method.perturb(nets, methods.Batch(x=x, y=y), method.init_state("cpu"))
            for _ in range(3)
        ]
    assert all(map(torch.equal, plain.found, graphed.found))
    assert player.counts == (1, 2)


def test_nets_made_anew_for_each_step_are_known_again(model, player):
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten(), nn.Linear(64, 7)).eval()
    method, twin = methods.get("adaad"), freeze(model)
    method.attack = graphs.Captured(pgd())
    x, y = batch()
    for _ in range(4):
        nets = methods.Nets(model, teacher, student_twin=twin)
        method.perturb(nets, methods.Batch(x=x, y=y), {})
    assert player.counts == (1, 3)


def test_a_stale_teacher_is_attacked_step_by_step(model, player):
    nets = methods.Nets(
        student=model, teacher=freeze(nn.Sequential(nn.Flatten(), nn.Linear(192, 7)))
    )
    method = methods.get("advfunmatch", teacher_every=2)
    method.attack = graphs.Captured(pgd())
    x, y = batch()
    for _ in range(3):
        method.perturb(nets, methods.Batch(x=x, y=y), {})
    assert player.counts == (0, 0)


def test_errors_are_those_of_pgd(model, player):
    x, y = batch()
    captured = graphs.Captured(pgd())
    for _ in range(3):
        captured(model, x, y)
    for match, args, options in (
        (r"y has labels from .* to 7", (x, y + 7 - y), {}),
        (r"x is in \[.*, 3", (3 + 0 * x, y), {}),
        ("loss is 'l7'", (x, y), {"loss": "l7"}),
        ("y is missing", (x,), {}),
        (r"start has shape \(5, 3, 8, 8\), must be \(6", (x, y), {"start": x[:5]}),
        ("targets have 1 rows, must have 6", (x,), {"loss": "kl", "target_logits": x[:1, 0, 0]}),
    ):
        with pytest.raises(ValueError, match=match):
            captured(model, *args, **options)
    for attack in (PGD(restarts=2), PGD(keep="best"), APGD(), captured, None):
        with pytest.raises(ValueError, match="attack is .*, must be a PGD with restarts=1"):
            graphs.Captured(attack)


def test_arguments_of_the_wrong_kind_are_named_also_in_a_replay(model, player):
    x, y = batch()
    captured, z = graphs.Captured(pgd()), torch.randn(6, 7)
    for _ in range(3):
        captured(model, x, y)
    for args, options, error, match in (
        ((x.numpy(), y), {}, TypeError, "x is a ndarray, must be a tensor"),
        ((x, y.tolist()), {}, TypeError, "y is a list, must be a tensor"),
        ((x, y.float()), {}, ValueError, "y is torch.float32"),
        ((x, y[:5]), {}, ValueError, r"y is torch.int64 \(5,\), must be torch.int64 \(6,\)"),
        ((x, y), {"loss": ["ce"]}, ValueError, "loss is a list, must be one of ce"),
        ((x, y), {"index": [0] * 6}, TypeError, "index is a list, must be a tensor"),
        ((x, y), {"start": x.tolist()}, TypeError, "start is a list, must be a tensor"),
        ((x, y), {"start": x.double()}, TypeError, "start is torch.float64, must be torch.float32"),
        (
            (x,),
            {"loss": "kl", "target_logits": z.tolist()},
            TypeError,
            "target_logits is a list, must be a tensor",
        ),
    ):
        with pytest.raises(error, match=match):
            captured(model, *args, **options)
    assert same(captured, model, x, y.to(torch.uint8))
    assert player.counts == (1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_any_dtype_and_output_are_replayed(model, player, dtype):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model.to(dtype)

        def forward(self, v):
            return {"logits": self.net(v)}

    captured, net = graphs.Captured(pgd()), Wrapped()
    for seed in range(4):
        x, y = batch(seed=seed)
        assert same(captured, net, x.to(torch.float64) if seed > 1 else x, y)
    z = torch.randn(6, 7)
    for _ in range(3):
        assert same(captured, net, batch()[0], loss="kl", target_logits=z)
    assert player.captures == 2


def test_a_radius_per_sample_is_attacked_step_by_step(model, player):
    x, y = batch()
    eps = torch.linspace(EPS, 2 * EPS, 6)
    captured = graphs.Captured(PGD(eps, EPS / 4, 12, init="zero"))
    for _ in range(4):
        x_adv = captured(model, x, y)
        assert torch.equal(x_adv, PGD(eps, EPS / 4, 12, init="zero")(model, x, y))
    assert ((x_adv - x).abs().flatten(1).amax(1) <= eps + 1e-6).all()
    assert player.counts == (0, 0)


def test_other_devices_are_attacked_step_by_step(model, monkeypatch):
    monkeypatch.setattr(graphs, "capture", None)
    captured, calls = graphs.Captured(pgd()), []
    for seed in range(3):
        assert same(captured, model, *batch(seed=seed))
    model.register_forward_hook(lambda *_: calls.append(1))
    captured(model, *batch())
    assert len(calls) == 4  # its steps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_are_the_attack(model, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = model.cuda()
    captured, twin = graphs.Captured(pgd()), freeze(model, dtype)
    for seed, count in enumerate((6, 6, 6, 4, 6)):
        x, y = (v.cuda() for v in batch(count, seed))
        start = (x + 0.01 * torch.randn_like(x)).clamp(0, 1)
        with torch.no_grad():
            model[0].weight.mul_(1.1)
        found, plain = captured(twin, x, y, start=start), pgd()(twin, x, y, start=start)
        # 4 images are computed as 6, by another algorithm perhaps, whose rounding turns signs
        assert (found == plain).float().mean() > 0.98
    assert captured.graph is not None
