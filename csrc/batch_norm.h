#pragma once
#include "types.h"

namespace fastadv {

// Maps: `dtype` fp32 or bf16, [pixels, channels], contiguous. Rows: fp32 [channels]. The kernels
// work in memory of the caller: sums, fp64 [batch_norm_chunks, 2, channels rounded up to 16], and
// factors, fp32 [3, channels].
constexpr int batch_norm_chunks = 64;

struct BatchNorm {
  void* y;
  const void *x, *residual;  // residual may be null
  float *mean, *var, *factors;
  const float *weight, *bias;
  double* sums;
  int64_t pixels, channels;
  double eps;
  bool relu;
  DType dtype;
};

// A ReLU's slope is found from its output y where a residual was added, else from x and bias. The
// one of y and bias that is not needed is null; without a ReLU both are.
struct BatchNormBackward {
  void *x_grad, *residual_grad;  // residual_grad may be null
  const void *grad, *y, *x;
  float *weight_grad, *bias_grad, *factors;
  const float *weight, *bias, *mean, *var;
  double* sums;
  int64_t pixels, channels;
  double eps;
  DType dtype;
};

}  // namespace fastadv
