"""softmax_kl: the distillation loss and the gradient of its logits, forward and backward."""

import torch
import torch.nn.functional as F
from timing import Case, pytest_cases

from fastadv import losses


def published(student, teacher):
    log_p, q = F.log_softmax(student, dim=1), F.softmax(teacher, dim=1)
    return F.kl_div(log_p, q, reduction="batchmean")


def case(batch, classes, both=False):
    """The gradient to the student, or to both (TRADES, AdaAD); a teacher alone is a constant."""
    student = torch.randn(batch, classes, requires_grad=True)
    teacher = torch.randn(batch, classes, requires_grad=both)
    inputs = [student, teacher] if both else [student]
    compiled = torch.compile(published)

    def step(loss):
        return lambda: torch.autograd.grad(loss(student, teacher), inputs)

    def gate():
        for got, expected in zip(step(losses.kl)(), step(published)(), strict=True):
            torch.testing.assert_close(got, expected)

    name = f"{batch}x{classes}" + (" both" if both else "")
    # Both logits read, the gradients written, then read and written once more by autograd.
    nbytes = student.nbytes * (2 + 3 * len(inputs))
    return Case(
        "softmax_kl",
        name,
        {
            "eager": step(published),
            "compile": step(compiled),
            "fastadv": step(losses.kl),
        },
        gate,
        nbytes=nbytes,
    )


def cases():
    shapes = (128, 10), (1024, 10), (1024, 100), (1024, 1000)
    return [*(case(*shape) for shape in shapes), case(1024, 10, both=True)]


test_softmax_kl = pytest_cases(cases)
