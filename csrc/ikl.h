#pragma once
#include "types.h"

namespace fastadv {

// Logits: `dtype` [batch, classes], unit stride along classes. Gradients: contiguous, of the shape
// and dtype of the logits, null where not wanted. The kernel returns 1 where a weight is negative,
// infinite or NaN, and has then written nothing.
struct IKL {
  float* loss;  // one number
  void *grad_adv, *grad_clean;
  const void *adv, *clean;
  const float* weight;  // [batch, classes], unit stride along classes, or null for all alike
  int64_t batch, classes, adv_stride, clean_stride, weight_stride;
  double alpha, beta;
  DType dtype;
};

}  // namespace fastadv
