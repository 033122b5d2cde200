#pragma once
#include "types.h"

namespace fastadv {

struct SoftmaxEntropy {
  float* loss;         // [batch]
  void* grad;          // like logits, or null
  const void* logits;  // `dtype` [batch, classes], contiguous
  int64_t batch, classes;
  double temperature, offset;
  DType dtype;
};

}  // namespace fastadv
