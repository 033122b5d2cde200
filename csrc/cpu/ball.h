// Steps and projections into the ball around x and the box [lo, hi], for the ops over images:
// pgd_step, apgd_step.
#pragma once
#include "vec.h"

namespace fastadv::FASTADV_ISA {
namespace {

static inline F clip(F v, F lo, F hi) { return min(hi, max(lo, v)); }

static inline F linf_project(F v, F x, F eps, F lo, F hi) {
  return clip(min(x + eps, max(x - eps, v)), lo, hi);
}

// One step of length `step` along sign(grad), which is 0 at 0 and at NaN, projected.
static inline F linf_point(F x_adv, F grad, F x, F eps, F step, F lo, F hi) {
  const F zero = {};
  return linf_project(x_adv + (grad > zero ? step : (grad < zero ? -step : zero)), x, eps, lo, hi);
}

// sqrt(sum of squares) of at(i, lanes) over a sample, in fp64: a vanishing gradient's squares
// underflow in fp32. Lane sums are added in lane order, so the result is the same on every machine
// with the same W.
template <typename Load>
static double l2_norm(int64_t n, const Load& at) {
  D sum = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const D v = widen(at(i, W));
    sum += v * v;
  }
  if (i < n) {
    const D v = widen(at(i, n - i));
    sum += v * v;
  }
  double total = 0;
  for (int lane = 0; lane < W; ++lane) total += sum[lane];
  return __builtin_sqrt(total);
}

// The factor that scales a gradient of this norm to length `step`; 0 where it has no direction.
static inline double l2_scale(double step, double norm) { return norm > 0 ? step / norm : 0.0; }

// x_adv + scale * grad - x, the product in fp64: step / ||grad|| may overflow fp32 while
// step * grad / ||grad|| does not.
static inline F l2_moved(F x_adv, F grad, F x, double scale) {
  return x_adv + (scale > 0 ? narrow(widen(grad) * scale) : F{}) - x;
}

// The factor that brings a displacement of this norm into the ball.
static inline F l2_shrink(double norm, float eps) {
  return splat(norm > eps ? static_cast<float>(eps / norm) : 1.0f);
}

}  // namespace
}  // namespace fastadv::FASTADV_ISA
