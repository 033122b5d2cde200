"""The approximation of methods that ask the teacher inside the attack: at every m-th step only."""

import math

import pytest
import torch
from papers import EPS, STEP, kl

from fastadv import methods, models
from fastadv.attacks import PGD
from fastadv.methods.base import StaleTeacher
from fastadv.train.cli import parse

NAMES = ("adaad", "advfunmatch", "vfd+adaad")


@pytest.fixture
def nets():
    """Student and teacher in float32, the teacher counting its calls in `nets.teacher.asked`."""
    torch.manual_seed(0)
    student, teacher = (models.get("digits_net", in_channels=1, width=width) for width in (4, 8))
    for net in (student, teacher):
        net(torch.rand(64, 1, 8, 8))
    teacher.eval().requires_grad_(False).asked = []
    teacher.register_forward_hook(lambda module, args, output: teacher.asked.append(args[0]))
    return methods.Nets(student, teacher)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(8, 1, 8, 8, generator=generator)
    return methods.Batch(x, torch.zeros(8, dtype=torch.int64)), x + 1e-3


def attack(name, nets, batch, steps=5, **options):
    method = methods.get(name, attack=PGD(EPS, STEP, steps), **options)
    x_adv = method.perturb(nets, batch[0], {}, start=batch[1])
    calls, nets.teacher.asked[:] = len(nets.teacher.asked), []
    return x_adv, calls


def by_hand(nets, x, x_adv, steps, every):
    """The attack as a plain loop, the teacher's logits a constant where they are old."""
    nets.student.eval()
    for step in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        if step % every == 0:
            target = z = nets.teacher(x_adv)
        else:
            target = z.detach()
        grad = torch.autograd.grad(kl(target, nets.student(x_adv)) * len(x), x_adv)[0]
        x_adv = x_adv.detach() + STEP * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    nets.teacher.asked.clear()
    return x_adv


@pytest.mark.parametrize("name", NAMES)
def test_one_is_the_method_itself(nets, batch, name):
    exact, calls = attack(name, nets, batch)
    assert calls == 5
    assert attack(name, nets, batch, teacher_every=1)[0].equal(exact)
    assert not attack(name, nets, batch, teacher_every=2)[0].equal(exact)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "every"), [(4, 2), (5, 2), (7, 3), (2, 5), (0, 2)])
def test_the_teacher_is_asked_at_every_mth_step(nets, batch, name, steps, every):
    assert attack(name, nets, batch, steps, teacher_every=every)[1] == math.ceil(steps / every)


def test_old_logits_hold_no_graph(nets, batch):
    stale = StaleTeacher(nets.teacher, 2)
    x = batch[0].x.requires_grad_()
    assert [stale(x).requires_grad for _ in range(4)] == [True, False, True, False]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_between_its_last_logits_are_a_constant_target(nets, batch, every):
    x_adv, _ = attack("adaad", nets, batch, teacher_every=every)
    expected = by_hand(nets, batch[0].x, batch[1], 5, every)
    assert (x_adv - expected).abs().max() < 1e-5


def test_a_fresh_attack_asks_afresh_also_after_an_exception(nets, batch):
    """Three steps with m = 2 end on a step that asks, so that state kept on would show."""
    method = methods.get("adaad", attack=PGD(EPS, STEP, 3), teacher_every=2)
    first = method.perturb(nets, batch[0], {}, start=batch[1])
    assert method.perturb(nets, batch[0], {}, start=batch[1]).equal(first)

    def fail(module, args, output):
        raise RuntimeError("no logits today")

    handle = nets.student_twin.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no logits today"):
        method.perturb(nets, batch[0], {}, start=batch[1])
    handle.remove()
    nets.teacher.asked.clear()
    assert method.perturb(nets, batch[0], {}, start=batch[1]).equal(first)
    assert len(nets.teacher.asked) == 2


def test_the_outer_problem_sees_the_teacher_itself(nets, batch):
    method = methods.get("adaad", attack=PGD(EPS, STEP, 2), teacher_every=2)
    ours, start = batch
    ours.x_adv = method.perturb(nets, ours, {}, start=start)
    method.outer(nets, ours, {})
    assert nets.teacher.asked[-1] is ours.x_adv


def test_the_command_line_sets_it(tmp_path):
    argv = ["--method", "adaad", "--set", "teacher_every=2", "--out", str(tmp_path / "run")]
    config, _ = parse(argv)
    assert methods.get(config.method, **config.method_options).teacher_every == 2


@pytest.mark.parametrize("value", [0, 1.5])
def test_a_value_that_counts_no_steps_is_refused(value):
    with pytest.raises(ValueError, match=f"teacher_every is {value}, must be a whole number"):
        methods.get("advfunmatch", teacher_every=value)
