"""mart_bce: MART's boosted cross-entropy and the gradient of its logits, against a sort per row."""

import torch
import torch.nn.functional as F
from timing import Case, pytest_cases

from fastadv import losses


def published(logits, y):
    q = F.softmax(logits, dim=1)
    likeliest = q.argsort(dim=1)[:, -2:]
    other = torch.where(likeliest[:, -1] == y, likeliest[:, -2], likeliest[:, -1])
    return F.cross_entropy(logits, y) + F.nll_loss((1.0001 - q + 1e-12).log(), other)


def case(batch, classes):
    logits = torch.randn(batch, classes, requires_grad=True)
    y = torch.randint(classes, (batch,))
    compiled = torch.compile(published)

    def both(loss):
        return loss, torch.autograd.grad(loss, logits)[0]

    def gate():
        results = (both(f(logits, y)) for f in (losses.mart_bce, published))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)

    return Case(
        "mart_bce",
        f"{batch}x{classes}",
        {
            "eager": lambda: both(published(logits, y)),
            "compile": lambda: both(compiled(logits, y)),
            "fastadv": lambda: both(losses.mart_bce(logits, y)),
        },
        gate,
        # The logits read, the gradient written, then read and written by autograd.
        nbytes=4 * logits.nbytes + y.nbytes,
    )


def cases():
    return [case(128, 10), case(128, 100), case(1024, 1000)]


test_mart_bce = pytest_cases(cases)
