#pragma once
#include "types.h"

namespace fastadv {

// The kernel returns how many labels are neither `ignored` nor in [0, classes).
struct CrossEntropy {
  float* loss;          // [batch], or one number where it is reduced
  void* grad;           // like logits, or null
  const void* logits;   // `dtype` [batch, classes], contiguous
  const int64_t* y;     // [batch], or null
  const float* target;  // [batch, classes] where y is null
  int64_t batch, classes;
  double smoothing;
  int64_t ignored;
  Reduction reduction;
  DType dtype;
};

}  // namespace fastadv
