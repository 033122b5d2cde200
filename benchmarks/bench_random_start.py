"""random_start: a uniform linf and a Gaussian start, against torch's generator as people use it."""

import torch
from timing import Case, pytest_cases

from fastadv import ops, reference

EPS, SIGMA = 8 / 255, 1e-3


def uniform(x):
    return torch.clamp(x + torch.empty_like(x).uniform_(-EPS, EPS), 0.0, 1.0)


def gaussian(x):
    return torch.clamp(x + SIGMA * torch.randn_like(x), 0.0, 1.0)


def case(plain, init, *shape):
    x = torch.rand(shape)
    nhwc, out = x.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
    compiled = torch.compile(plain)

    def start(x, norm="linf", seed=None):
        return ops.random_start(x, EPS, init, norm, SIGMA, seed=seed, lo=0.0, hi=1.0)

    def gate():
        seed = torch.tensor(1)
        args = None, None, EPS, init, "linf", SIGMA, 0, 0, 0.0, 1.0
        expected = reference.random_start(x[:8], seed, *args)
        torch.testing.assert_close(start(x, seed=seed)[:8], expected, rtol=0, atol=1e-7)
        assert torch.equal(start(nhwc, seed=seed), start(x, seed=seed))

    providers = {
        "eager": lambda: plain(x),
        "compile": lambda: compiled(x),
        "fastadv": lambda: start(x),
        "fastadv channels_last": lambda: start(nhwc),
    }
    if init == "uniform":
        providers["fastadv l2"] = lambda: start(x, "l2")
    providers["torch.abs(out=)"] = lambda: torch.abs(x, out=out)
    name, nbytes = f"random_start {init}", 2 * x.nbytes
    return Case(name, "x".join(map(str, shape)), providers, gate, nbytes)


def cases():
    return [case(plain, plain.__name__, *shape) for plain in (uniform, gaussian)
            for shape in ((128, 3, 32, 32), (64, 3, 224, 224))]  # fmt: skip


test_random_start = pytest_cases(cases())
