"""Steps and projections into the ball around x and the box, for the ops over images: pgd_step and
apgd_step. Norms and quotients by them are fp64; the rest is fp32."""

import triton
import triton.language as tl

from .rows import clamp


@triton.jit
def linf_project(v, x, eps, lo, hi):
    """v into the ball, then into the box."""
    return clamp(clamp(v, x - eps, x + eps), lo, hi)


@triton.jit
def linf_point(x_adv, grad, x, eps, step_size, lo, hi):
    """One step along sign(grad), which is 0 at 0 and at NaN, projected."""
    step = tl.where(grad > 0, step_size, tl.where(grad < 0, -step_size, 0.0))
    return linf_project(x_adv + step, x, eps, lo, hi)


@triton.jit
def square(v):
    """v^2 in fp64: the squares of a vanishing gradient underflow in fp32."""
    return v.to(tl.float64) * v.to(tl.float64)


@triton.jit
def l2_scale(step_size, norm):
    """The factor that scales a gradient of this norm to step_size; 0 where it has no direction."""
    return tl.where(norm > 0, step_size.to(tl.float64) / norm, 0.0)


@triton.jit
def l2_delta(x_adv, grad, x, scale):
    """x_adv + scale grad - x: the step in fp64 until it is rounded, as step_size / ||grad|| may
    overflow fp32 while step_size grad / ||grad|| does not. No step where scale is 0."""
    step = tl.where(scale == 0, 0.0, grad.to(tl.float64) * scale).to(tl.float32)
    return x_adv + step - x


@triton.jit
def l2_shrink(norm, eps):
    """The factor that brings a displacement of this norm into the ball."""
    return tl.where(norm > eps, eps.to(tl.float64) / norm, 1.0).to(tl.float32)
