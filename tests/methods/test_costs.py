"""What a step of each method costs, in passes through its networks, as docs/choosing.md has it."""

import re
from pathlib import Path

import pytest
from test_nets import images, networks

from fastadv import methods
from fastadv.attacks import PGD

PAGE = Path(__file__).parents[2] / "docs" / "choosing.md"
OPTIONS = {"iad1": {"begin": 0}, "iad2": {"begin": 0}}  # from when on the student's own say counts


class Passes:
    """Counts a network's passes, forward and backward, in batches of `size` images."""

    def __init__(self, net, size):
        self.forward, self.backward, self.size = 0.0, 0.0, size
        net.conv.register_forward_hook(self._seen)

    def _seen(self, module, given, out):
        self.forward += len(out) / self.size
        if out.requires_grad:
            out.register_hook(self._back)

    def _back(self, grad):
        self.backward += len(grad) / self.size


def cost(name):
    """(student forward, backward, teachers forward, that can be cached, backward) of one step with
    an attack of 10 steps."""
    nets, (x, y) = networks(), images()
    method = methods.get(name, attack=PGD(8 / 255, 2 / 255, 10), **OPTIONS.get(name, {}))
    for teacher in nets[1:]:
        teacher.requires_grad_(False)
    given = [
        net if which in ("student", *method.teachers) else None
        for which, net in zip(("student", "teacher", "clean_teacher"), nets, strict=True)
    ]
    nets = methods.Nets(*given, student_twin=given[0])  # so that the passes of the attack count
    method.prepare(nets, x)
    state = method.init_state("cpu")
    student, *teachers = (Passes(net, len(x)) for net in given if net is not None)
    batch = methods.Batch(x, y)
    batch.x_adv = method.perturb(nets, batch, state)
    loss, _ = method.outer(nets, batch, state)
    loss.backward()
    forward, backward = (
        sum(getattr(t, kind) for t in teachers) for kind in ("forward", "backward")
    )
    cached = sum(bool(names) for names in method.cacheable().values())
    return student.forward, student.backward, forward, cached, backward


def rows():
    """{method: its numbers} of the page's table."""
    found = re.findall(r"^\| `([^`]+)` \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    return {
        name: tuple(float(cell.strip() or 0) for cell in cells.split("|")) for name, cells in found
    }


@pytest.mark.parametrize("name", [*methods.METHODS, "igdm+rslad", "vfd+at"])
def test_the_page_has_the_passes_of_a_step(name):
    assert rows()[name] == pytest.approx(cost(name))
