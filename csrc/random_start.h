#pragma once
#include "types.h"

namespace fastadv {

// Images: fp32 [batch, channels * plane], dense. With channels > 1 a sample lies in memory as
// [plane, channels]; its elements are numbered as [channels, plane] all the same.
struct RandomStart {
  float* out;
  const float* x;
  const float* eps_per_sample;  // [batch] or null, then eps holds for all
  const int64_t* index;         // [batch], or null for 0, 1, ...
  int64_t seed;
  int64_t batch, channels, plane;
  float eps;
  Init init;
  Norm norm;
  float sigma;
  uint32_t step, restart;
  float lo, hi;
};

}  // namespace fastadv
