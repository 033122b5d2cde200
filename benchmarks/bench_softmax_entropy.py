"""softmax_entropy: the mean entropy of a batch and the gradient of its logits."""

import torch
import torch.nn.functional as F
from timing import Case, pytest_cases

from fastadv import losses


def exact(logits):
    log_q = F.log_softmax(logits, dim=1)
    return -(log_q.exp() * log_q).sum(dim=1).mean()


def guarded(logits):
    q = F.softmax(logits, dim=1)
    return -(q * (q + 1e-5).log()).sum(dim=1).mean()


def case(batch, classes, published, offset):
    logits = torch.randn(batch, classes, requires_grad=True)
    compiled = torch.compile(published)

    def ours(logits):
        return losses.entropy(logits, offset=offset, reduction="mean")

    def both(loss):
        return loss, torch.autograd.grad(loss, logits)[0]

    def gate():
        for got, expected in zip(both(ours(logits)), both(published(logits)), strict=True):
            torch.testing.assert_close(got, expected)

    return Case(
        "softmax_entropy",
        f"{batch}x{classes} {published.__name__}",
        {
            "eager": lambda: both(published(logits)),
            "compile": lambda: both(compiled(logits)),
            "fastadv": lambda: both(ours(logits)),
        },
        gate,
        # The logits read, the gradient written, then read and written by autograd.
        nbytes=4 * logits.nbytes,
    )


def cases():
    shapes = (128, 10), (128, 100), (1024, 1000)
    forms = (exact, 0.0), (guarded, 1e-5)
    return [case(*shape, *form) for form in forms for shape in shapes]


test_softmax_entropy = pytest_cases(cases)
