"""batch_norm: in train mode with a residual sum and ReLU, forward and backward in channels_last,
against torch's modules."""

import copy

import torch
import torch.nn.functional as F
from timing import Case, pytest_cases
from torch import nn

from fastadv import ops


def modules(norm, x, residual):
    out = norm(x)
    return F.relu(out if residual is None else out + residual)


def fused(norm, x, residual):
    return ops.batch_norm(norm, x, F.relu, residual)


def case(*shape, added=False, dtype=torch.bfloat16):
    maps = (torch.randn(shape).to(dtype) for _ in range(3))
    x, residual, grad = (v.contiguous(memory_format=torch.channels_last) for v in maps)
    norm, compiled = nn.BatchNorm2d(shape[1]), torch.compile(modules)
    inputs = [x.requires_grad_(), residual.requires_grad_()][: 1 + added]

    def both(call, inputs=inputs, grad=grad, norm=norm):
        y = call(norm, inputs[0], inputs[1] if added else None)
        return y, *torch.autograd.grad(y, [*inputs, *norm.parameters()], grad)

    def gate():
        exact = [v.detach().double().requires_grad_() for v in inputs]
        exact = both(modules, exact, grad.double(), copy.deepcopy(norm).double())
        eager, *others = (both(f, norm=copy.deepcopy(norm)) for f in (modules, compiled, fused))
        for usual, want, *found in zip(eager, exact, *others, strict=True):
            for got in found:
                bound = 2 * (usual - want).norm() + torch.finfo(dtype).eps * want.norm()
                assert (got - want).norm() <= bound

    name = "x".join(map(str, shape)) + (" bf16" if dtype == torch.bfloat16 else "")
    return Case(
        "batch_norm",
        name + (" + residual" if added else ""),
        {
            "eager": lambda: both(modules),
            "compile": lambda: both(compiled),
            "fastadv": lambda: both(fused),
        },
        gate,
        nbytes=(7 if added else 5) * x.nbytes,
    )


def cases():
    maps = [(64, 64, 32, 32), (64, 192, 16, 16), (64, 512, 4, 4)]
    plain = [case(*shape) for shape in maps]
    return [*plain, case(*maps[0], added=True), case(*maps[0], dtype=torch.float32)]


test_batch_norm = pytest_cases(cases)
