"""apgd_step: one linf APGD step and its bookkeeping, against the same in plain torch, where a tenth
of the samples have risen, a tenth have newly become wrong and another goes back to its best."""

import torch
from timing import Case, pytest_cases

from fastadv import ops

EPS, WEIGHT = 8 / 255, 0.75


def project(x_adv, x):
    return torch.clamp(torch.min(torch.max(x_adv, x - EPS), x + EPS), 0.0, 1.0)


def keep(better, new, old):
    return torch.where(better[:, None, None, None], new, old)


def published(x_adv, x_old, x_best, grad_best, x_found, bad, grad, x, step_size, *flags):
    better_best, better_found, restart = flags
    finite = grad.isfinite()
    bad = bad + (~finite.flatten(1).all(1)).sum()
    grad = torch.where(finite, grad, 0.0)
    x_found = keep(better_found, x_adv, x_found)
    x_best, grad_best = keep(better_best, x_adv, x_best), keep(better_best, grad, grad_best)
    x_adv, grad = keep(restart, x_best, x_adv), keep(restart, grad_best, grad)
    z = project(x_adv + step_size[:, None, None, None] * torch.sign(grad), x)
    moved = project(x_adv + WEIGHT * (z - x_adv) + (1 - WEIGHT) * (x_adv - x_old), x)
    return moved, x_adv, x_best, grad_best, x_found, bad


def fastadv_(*args):
    names = "better_best", "better_found", "restart"
    ops.apgd_step_(*args[:9], **dict(zip(names, args[9:], strict=True)), eps=EPS, weight=WEIGHT)
    return args[:6]


def case(*shape):
    x = torch.rand(shape)
    images = [project(x + 0.01 * torch.randn(shape), x) for _ in range(4)]
    x_adv, x_old, x_best, x_found = images
    step_size, bad = torch.full(shape[:1], EPS), torch.tensor(0)
    flags = [torch.rand(shape[0]) < 0.1 for _ in range(3)]
    rest = (torch.randn(shape), x, step_size, *flags)
    args = (x_adv, x_old, x_best, torch.randn(shape), x_found, bad, *rest)
    buffers = (*(tensor.clone() for tensor in args[:6]), *rest)
    compiled = torch.compile(published)

    def gate():
        got = fastadv_(*(tensor.clone() for tensor in args))
        assert all(map(torch.equal, got, published(*args)))

    return Case(
        "apgd_step",
        "x".join(map(str, shape)),
        {
            "eager": lambda: published(*args),
            "compile": lambda: compiled(*args),
            "fastadv": lambda: fastadv_(*buffers),
        },
        gate,
        nbytes=6 * x.nbytes,  # without what a tenth of the samples have besides
    )


def cases():
    return [case(128, 3, 32, 32), case(64, 3, 224, 224)]


test_apgd_step = pytest_cases(cases)
