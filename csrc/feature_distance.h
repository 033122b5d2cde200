#pragma once
#include "types.h"

namespace fastadv {

struct FeatureDistance {
  float* loss;                        // [batch]
  void *student_grad, *teacher_grad;  // like student, or null
  const void *student, *teacher;      // `dtype` [batch, size], dense, in one element order
  int64_t batch, size;
  Distance distance;
  DType dtype;
};

}  // namespace fastadv
