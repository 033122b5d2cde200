"""cross_entropy: the training loss and the gradient of its logits, forward and backward."""

import torch
import torch.nn.functional as F
from timing import Case, pytest_cases

from fastadv import losses


def case(batch, classes, soft=False, label_smoothing=0.0):
    logits = torch.randn(batch, classes, requires_grad=True)
    target = torch.randint(classes, (batch,))
    if soft:
        target = torch.randn(batch, classes).softmax(dim=1)
    compiled = torch.compile(F.cross_entropy)

    def step(loss):
        def call():
            value = loss(logits, target, label_smoothing=label_smoothing)
            return value, torch.autograd.grad(value, logits)[0]

        return call

    def gate():
        calls = step(losses.cross_entropy), step(F.cross_entropy)
        for got, expected in zip(*(call() for call in calls), strict=True):
            torch.testing.assert_close(got, expected)

    smoothed = f" smoothing {label_smoothing}" if label_smoothing else ""
    return Case(
        "cross_entropy",
        f"{batch}x{classes}{' soft' if soft else ''}{smoothed}",
        {
            "eager": step(F.cross_entropy),
            "compile": step(compiled),
            "fastadv": step(losses.cross_entropy),
        },
        gate,
        # The logits and the target read, the gradient written, then read and written by autograd.
        nbytes=4 * logits.nbytes + target.nbytes,
    )


def cases():
    shapes = (128, 10), (128, 100), (1024, 1000)
    return [
        *(case(*shape) for shape in shapes),
        case(128, 100, label_smoothing=0.1),
        *(case(*shape, soft=True) for shape in shapes),
    ]


test_cross_entropy = pytest_cases(cases)
