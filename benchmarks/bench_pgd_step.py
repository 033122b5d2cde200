"""pgd_step: one linf step with projection and clip, against the loop as TRADES publishes it."""

import torch
from timing import Case, pytest_cases

from fastadv import ops

EPS, STEP = 8 / 255, 2 / 255


def published(x_adv, grad, x):
    x_adv = x_adv.detach() + STEP * torch.sign(grad)
    x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS)
    return torch.clamp(x_adv, 0.0, 1.0)


def published_(x_adv, grad, x):
    x_adv.copy_(published(x_adv, grad, x))


def case(*shape):
    x = torch.rand(shape)
    x_adv, grad = x + 0.01 * torch.randn(shape), torch.randn(shape)
    buffer, out = x_adv.clone(), torch.empty_like(x)
    compiled, compiled_ = torch.compile(published), torch.compile(published_)

    def gate():
        expected = published(x_adv, grad, x)
        assert torch.equal(ops.pgd_step(x_adv, grad, x, EPS, STEP), expected)
        assert torch.equal(ops.pgd_step_(x_adv.clone(), grad, x, EPS, STEP), expected)

    return Case(
        "pgd_step",
        "x".join(map(str, shape)),
        {
            "eager": lambda: published(x_adv, grad, x),
            "compile": lambda: compiled(x_adv, grad, x),
            "compile in place": lambda: compiled_(buffer, grad, x),
            "fastadv": lambda: ops.pgd_step(x_adv, grad, x, EPS, STEP),
            "fastadv in place": lambda: ops.pgd_step_(buffer, grad, x, EPS, STEP),
            "torch.add(out=)": lambda: torch.add(x, grad, out=out),
        },
        gate,
        nbytes=4 * x.nbytes,
        exceptions={"torch.add(out=)": 3 * x.nbytes},
    )


def cases():
    return [case(128, 3, 32, 32), case(64, 3, 224, 224)]


test_pgd_step = pytest_cases(cases())
