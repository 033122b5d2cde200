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

from . import _native
from ._library import define, expect
from ._radius import radius

_MASK = 0xFFFFFFFF
_RADIUS_BLOCK = 0xFFFFFFFF  # the Philox block that holds a sample's radius draw


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


def philox(seed, block, sample, step, restart):
    """Four words in [0, 2^32): Philox4x32-10 (Salmon et al. 2011) with the 64-bit int `seed` as the
    key and the other arguments, int64 tensors or ints in [0, 2^32), as the counter."""
    key0, key1 = seed & _MASK, seed >> 32 & _MASK
    a, b, c, d = block, sample, step, restart
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves their 64 bits as they should be.
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (q >> 32 & _MASK) ^ b ^ key0, q & _MASK
        c, d = (p >> 32 & _MASK) ^ d ^ key1, p & _MASK
        key0, key1 = key0 + 0x9E3779B9 & _MASK, key1 + 0xBB67AE85 & _MASK
    return a, b, c, d


def _noise(words, normal):
    """fp64 [B, 4N] from four words [B, N]: 2 u - 1 with u = k 2^-24, k a word's upper 24 bits, or
    Box-Muller's r cos t, r sin t, r = sqrt(-2 ln((k0 + 1) 2^-24)), t = 2 pi k1 2^-24."""
    u = [(word >> 8).double() * 2.0**-24 for word in words]
    if normal:
        pairs = [((-2 * (a + 2.0**-24).log()).sqrt(), 2 * math.pi * b) for a, b in (u[:2], u[2:])]
        draws = [r * wave(t) for r, t in pairs for wave in (torch.cos, torch.sin)]
    else:
        draws = [2 * a - 1 for a in u]
    return torch.stack(draws, dim=-1).flatten(1)


def reference(x, seed, index, eps_per_sample, eps, init, norm, sigma, step, restart, lo, hi):
    """clip(x + delta): 0, uniform in the eps-ball of `norm`, or sigma N(0, 1); x: [B, ...].

    Element e of a sample, in logical order, takes word e % 4 of the Philox counter (e // 4, index,
    step, restart). l2: delta = eps v^(1/D) n / ||n||, n ~ N(0, 1), v from a block of its own.
    """
    if init == "zero":
        return x.clamp(lo, hi)
    size = math.prod(x.shape[1:])
    sample = torch.arange(len(x), device=x.device) if index is None else index & _MASK
    counter = sample[:, None], step, restart
    block = torch.arange((size + 3) // 4, device=x.device)
    ball = init == "uniform" and norm == "l2"
    noise = _noise(philox(seed.item(), block, *counter), ball or init == "gaussian")[:, :size]
    scale = sigma
    if init == "uniform":
        scale = eps if eps_per_sample is None else eps_per_sample[:, None]
    if ball:
        v = (philox(seed.item(), _RADIUS_BLOCK, *counter)[0] + 1).double() * 2.0**-32
        length = noise.norm(dim=1, keepdim=True)
        radius = scale * v ** (1 / max(size, 1))
        scale = torch.where(length > 0, radius / length, 0.0).to(x.dtype)
    return (x + (scale * noise.to(x.dtype)).view(x.shape)).clamp(lo, hi)


def _compiled(x, seed, index, eps_per_sample, eps, init, norm, sigma, step, restart, lo, hi):
    if x.dtype != torch.float32 or init == "zero":
        rest = norm, sigma, step, restart, lo, hi
        return reference(x, seed, index, eps_per_sample, eps, init, *rest)
    dense = x if _native.is_dense(x) else x.contiguous()
    index, eps_per_sample = (t if t is None else t.contiguous() for t in (index, eps_per_sample))
    out, device = _native.empty_like(dense), x.get_device()
    batch, channels = x.shape[0], 1 if dense.is_contiguous() else x.shape[1]
    _native.run(
        "random_start",
        device,
        *_native.in_one_layout(device, torch.float32, out=out, x=dense),
        *_native.contiguous(device, torch.float32, eps=eps_per_sample),
        *_native.contiguous(device, torch.int64, index=index),
        seed.item(),
        batch,
        channels,
        x.numel() // max(batch * channels, 1),
        eps,
        init,
        norm,
        sigma,
        step,
        restart,
        lo,
        hi,
    )
    return out if dense is x else torch.empty_like(x).copy_(out)


def _cuda(x, seed, index, eps_per_sample, eps, init, norm, *rest):
    return x.dtype == torch.float32 and init == "uniform" and norm == "linf"


def _triton():
    from ..kernels.random_start import random_start

    return random_start


_random_start = define(
    "random_start(Tensor x, Tensor seed, Tensor? index, Tensor? eps_per_sample, float eps, "
    "str init, str norm, float sigma, int step, int restart, float lo, float hi) -> Tensor",
    check=_check,
    reference=reference,
    native=_compiled,
    triton=_triton,
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
