"""apgd_step_: the step of APGD and its bookkeeping, in place (Croce & Hein 2020, algorithm 1).

    g = grad, 0 where it is not finite; bad_gradients += number of samples with such an element
    better_found: x_found = x_adv;  better_best: x_best, grad_best = x_adv, g
    restart: x_adv, g = x_best, grad_best, after that
    z = P(x_adv + step_size d), d = sign(g) or, under l2, g / ||g||
    x_adv, x_old = P(x_adv + weight (z - x_adv) + (1 - weight) (x_adv - x_old)), x_adv

P projects into the eps-ball around x, then into the box. x_adv, x_old, x_best, grad_best, x_found,
grad, x: [B, ...] of one shape; bad_gradients: int64, 0-dim; step_size [B]; better_best,
better_found, restart: bool [B]. eps: a number, or one per sample. Not differentiable.
"""

import torch

from ..kernels.host import mutated
from . import _native
from ._library import define, expect
from ._radius import radius
from ._reference import direction, flat, per_sample, project
from ._step import expect_apart, expect_images, expect_unrecorded

_MUTATED = "x_adv", "x_old", "x_best", "grad_best", "x_found"


def _check(x_adv, x_old, x_best, grad_best, x_found, bad_gradients, grad, x, *rest):
    (step_size, better_best, better_found, restart, eps), norm = rest[:5], rest[7]
    kept = {"x_old": x_old, "x_best": x_best, "grad_best": grad_best, "x_found": x_found}
    expect_images(x_adv, norm, **kept, grad=grad, x=x)
    expect("bad_gradients", bad_gradients, dtype=torch.int64, like=x, shape=())
    expect("step_size", step_size, dtype=x.dtype, like=x, shape=x.shape[:1])
    flags = {"better_best": better_best, "better_found": better_found, "restart": restart}
    for name, flag in flags.items():
        expect(name, flag, dtype=torch.bool, like=x, shape=x.shape[:1])
    if eps is not None:
        expect("eps", eps, dtype=x.dtype, like=x, shape=x.shape[:1])


def _check_in_place(*args):
    _check(*args)
    expect_apart(dict(zip(_MUTATED, args[:5], strict=True)), {"grad": args[6], "x": args[7]})


def reference(x_adv, x_old, x_best, grad_best, x_found, bad_gradients, grad, x, *rest):
    """Keeps x_adv where better_* [B], takes up x_best where restart [B], then z = P(x_adv +
    step_size d), P(x_adv + weight (z - x_adv) + (1 - weight) (x_adv - x_old)). Shapes [B, ...].

    d is sign(g) or g / ||g||, g the gradient with 0 for elements that are not finite. Croce
    & Hein 2020.
    """
    step_size, better_best, better_found, restart, eps_per_sample, eps, weight, norm, lo, hi = rest
    if eps_per_sample is not None:
        eps = per_sample(eps_per_sample, x)
    finite = grad.isfinite()
    bad_gradients += (~flat(finite).all(dim=1)).sum()
    grad = torch.where(finite, grad, 0.0)
    better_best, better_found, restart, step_size = (
        per_sample(values, x) for values in (better_best, better_found, restart, step_size)
    )
    x_found.copy_(torch.where(better_found, x_adv, x_found))
    x_best.copy_(torch.where(better_best, x_adv, x_best))
    grad_best.copy_(torch.where(better_best, grad, grad_best))
    start, grad = torch.where(restart, x_best, x_adv), torch.where(restart, grad_best, grad)
    z = project(start + step_size * direction(grad, norm), x, eps, norm, lo, hi)
    moved = start + weight * (z - start) + (1 - weight) * (start - x_old)
    x_old.copy_(start)
    x_adv.copy_(project(moved, x, eps, norm, lo, hi))


def _cpu(x_adv, x_old, x_best, grad_best, x_found, bad_gradients, grad, x, *rest):
    """grad or x is copied first where its layout is not x_adv's."""
    images = dict(zip(_MUTATED, (x_adv, x_old, x_best, grad_best, x_found), strict=True))
    if x_adv.dtype != torch.float32 or not _native.same_layout(*images.values()):
        return reference(*images.values(), bad_gradients, grad, x, *rest)
    grad, x = _native.laid_like(x_adv, grad), _native.laid_like(x_adv, x)
    step_size, better_best, better_found, restart, eps_per_sample = (
        row if row is None else row.contiguous() for row in rest[:5]
    )
    eps, weight, norm, lo, hi = rest[5:]
    batch, cpu = len(step_size), _native.CPU
    flags = {"better_best": better_best, "better_found": better_found, "restart": restart}
    _native.run(
        "apgd_step",
        cpu,
        *_native.in_one_layout(cpu, torch.float32, **images, grad=grad, x=x),
        *_native.contiguous(cpu, torch.float32, step_size=step_size, eps=eps_per_sample),
        *_native.contiguous(cpu, torch.bool, **flags),
        *_native.addresses(cpu, torch.int64, bad_gradients=bad_gradients),
        batch,
        x_adv.numel() // max(batch, 1),
        eps,
        weight,
        norm,
        lo,
        hi,
    )
    return mutated(*images.values(), bad_gradients)


def _triton():
    from ..kernels.apgd_step import apgd_step_

    return apgd_step_


_apgd_step_ = define(
    "apgd_step_(Tensor(a!) x_adv, Tensor(b!) x_old, Tensor(c!) x_best, Tensor(d!) grad_best, "
    "Tensor(e!) x_found, Tensor(f!) bad_gradients, Tensor grad, Tensor x, Tensor step_size, "
    "Tensor better_best, Tensor better_found, Tensor restart, Tensor? eps_per_sample, float eps, "
    "float weight, str norm, float lo, float hi) -> ()",
    check=_check_in_place,
    reference=reference,
    native=_cpu,
    triton=_triton,
    fake=_check,
)


def apgd_step_(
    x_adv,
    x_old,
    x_best,
    grad_best,
    x_found,
    bad_gradients,
    grad,
    x,
    step_size,
    *,
    better_best,
    better_found,
    restart,
    eps,
    weight,
    norm="linf",
    lo=0.0,
    hi=1.0,
):
    """One APGD step with its bookkeeping, in place, as this file's formula has it. Returns x_adv.

    x_adv, x_old: float32 [B, ...], the iterate that grad belongs to and the one before; they move
    on by one. x_best, grad_best, x_found: the iterates kept so far, of one shape with the rest.
    bad_gradients: int64, 0-dim, a count. step_size: [B], in units of x. better_best, better_found:
    bool [B], whether x_adv is to be kept. restart: bool [B], whether to go on from x_best. eps: the
    ball's radius, or a tensor of one per sample, [B] or [B, 1, ...]. weight: of the step, against
    that of the last move. norm: "linf" or "l2" over each sample. lo, hi: the box that images live
    in.
    Raises TypeError or ValueError that names the argument at fault, ValueError when two of the
    mutated overlap or one overlaps grad or x, RuntimeError when autograd records a mutated one.
    """
    images = x_adv, x_old, x_best, grad_best, x_found
    expect_unrecorded("apgd_step_", **dict(zip(_MUTATED, images, strict=True)))
    flags = better_best, better_found, restart
    numbers = *radius(eps, x, norm, lo, hi), weight, norm, lo, hi
    _apgd_step_(*images, bad_gradients, grad, x, step_size, *flags, *numbers)
    return x_adv
