#pragma once
#include "types.h"

namespace fastadv {

// Images and gradients: fp32 [batch, size], dense, in one element order; out may be x_adv.
struct PgdStep {
  float* out;
  const float *x_adv, *grad, *x;
  const float* eps_per_sample;  // [batch] or null, then eps holds for all
  int64_t batch, size;
  float eps, step_size;
  Norm norm;
  float lo, hi;
};

}  // namespace fastadv
