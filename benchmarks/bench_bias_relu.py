"""bias_relu: bias, residual sum and ReLU after a convolution, with the gradient of both, against
torch's ops, which it is on a CPU."""

import torch
import torch.nn.functional as F
from timing import Case, pytest_cases

from fastadv import ops


def modules(x, bias, residual):
    return F.relu(x + bias[:, None, None] + residual)


def fused(x, bias, residual):
    return ops.bias_relu(x, bias, residual)[0]


def case(*shape, dtype=torch.bfloat16):
    maps = (torch.randn(shape).to(dtype, memory_format=torch.channels_last) for _ in range(3))
    x, residual, grad = maps
    inputs, bias = [x.requires_grad_(), residual.requires_grad_()], torch.randn(shape[1]).to(dtype)
    compiled = torch.compile(modules)

    def both(call):
        y = call(x, bias, residual)
        return y, *torch.autograd.grad(y, inputs, grad)

    def gate():
        for got, expected in zip(both(fused), both(modules), strict=True):
            torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)

    name = "x".join(map(str, shape)) + (" bf16" if dtype == torch.bfloat16 else "")
    return Case(
        "bias_relu",
        name,
        {
            "eager": lambda: both(modules),
            "compile": lambda: both(compiled),
            "fastadv": lambda: both(fused),
        },
        gate,
        # Two maps and a gradient read, a map and a gradient written, a bit per element both ways.
        nbytes=5 * x.nbytes + x.numel() // 4,
    )


def cases():
    return [case(64, 64, 32, 32)]


test_bias_relu = pytest_cases(cases)
