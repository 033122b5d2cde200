"""pgd_step: one signed (linf) or normalised (l2) gradient step, projected and clipped.

    linf: x_adv' = clip(clamp(x_adv + step_size sign(g), x - eps, x + eps), lo, hi)
    l2:   d = x_adv + step_size g / ||g|| - x;  x_adv' = clip(x + d min(1, eps / ||d||), lo, hi)

x_adv, grad, x: [B, ...] of one shape; result: the same. Not differentiable.
"""

import torch

from ..kernels.host import mutated
from . import _native
from ._library import define, expect
from ._radius import radius
from ._reference import direction, per_sample, project
from ._step import expect_apart, expect_images, expect_unrecorded

_ARGS = (
    "Tensor grad, Tensor x, Tensor? eps_per_sample, float eps, float step_size, str norm, "
    "float lo, float hi"
)


def _check(x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi):
    expect_images(x_adv, norm, grad=grad, x=x)
    if eps_per_sample is not None:
        expect("eps", eps_per_sample, dtype=x.dtype, like=x, shape=x.shape[:1])


def _check_in_place(x_adv, grad, x, *rest):
    _check(x_adv, grad, x, *rest)
    expect_apart({"x_adv": x_adv}, {"grad": grad, "x": x})


def reference(x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi):
    """linf: clip(clamp(x_adv + step_size sign(g), x - eps, x + eps));
    l2: d = x_adv + step_size g / ||g|| - x, clip(x + d min(1, eps / ||d||)). Shapes [B, ...].

    sign is (g > 0) - (g < 0): 0 at 0 and at NaN. Madry et al. 2018, section 2.1.
    """
    if eps_per_sample is not None:
        eps = per_sample(eps_per_sample, x)
    return project(x_adv + step_size * direction(grad, norm), x, eps, norm, lo, hi)


def reference_(x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi):
    """`reference` written into x_adv."""
    x_adv.copy_(reference(x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi))


def _into(out, x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi):
    """The native step; grad or x is copied first where its layout is not x_adv's."""
    grad, x = _native.laid_like(x_adv, grad), _native.laid_like(x_adv, x)
    if eps_per_sample is not None:
        eps_per_sample = eps_per_sample.contiguous()
    batch, device = x_adv.shape[0] if x_adv.dim() else 1, x_adv.get_device()
    _native.run(
        "pgd_step",
        device,
        *_native.in_one_layout(device, torch.float32, out=out, x_adv=x_adv, grad=grad, x=x),
        *_native.contiguous(device, torch.float32, eps=eps_per_sample),
        batch,
        x_adv.numel() // max(batch, 1),
        eps,
        step_size,
        norm,
        lo,
        hi,
    )


def _native_ok(x_adv):
    return x_adv.dtype == torch.float32 and _native.is_dense(x_adv)


def _compiled(x_adv, *args):
    if not _native_ok(x_adv):
        return reference(x_adv, *args)
    out = _native.empty_like(x_adv)
    _into(out, x_adv, *args)
    return out


def _compiled_(x_adv, *args):
    if not _native_ok(x_adv):
        return reference_(x_adv, *args)
    _into(x_adv, x_adv, *args)
    return mutated(x_adv)


def _cuda(x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi):
    return norm == "linf" and _native_ok(x_adv)


def _triton():
    from ..kernels.pgd_step import pgd_step

    return pgd_step


def _triton_():
    from ..kernels.pgd_step import pgd_step_

    return pgd_step_


def _fake(x_adv, *args):
    _check(x_adv, *args)
    return torch.empty_like(x_adv)


_pgd_step = define(
    f"pgd_step(Tensor x_adv, {_ARGS}) -> Tensor",
    check=_check,
    reference=reference,
    native=_compiled,
    triton=_triton,
    cuda=_cuda,
    fake=_fake,
)
_pgd_step_ = define(
    f"pgd_step_(Tensor(a!) x_adv, {_ARGS}) -> ()",
    check=_check_in_place,
    reference=reference_,
    native=_compiled_,
    triton=_triton_,
    cuda=_cuda,
    fake=_check,
)


def pgd_step(x_adv, grad, x, eps, step_size, norm="linf", lo=0.0, hi=1.0):
    """One PGD step as a new tensor (Madry et al. 2018).

    x_adv, grad, x: float32 [B, ...] of one shape and device; strides may differ. eps: float, or a
    tensor of one radius per sample, [B] or [B, 1, ...]. step_size: float, in units of x.
    norm: "linf" or "l2" over each sample. lo, hi: the box that images live in.
    Raises TypeError or ValueError that names the argument at fault; eps > hi - lo under linf is
    refused as a unit mistake (8 for 8/255). The result carries no gradient.
    """
    with torch.no_grad():
        return _pgd_step(x_adv, grad, x, *radius(eps, x, norm, lo, hi), step_size, norm, lo, hi)


def pgd_step_(x_adv, grad, x, eps, step_size, norm="linf", lo=0.0, hi=1.0):
    """`pgd_step` in place: overwrites x_adv, allocates nothing, returns x_adv.

    Raises RuntimeError when autograd records x_adv (call it under torch.no_grad, or detach) and
    ValueError when x_adv overlaps x or grad in memory.
    """
    expect_unrecorded("pgd_step_", x_adv=x_adv)
    _pgd_step_(x_adv, grad, x, *radius(eps, x, norm, lo, hi), step_size, norm, lo, hi)
    return x_adv
