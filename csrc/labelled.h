#pragma once
#include "types.h"

namespace fastadv {

// A loss of each row of logits and its label: margin, dlr, mart_bce. These kernels return how many
// labels are outside [0, classes).
struct Labelled {
  float* loss;         // [batch]
  void* grad;          // like logits, or null
  const void* logits;  // `dtype` [batch, classes], contiguous
  const int64_t* y;    // [batch]
  int64_t batch, classes;
  DType dtype;
};

}  // namespace fastadv
