"""pgd_step: one step with projection and clip, against the loop as TRADES (linf) and
robust_overfitting (l2) publish it."""

import torch
from timing import LOOPS, Case, in_graph, pytest_cases

from fastadv import ops

EPS, STEP = {"linf": 8 / 255, "l2": 0.5}, {"linf": 2 / 255, "l2": 0.125}


def norms(v):
    return v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))


def published(x_adv, grad, x, norm="linf"):
    eps, step = EPS[norm], STEP[norm]
    if norm == "l2":
        d = x_adv + step * grad / norms(grad) - x
        return torch.clamp(x + d * torch.clamp(eps / norms(d), max=1.0), 0.0, 1.0)
    x_adv = x_adv.detach() + step * torch.sign(grad)
    x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
    return torch.clamp(x_adv, 0.0, 1.0)


def case(*shape, norm="linf", graph=False):
    """graph: also as a CUDA graph of many steps, in whose time the host has next to no part."""
    x = torch.rand(shape)
    x_adv, grad = x + 0.01 * torch.randn(shape), torch.randn(shape)
    buffer, out = x_adv.clone(), torch.empty_like(x)
    args, options = (grad, x, EPS[norm], STEP[norm]), {"norm": norm}
    compiled = torch.compile(published)

    def published_(x_adv):
        x_adv.copy_(published(x_adv, grad, x, norm))

    def in_place():
        ops.pgd_step_(buffer, *args, **options)

    compiled_ = torch.compile(published_)

    def gate():
        expected = published(x_adv, grad, x, norm)
        exact = {"rtol": 0, "atol": 0} if norm == "linf" else {}
        for step in (ops.pgd_step, ops.pgd_step_):
            got = step(x_adv.clone(), *args, **options)
            torch.testing.assert_close(got, expected, **exact)

    providers = {
        "eager": lambda: published(x_adv, grad, x, norm),
        "compile": lambda: compiled(x_adv, grad, x, norm),
        "compile in place": lambda: compiled_(buffer),
        "fastadv": lambda: ops.pgd_step(x_adv, *args, **options),
        "fastadv in place": in_place,
        "torch.add(out=)": lambda: torch.add(x, grad, out=out),
    }
    graphs = {"fastadv in a graph": in_graph(in_place)} if graph else {}
    return Case(
        "pgd_step" if norm == "linf" else "pgd_step l2",
        "x".join(map(str, shape)),
        providers | graphs,
        gate,
        nbytes=4 * x.nbytes,
        exceptions={"torch.add(out=)": 3 * x.nbytes},
        loops=dict.fromkeys(graphs, LOOPS),
    )


def cases():
    return [case(128, 3, 32, 32), case(64, 3, 224, 224)]


test_pgd_step = pytest_cases(cases)
