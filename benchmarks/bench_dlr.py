"""dlr: the difference of logits ratio of a batch and its gradient, against a sort of each row."""

import torch
from timing import Case, pytest_cases

from fastadv import losses


def published(logits, y):
    ranked, order = logits.sort(dim=1)
    right = (order[:, -1] == y).to(logits.dtype)
    other = ranked[:, -2] * right + ranked[:, -1] * (1 - right)
    own = logits[torch.arange(len(y), device=y.device), y]
    return -(own - other) / (ranked[:, -1] - ranked[:, -3] + 1e-12)


def case(batch, classes):
    logits = torch.randn(batch, classes, requires_grad=True)
    y = torch.randint(classes, (batch,))
    compiled = torch.compile(published)

    def both(loss):
        return loss, torch.autograd.grad(loss.sum(), logits)[0]

    def gate():
        results = (both(f(logits, y)) for f in (losses.dlr, published))
        (loss, gradient), (expected, wanted) = results
        torch.testing.assert_close(loss, expected)
        tied = (logits.topk(4).values.diff() == 0).any(dim=1)  # torch may take another of equals
        torch.testing.assert_close(gradient[~tied], wanted[~tied])

    return Case(
        "dlr",
        f"{batch}x{classes}",
        {
            "eager": lambda: both(published(logits, y)),
            "compile": lambda: both(compiled(logits, y)),
            "fastadv": lambda: both(losses.dlr(logits, y)),
        },
        gate,
        nbytes=2 * logits.nbytes + y.nbytes + 4 * batch,
    )


def cases():
    return [case(128, 10), case(128, 100), case(128, 1000)]


test_dlr = pytest_cases(cases)
