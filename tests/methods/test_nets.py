"""Networks as people have them, in methods: what they return, and which dtype they compute in."""

import copy
import types

import pytest
import torch
from torch import nn

from fastadv import freeze, methods
from fastadv.attacks import APGD, PGD
from fastadv.methods.base import Batch, Nets

EPS = 8 / 255
NAMES = [*methods.METHODS, "vfd+rslad", "vfd+at", "igdm+rslad", "vfd+igdm+adaad"]


class Net(nn.Module):
    """A small network that keeps its logits in an object, and acts on its own mode."""

    def __init__(self, width, wrap=lambda z: types.SimpleNamespace(logits=z)):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, width, 3, bias=False), nn.BatchNorm2d(width)
        self.linear, self.wrap = nn.Linear(36 * width, 5), wrap

    def forward(self, x):
        features = self.bn(self.conv(x)).relu().flatten(1)
        return self.wrap(self.linear(features))


def networks(wrap=None, widths=(4, 4, 4)):
    """Student, robust teacher, clean teacher."""
    torch.manual_seed(0)
    nets = [Net(width, *([wrap] if wrap else [])) for width in widths]
    for net in nets:
        net(torch.rand(32, 1, 8, 8))
        nn.init.normal_(net.linear.weight, std=0.3)
    return nets[0], nets[1].eval(), nets[2].eval()


def images():
    g = torch.Generator().manual_seed(1)
    return torch.rand(8, 1, 8, 8, generator=g), torch.randint(5, (8,), generator=g)


def prepared(name, student, teacher, clean_teacher, x, **options):
    """(method, nets, state) ready for the first step."""
    method = methods.get(name, attack=PGD(EPS, EPS / 4, 3), **options)
    nets = Nets(student, teacher, clean_teacher)
    method.prepare(nets, x)
    state = method.init_state("cpu")
    return method, nets, state


