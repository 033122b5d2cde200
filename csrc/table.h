// The kernels of one instruction set, as plain function pointers over raw memory.
//
// Rules for every entry: noexcept, allocates nothing, prints nothing; `threads` is the OpenMP team
// size and never changes the result; strides are in elements; floats are computed in fp32 without
// FMA contraction, so element-wise results agree bit for bit between instruction sets.
#pragma once
#include <cstdint>

namespace fastadv {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Norm : int { linf = 0, l2 = 1 };
enum class Init : int { uniform = 0, gaussian = 1 };
enum class Distance : int { mse = 0, l2 = 1, cosine = 2 };

// Arguments of softmax_kl. Logits: `dtype` [batch, classes], unit stride along classes. Gradients:
// contiguous, of the shape and dtype of their input, null where not wanted.
struct SoftmaxKL {
  float* loss;  // [batch], or one number when `reduced`
  void *grad_student, *grad_teacher;
  float* grad_weight;
  const void *student, *teacher;
  const float* weight;  // [batch] or null
  int64_t batch, classes, student_stride, teacher_stride;
  double temperature, factor;  // loss = factor * weight * KL
  bool reduced;
  DType dtype;
};

// A loss of each row of logits [batch, classes] and its label y [batch]; `grad` may be null.
using Labelled = void (*)(float* loss, void* grad, const void* logits, const int64_t* y,
                          int64_t batch, int64_t classes, DType dtype, int threads) noexcept;

struct Table {
  const char* isa;

  // csrc/cpu/pgd_step.inl
  void (*pgd_step)(float* out, const float* x_adv, const float* grad, const float* x,
                   const float* eps_per_sample, int64_t batch, int64_t size, float eps,
                   float step_size, Norm norm, float lo, float hi, int threads) noexcept;

  // csrc/cpu/random_start.inl
  void (*random_start)(float* out, const float* x, const int64_t* seed, const int64_t* index,
                       const float* eps_per_sample, int64_t batch, int64_t channels, int64_t plane,
                       float eps, Init init, Norm norm, float sigma, uint32_t step,
                       uint32_t restart, float lo, float hi, int threads) noexcept;

  // csrc/cpu/augment.inl
  void (*augment)(float* out, const uint8_t* images, const int64_t* dy, const int64_t* dx,
                  const bool* flip, int64_t batch, int64_t channels, int64_t height, int64_t width,
                  int64_t padding, bool channels_last, int threads) noexcept;

  // csrc/cpu/margin.inl, dlr.inl, mart_bce.inl
  Labelled margin, dlr, mart_bce;

  // csrc/cpu/cross_entropy.inl; y [batch] or, where it is null, target [batch, classes]
  void (*cross_entropy)(float* loss, void* grad, const void* logits, const int64_t* y,
                        const float* target, int64_t batch, int64_t classes, double smoothing,
                        DType dtype, int threads) noexcept;

  // csrc/cpu/feature_distance.inl
  void (*feature_distance)(float* loss, void* student_grad, void* teacher_grad, const void* student,
                           const void* teacher, int64_t batch, int64_t size, Distance distance,
                           DType dtype, int threads) noexcept;

  // csrc/cpu/softmax_entropy.inl
  void (*softmax_entropy)(float* loss, void* grad, const void* logits, int64_t batch,
                          int64_t classes, double temperature, double offset, DType dtype,
                          int threads) noexcept;

  // csrc/cpu/softmax_kl.inl
  void (*softmax_kl)(const SoftmaxKL& args, int threads) noexcept;
};

// The tables compiled in that this machine can run, fastest first; returns how many.
int tables(const Table** out) noexcept;
constexpr int max_tables = 3;

}  // namespace fastadv
