"""random_start: x plus noise from a counter-based generator, clipped.

    zero:     x' = clip(x, lo, hi)
    uniform:  x' = clip(x + delta, lo, hi), delta uniform in the eps-ball of `norm`
    gaussian: x' = clip(x + sigma N(0, 1), lo, hi)

x: [B, ...]; result: the same shape, dtype and layout. Not differentiable.

Noise is a function of (seed, index, step, restart, element), elements numbered in logical order:
threads, batch composition, memory layout and instruction set change no bit of it. The words are
Philox4x32-10 (Salmon et al. 2011): word element % 4 of the counter (element // 4, index mod 2^32,
step, restart) under the key `seed`; the block 0xFFFFFFFF holds the radius of the l2 ball.
Uniform linf noise is eps (2 u - 1), u on the grid k 2^-24, equal in the reference to the bit.
Normal draws (Box-Muller) end at 5.77; the kernels agree with each other to the bit and with the
fp64 reference within 1.2 ulp (measured over all radii and all angles).
"""

import math

import torch

from . import _native, reference
from ._library import define, expect
from ._radius import radius


def _check(x, seed, index, eps_per_sample, eps, init, norm, sigma, step, restart, lo, hi):
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x is {x.dtype}, must be torch.float32")
    if x.dim() == 0:
        raise ValueError("x has shape (), must be [B, ...]")
    expect("seed", seed, dtype=torch.int64)
    if seed.numel() != 1 or seed.device.type not in ("cpu", "meta"):
        raise ValueError(f"seed is {tuple(seed.shape)} on {seed.device}, must be one value on cpu")
    if index is not None:
        expect("index", index, dtype=torch.int64, like=x, shape=x.shape[:1])
    if eps_per_sample is not None:
        expect("eps", eps_per_sample, dtype=x.dtype, like=x, shape=x.shape[:1])
    if init not in ("zero", "uniform", "gaussian"):
        raise ValueError(f"init is {init!r}, must be 'zero', 'uniform' or 'gaussian'")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm is {norm!r}, must be 'linf' or 'l2'")
    if not sigma >= 0:
        raise ValueError(f"sigma is {sigma}, must be at least 0")
    for name, count in (("step", step), ("restart", restart)):
        if not 0 <= count < 2**32:
            raise ValueError(f"{name} is {count}, must be in [0, 2^32)")


def _compiled(x, seed, index, eps_per_sample, eps, init, *rest):
    if x.dtype != torch.float32 or init == "zero":
        return reference.random_start(x, seed, index, eps_per_sample, eps, init, *rest)
    dense = x if _native.is_dense(x) else x.contiguous()
    index, eps_per_sample = (t if t is None else t.contiguous() for t in (index, eps_per_sample))
    out = _native.empty_like(dense)
    _native.random_start(out, dense, seed, index, eps_per_sample, eps, init, *rest)
    return out if dense is x else torch.empty_like(x).copy_(out)


def _cuda(x, seed, index, eps_per_sample, eps, init, norm, *rest):
    return x.dtype == torch.float32 and init == "uniform" and norm == "linf"


_random_start = define(
    "random_start(Tensor x, Tensor seed, Tensor? index, Tensor? eps_per_sample, float eps, "
    "str init, str norm, float sigma, int step, int restart, float lo, float hi) -> Tensor",
    check=_check,
    reference=reference.random_start,
    native=_compiled,
    kernel="random_start",
    cuda=_cuda,
    fake=lambda x, *args: torch.empty_like(x),
)


def random_start(
    x,
    eps,
    init="uniform",
    norm="linf",
    sigma=1e-3,
    seed=None,
    index=None,
    step=0,
    restart=0,
    lo=-math.inf,
    hi=math.inf,
):
    """Where an attack begins: x plus noise as a new tensor, clipped to [lo, hi].

    x: float32 [B, ...]; strides may be any. eps: float, or a tensor of one radius per sample, [B]
    or [B, 1, ...]. init: "zero", "uniform" in the ball of `norm` ("linf" or "l2"; Madry et al.
    2018), or "gaussian" with standard deviation sigma, not projected (TRADES, Zhang et al. 2019;
    RSLAD, Zi et al. 2021). eps and sigma are in units of x.
    seed: int, or int64 tensor of one element on the CPU; None draws one from torch's CPU generator.
    index: int64 [B], each sample's id in its data set (its lower 32 bits count), so that a sample's
    noise is its own in any batch; None is 0 to B - 1. step, restart: further counters, [0, 2^32).
    Raises TypeError or ValueError that names the argument at fault; a uniform linf start refuses
    eps > hi - lo, or eps > 1 without a box, as a unit mistake (8 for 8/255).
    """
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")
    elif not isinstance(seed, torch.Tensor):
        seed = torch.tensor(seed, device="cpu")
    ball = radius(eps, x, norm, lo, hi) if init == "uniform" else (None, 0.0)
    with torch.no_grad():
        return _random_start(x, seed, index, *ball, init, norm, sigma, step, restart, lo, hi)
