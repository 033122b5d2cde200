"""random_start: uniform in both balls and Gaussian, against torch's generator as people use it."""

import torch
from timing import Case, pytest_cases

from fastadv import ops
from fastadv.ops.random_start import reference

EPS, SIGMA = 8 / 255, 1e-3


def linf(x):
    return torch.clamp(x + torch.empty_like(x).uniform_(-EPS, EPS), 0.0, 1.0)


def l2(x):
    noise = torch.randn_like(x).flatten(1)
    radius = EPS * torch.rand(len(x), 1, device=x.device) ** (1 / noise.shape[1])
    return torch.clamp(x + (noise * radius / noise.norm(dim=1, keepdim=True)).view_as(x), 0.0, 1.0)


def gaussian(x):
    return torch.clamp(x + SIGMA * torch.randn_like(x), 0.0, 1.0)


KINDS = {linf: ("uniform", "linf"), l2: ("uniform", "l2"), gaussian: ("gaussian", "linf")}


def case(plain, *shape):
    x = torch.rand(shape)
    nhwc, out = x.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
    compiled, kind = torch.compile(plain), KINDS[plain]

    def start(x, seed=None):
        return ops.random_start(x, EPS, *kind, SIGMA, seed=seed, lo=0.0, hi=1.0)

    def gate():
        seed = torch.tensor(1, device="cpu")
        expected = reference(x[:8], seed, None, None, EPS, *kind, SIGMA, 0, 0, 0.0, 1.0)
        torch.testing.assert_close(start(x, seed)[:8], expected, rtol=0, atol=1e-7)
        assert torch.equal(start(nhwc, seed), start(x, seed))

    return Case(
        f"random_start {plain.__name__}",
        "x".join(map(str, shape)),
        {
            "eager": lambda: plain(x),
            "compile": lambda: compiled(x),
            "fastadv": lambda: start(x),
            "fastadv channels_last": lambda: start(nhwc),
            "torch.abs(out=)": lambda: torch.abs(x, out=out),
        },
        gate,
        nbytes=2 * x.nbytes,
    )


def cases():
    shapes = (128, 3, 32, 32), (64, 3, 224, 224)
    return [case(plain, *shape) for plain in KINDS for shape in shapes]


test_random_start = pytest_cases(cases)