def outer(name, nets, x, y, x_adv, **options):
    """(loss, gradients of the student) of one step of a method on examples that are given."""
    method, nets, state = prepared(name, *nets, x, **options)
    loss, _ = method.outer(nets, Batch(x, y, x_adv=x_adv), state)
    return loss.detach(), torch.autograd.grad(loss, list(nets.student.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_float64_attacks_as_float32_does(name):
    """But for signs that rounding decides; and half networks as the float32 ones that they hold."""
    x, y = images()
    found = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        of_x = torch.float64 if dtype == torch.float64 else torch.float32
        nets = [net.to(dtype) for net in networks()]
        method, nets, state = prepared(name, *nets, x.to(of_x))
        start = (x + 0.01).clamp(0, 1).to(of_x)
        found[dtype] = method.perturb(nets, Batch(x.to(of_x), y), state, start=start)
        assert found[dtype].dtype == of_x
        assert (found[dtype] - x).abs().max() <= EPS + 1e-6
    low, high, half = found.values()
    assert ((high - low).abs() < 1e-5).double().mean() > 0.99
    assert ((half - low).abs() < 1e-5).double().mean() > 0.8


@pytest.mark.parametrize("name", NAMES)
def test_float64_trains_as_float32_does(name):
    (x, y), noise = images(), torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    x_adv = (x + EPS * (2 * noise - 1)).clamp(0, 1)
    low, grads = outer(name, networks(), x, y, x_adv)
    nets = [net.double() for net in networks()]
    high, exact = outer(name, nets, x.double(), y, x_adv.double())
    assert {tensor.dtype for tensor in (high, *exact)} == {torch.float64}
    torch.testing.assert_close(high.float(), low, rtol=1e-4, atol=1e-5)
    for g, e in zip(grads, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-3, atol=1e-4 * float(e.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_a_float64_gradient_is_a_difference_quotient(name):
    """To six digits, as no float32 on the way would leave it."""
    (x, y), h = (v.double() if v.is_floating_point() else v for v in images()), 1e-6
    student, *teachers = (net.double() for net in networks())
    x_adv = x + EPS * torch.rand(x.shape, generator=torch.Generator().manual_seed(2)).sign()
    x_adv = x_adv.clamp(0, 1)
    options = {"alpha": 0.0} if name == "ikl" else {}  # whose target is a constant of the gradient
    _, grads = outer(name, (student, *teachers), x, y, x_adv, **options)
    torch.manual_seed(3)
    direction = [torch.randn_like(g) for g in grads]

    def loss(step):
        moved = copy.deepcopy(student)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(d, alpha=step)
        return outer(name, (moved, *teachers), x, y, x_adv, **options)[0]

    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    torch.testing.assert_close((loss(h) - loss(-h)) / (2 * h), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_halves_learn(name, dtype):
    """Student and teachers in a half, whose logits methods see in float32."""
    x, y = images()
    nets = [net.to(dtype) for net in networks()]
    low, grads = outer(name, networks(), x, y, x)
    high, rough = outer(name, nets, x, y, x)
    assert high.dtype == torch.float32
    torch.testing.assert_close(high, low, rtol=0.1, atol=0.02)
    for g, r in zip(grads[-2:], rough[-2:], strict=True):
        assert r.dtype == dtype
        assert torch.cosine_similarity(g.flatten(), r.float().flatten(), 0) > 0.9 or g.norm() < 1e-4


WRAPS = {
    "object": lambda z: types.SimpleNamespace(logits=z),
    "tuple": lambda z: (z, z[:, :, None]),
    "dict": lambda z: {"logits": z, "loss": z.sum()},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrap", WRAPS)
def test_logits_are_found_in_what_networks_return(name, wrap):
    x, y = images()
    results = []
    for kind in (lambda z: z, WRAPS[wrap]):
        method, nets, state = prepared(name, *networks(kind), x)
        batch = Batch(x, y)
        batch.x_adv = method.perturb(nets, batch, state, start=x)
        loss, _ = method.outer(nets, batch, state)
        results.append((batch.x_adv, loss))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_what_has_no_logits_is_refused():
    x, y = images()
    student, teacher, _ = networks(lambda z: {"scores": z})
    for name, nets in (("at", (student,)), ("rslad", (student, teacher))):
        method, nets, state = methods.get(name), Nets(*nets), {}
        with pytest.raises(TypeError, match="returned a dict of 'scores', must return logits"):
            method.perturb(nets, Batch(x, y), state)


def test_the_student_is_asked_through_a_wrapper_of_itself():
    """A trainer may hold either."""
    net, *_ = networks()
    seen = Nets(net).student
    assert all(a is b for a, b in zip(seen.parameters(), net.parameters(), strict=True))
    assert seen.linear is net.linear
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = seen.nothing
    seen.eval()
    assert not net.training
    assert not Nets(net).student.training
    calls, (x, _) = [], images()
    handle = net.register_forward_hook(lambda module, args, output: calls.append((module, output)))
    assert isinstance(seen(x), torch.Tensor)
    handle.remove()
    ((module, output),) = calls
    assert module is net
    assert isinstance(output, types.SimpleNamespace)  # the network's own answer is as it was
    assert Nets(seen).student is seen
    assert Nets(net).student == seen
    assert len({Nets(net).student, seen}) == 1
    assert Nets(copy.deepcopy(net)).student != seen
    twin = freeze(net)
    assert Nets(net, teacher=twin).teacher is twin
    assert type(Nets(net).with_twin().student.net) is Net
    other = copy.deepcopy(seen)
    assert other.linear.weight is not net.linear.weight
    assert torch.equal(other(x), seen(x))


def test_a_traced_graph_is_a_student():
    x, y = images()
    net = torch.fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    nets = Nets(net, teacher=freeze(nn.Sequential(nn.Flatten(), nn.Linear(64, 5))))
    assert methods.get("rslad").perturb(nets, Batch(x, y), {}).shape == x.shape


def test_networks_of_other_kinds():
    """Compiled, scripted and containers of modules."""
    x, _ = images()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    expected = plain(x)
    for net in (plain, torch.compile(plain, backend="eager"), torch.jit.trace(plain, x)):
        seen = Nets(net).student
        torch.testing.assert_close(seen(x), expected)
        torch.testing.assert_close(seen(x.double()), expected)
        assert len(list(seen.parameters())) == 2
    torch.testing.assert_close(torch.compile(Nets(plain).student, backend="eager")(x), expected)


def test_what_is_no_network_is_refused():
    net = nn.Linear(3, 3).eval()
    for wrong in ("resnet18", 3, nn.Identity):
        with pytest.raises(TypeError, match="^student is .*, must be a torch.nn.Module"):
            Nets(wrong)
        for name in ("teacher", "clean_teacher", "student_twin"):
            with pytest.raises(TypeError, match=f"^{name} is .*, must be a torch.nn.Module"):
                Nets(net, **{name: wrong})
    with pytest.raises(TypeError, match="^student is None, must be a torch.nn.Module"):
        Nets(None)


def test_an_attack_that_cannot_ascend_is_refused():
    for attack in ("pgd", 3, PGD):
        with pytest.raises(TypeError, match="attack is .*, must be a PGD"):
            methods.get("at", attack=attack)


@pytest.mark.parametrize("name", ["at", "adaad"])
def test_every_attack_sees_the_networks_of_now(name):
    """Twins of student and teacher are refreshed before each."""
    (x, y), found = images(), []
    student, teacher, _ = networks()
    for twin in (None, freeze(student)):
        nets = Nets(student, freeze(teacher), student_twin=twin)
        method = methods.get(name, attack=PGD(EPS, EPS / 4, 3))
        before = method.perturb(nets, Batch(x, y), {}, start=x)
        with torch.no_grad():
            for net in (student, teacher):
                for p in net.parameters():
                    p.neg_()
        found = method.perturb(nets, Batch(x, y), {}, start=x)
        fresh = method.perturb(Nets(student, freeze(teacher)), Batch(x, y), {}, start=x)
        assert torch.equal(found, fresh)
        assert not torch.equal(found, before)


def trained(net):
    """Ways to change a network; versions of tensors do not tell of most."""
    fused = torch.optim.SGD(net.parameters(), 0.5, fused=True)

    def by_optimiser():
        fused.zero_grad()
        net(images()[0]).logits.square().sum().backward()
        fused.step()
        fused.zero_grad()

    def by_average():
        for p in net.parameters():
            p.data.mul_(0.5)

    def by_one_number():
        (*_, last) = net.parameters()
        last.data[-1] += 0.5

    def by_order():
        with_most = max(net.parameters(), key=torch.numel)
        with_most.data.copy_(with_most.data.flip(0))

    def by_loading():
        net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}, assign=True)

    return by_optimiser, by_average, by_one_number, by_order, by_loading


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("way", range(5))
def test_a_teacher_is_refreshed_when_its_model_has_changed(way, mode):
    (x, y), (student, teacher, _) = images(), networks()
    twin, change = freeze(teacher), trained(teacher)[way]
    method = methods.get("rslad", attack=PGD(EPS, EPS / 4, 1), attack_bn=mode)
    nets, counts = Nets(student, twin), []
    change()  # before the first attack: its twin is older than the model
    for changed in (False, False, True, False):
        if changed:
            change()
        batch = Batch(x, y)
        method.perturb(nets, batch, {})
        assert torch.equal(batch.teacher_logits(nets), freeze(teacher)(x))
        counts.append(twin.refreshes)
    first, *others = counts
    assert others == [first, first + 1, first + 1]


def test_a_teacher_of_a_method_without_attack_is_refreshed_too():
    (x, y), (student, teacher, _) = images(), networks()
    nets, method = Nets(student, torch.compile(freeze(teacher), backend="eager")), "funmatch"
    for _ in range(2):
        trained(teacher)[1]()
        batch = Batch(x, y)
        methods.get(method).perturb(nets, batch, {})
        assert torch.equal(batch.teacher_logits(nets), freeze(teacher)(x))


def test_an_images_start_is_its_own():
    """By the index of the batch, whatever its order."""
    (x, y), index = images(), torch.arange(50, 58)
    method, nets, state = prepared("at", *networks(), x)
    order, found = torch.randperm(8, generator=torch.Generator().manual_seed(1)), []
    method.attack.steps = 0
    for rows in (torch.arange(8), order):
        torch.manual_seed(4)
        batch = Batch(x[rows], y[rows], index=index[rows])
        found.append(method.perturb(nets, batch, state))
    assert torch.equal(found[0][order], found[1])


def test_projectors_are_of_the_features_dtype():
    x, y = images()
    nets = Nets(*[net.double() for net in networks(widths=(4, 6, 5))])
    method = methods.get("vfd+rslad", attack=PGD(EPS, EPS / 4, 1))
    method.prepare(nets, x.double())
    assert {p.dtype for p in method.parameters()} == {torch.float64}
    batch = Batch(x.double(), y)
    batch.x_adv = method.perturb(nets, batch, {})
    assert method.outer(nets, batch, {})[0].dtype == torch.float64


def test_attacks_whose_choice_of_iterate_no_method_makes_are_refused():
    x, y = images()
    for options in ({"restarts": 2}, {"keep": "best"}):
        method = methods.get("at", attack=PGD(EPS, EPS / 4, 1, **options))
        with pytest.raises(ValueError, match="restarts is .* and keep .*, must be 1 and 'last'"):
            method.perturb(Nets(networks()[0]), Batch(x, y), {})
    with pytest.raises(TypeError, match="attack is APGD.*, must be a PGD"):
        methods.get("at", attack=APGD(EPS))


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_any_integer_type(name):
    x, y = images()
    results = []
    for labels in (y, y.int()):
        method, nets, state = prepared(name, *networks(), x)
        batch = Batch(x, labels)
        batch.x_adv = x
        results.append(method.outer(nets, batch, state)[0])
    assert torch.equal(*results)


def test_vanilla_distillation_names_the_teacher_that_it_lacks():
    student, teacher, _ = networks()
    with pytest.raises(ValueError, match="nets.clean_teacher is None, must be a network"):
        methods.get("vfd+rslad").prepare(Nets(student, teacher), images()[0])
