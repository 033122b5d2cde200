"""Each method against a plain transcription of its paper: x_adv, loss, gradients, BatchNorm."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastadv import freeze, methods, models
from fastadv.attacks import PGD

EPS, STEP, STEPS = 8 / 255, 2 / 255, 3


def kl(target, logits):
    """KL(softmax(target) || softmax(logits)), batch mean, by definition."""
    p, q = logits.softmax(1), target.softmax(1)
    return (q * (q.log() - p.log())).sum(1).mean()


def attacked(x, start, objective):
    x_adv = start.clone()
    for _ in range(STEPS):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(objective(x_adv) * len(x), x_adv)
        x_adv = x_adv.detach() + STEP * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv


def at(s, t, x, y, start):
    s.eval()
    x_adv = attacked(x, start, lambda v: F.cross_entropy(s(v), y))
    s.train()
    return x_adv, F.cross_entropy(s(x_adv), y)


def trades(s, t, x, y, start, beta=6.0):
    s.eval()
    clean = s(x).detach()
    x_adv = attacked(x, start, lambda v: kl(clean, s(v)))
    s.train()
    clean, adv = s(x), s(x_adv)
    return x_adv, F.cross_entropy(clean, y) + beta * kl(clean, adv)


def rslad(s, t, x, y, start):
    z = t(x).detach()
    s.eval()
    x_adv = attacked(x, start, lambda v: kl(z, s(v)))
    s.train()
    q, adv, clean = z.softmax(1), s(x_adv), s(x)
    # The authors' CIFAR-10 loss: means over batch and classes.
    loss = 5 / 6 * (q * (q.log() - adv.log_softmax(1))).mean()
    return x_adv, loss + 1 / 6 * (q * (q.log() - clean.log_softmax(1))).mean()


def natural(s, t, x, y, start):
    s.train()
    return x, F.cross_entropy(s(x), y)


@pytest.fixture
def setup():
    torch.manual_seed(0)
    student, teacher = models.get("resnet18", width=4), models.get("resnet18", width=8)
    for net in (student, teacher):
        for _ in range(3):
            net(torch.rand(64, 3, 8, 8))
    x, y = torch.rand(8, 3, 8, 8), torch.randint(10, (8,))
    return student.double(), teacher.double().eval(), x.double(), y


@pytest.mark.parametrize(
    ("name", "paper"), [("natural", natural), ("at", at), ("trades", trades), ("rslad", rslad)]
)
def test_follows_the_paper(setup, name, paper):
    """In float64, where rounding cannot flip a sign."""
    student, teacher, x, y = setup
    ours, theirs = student, copy.deepcopy(student)
    start = x + 1e-3 * torch.randn_like(x)
    x_adv, loss = paper(theirs, teacher, x, y, start)
    loss.backward()

    method = methods.get(name, attack=PGD(EPS, STEP, STEPS))
    nets = methods.Nets(student=ours.train(), teacher=teacher, student_twin=DoubleTwin(ours))
    batch, state = methods.Batch(x=x, y=y), method.init_state("cpu")
    batch.x_adv = method.perturb(nets, batch, state, start=start)
    before = [m.training for m in ours.modules()]
    our_loss, state = method.outer(nets, batch, state)
    our_loss.backward()

    assert all(before)
    torch.testing.assert_close(batch.x_adv, x_adv, rtol=0, atol=1e-12)
    torch.testing.assert_close(our_loss, loss)
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-10, msg=key)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


class DoubleTwin(torch.nn.Module):
    """freeze() returns float32 logits; this test compares in float64."""

    def __init__(self, model):
        super().__init__()
        self.twin = freeze(model)

    def forward(self, x):
        return self.twin.net(x)


def test_trades_target_is_not_detached(setup):
    student, _, x, y = setup
    method = methods.get("trades")
    outputs = []

    def keep(module, args, output):
        output.retain_grad()
        outputs.append(output)

    student.train().register_forward_hook(keep)
    loss, _ = method.outer(
        methods.Nets(student), methods.Batch(x, y, x_adv=(x + 0.03).clamp(0, 1)), {}
    )
    (loss - F.cross_entropy(outputs[0], y)).backward()
    assert outputs[0].grad.abs().max() > 1e-6


@pytest.mark.parametrize("attack_bn", ["eval", "train"])
def test_attack_bn_decides_whether_the_attack_moves_the_statistics(setup, attack_bn):
    student, _, x, y = setup
    student.float().train()
    method = methods.get("at", attack=PGD(EPS, STEP, STEPS), attack_bn=attack_bn)
    method.perturb(methods.Nets(student), methods.Batch(x.float(), y), {})
    assert student.bn1.num_batches_tracked == (3 if attack_bn == "eval" else 3 + STEPS)
    assert all(m.training for m in student.modules())
    assert all(p.grad is None for p in student.parameters())


def test_teacher_runs_once_per_batch_without_gradient(setup):
    student, teacher, x, y = setup
    calls = []
    teacher.register_forward_hook(lambda m, i, o: calls.append(o.requires_grad))
    method = methods.get("rslad", attack=PGD(EPS, STEP, 2))
    nets, batch = methods.Nets(student.float(), teacher.float()), methods.Batch(x.float(), y)
    batch.x_adv = method.perturb(nets, batch, {})
    method.outer(nets, batch, {})
    assert calls == [False]


def test_errors_name_what_is_wrong(setup):
    student, _, x, y = setup
    with pytest.raises(
        ValueError, match="method is 'rsald', must be one of natural, at, trades, rslad"
    ):
        methods.get("rsald")
    with pytest.raises(ValueError, match="nets.teacher is None"):
        methods.get("rslad").perturb(methods.Nets(student), methods.Batch(x, y), {})
    with pytest.raises(ValueError, match="attack_bn is 'frozen', must be 'eval' or 'train'"):
        methods.get("at", attack_bn="frozen")
