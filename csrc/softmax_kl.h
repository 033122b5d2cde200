#pragma once
#include "types.h"

namespace fastadv {

// Logits: `dtype` [batch, classes], unit stride along classes. Gradients: contiguous, of the shape
// and dtype of their input, null where not wanted.
struct SoftmaxKL {
  float* loss;  // [batch], or one number where `reduced`
  void *grad_student, *grad_teacher;
  float* grad_weight;  // [batch]
  const void *student, *teacher;
  const float* weight;  // [batch] or null
  int64_t batch, classes, student_stride, teacher_stride;
  double temperature, factor;  // loss = factor * weight * KL
  bool reduced;
  DType dtype;
};

}  // namespace fastadv
