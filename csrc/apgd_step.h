#pragma once
#include "types.h"

namespace fastadv {

// Images and gradients: fp32 [batch, size], dense, in one element order and apart from each other.
struct ApgdStep {
  float *x_adv, *x_old, *x_best, *grad_best, *x_found;
  const float *grad, *x;
  const float* step_size;                            // [batch]
  const float* eps_per_sample;                       // [batch] or null, then eps holds for all
  const bool *better_best, *better_found, *restart;  // [batch]
  int64_t* bad_gradients;                            // one number
  int64_t batch, size;
  float eps;
  double weight;
  Norm norm;
  float lo, hi;
};

}  // namespace fastadv
