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
enum class Reduction : int { none = 0, sum = 1, mean = 2 };
enum class Activation : int { none = 0, relu = 1, silu = 2 };

// Arguments of apgd_step. Images and gradients: fp32 [batch, size], dense, in the same element
// order and apart from each other.
struct ApgdStep {
  float *x_adv, *x_old, *x_best, *grad_best, *x_found;
  int64_t* bad_gradients;  // one number
  const float *grad, *x;
  const float* step_size;                            // [batch]
  const bool *better_best, *better_found, *restart;  // [batch]
  const float* eps_per_sample;                       // [batch] or null, then eps holds for all
  int64_t batch, size;
  float eps;
  double weight;
  Norm norm;
  float lo, hi;
};

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

// Maps: `dtype` [pixels, channels], contiguous. The rest: fp32 [channels], but for the kernel's
// memory: sums fp64 [batch_norm_chunks, 2, channels rounded up to 16], factors fp32 [3, channels].
constexpr int batch_norm_chunks = 64;

struct BatchNorm {
  void* y;
  float *mean, *var, *factors;
  double* sums;
  const void *x, *residual;  // residual may be null
  const float *weight, *bias;
  int64_t pixels, channels;
  double eps;
  bool relu;
  DType dtype;
};

struct BatchNormBackward {
  void *x_grad, *residual_grad;  // residual_grad may be null
  float *weight_grad, *bias_grad, *factors;
  double* sums;
  const void *grad, *y, *x;
  const float *weight, *bias, *mean, *var;  // ReLU after a residual takes y, without one bias; null
                                            // is what is not taken
  int64_t pixels, channels;
  double eps;
  DType dtype;
};

// A loss of each row of logits [batch, classes] and its label y [batch]; `grad` may be null.
// Returns how many labels are outside [0, classes).
using Labelled = int64_t (*)(float* loss, void* grad, const void* logits, const int64_t* y,
                             int64_t batch, int64_t classes, DType dtype, int threads) noexcept;

// The engine's activations and gradients lie in blocks of 16 images x 32 channels of one pixel:
// [groups of 16 images, pixels, blocks of 32 channels, 16, 32], fp32 or bf16, the last
// block of channels filled up with zeros. A block is one AMX tile, and no pixel needs a neighbour
// of its own image in memory: convolutions go by lists of taps, without padding.
constexpr int images_per_block = 16, channels_per_block = 32, block_size = 512;

// What becomes of a convolution's sums; what is null is left out.
//   forward:   v = sums + bias + before -> out; z = scale v + shift; f(z) -> active; f'(z) -> slope
//   backward:  (sums + before) slope scale + after -> out
// f: none, min(max(z, 0), cap) or z sigmoid(z). out, active, before, after: blocks like the sums;
// slope: blocks for silu, one bit per element for relu (uint32 [groups, pixels, blocks, 16]), not
// written where null; bias, scale, shift: fp32 [blocks * 32].
struct Finish {
  bool backward;
  Activation activation;
  float cap;
  void *out, *active, *slope;
  const void *before, *after;
  const float *bias, *scale, *shift;
};

// Sums over taps: sum[p] = sum over (source, tap) of p's list of weight[tap] in[source]. The list
// of output pixel p is taps[start[p]] to taps[start[p + 1]], pairs (source pixel, tap).
// Of the last group's 16 images those beyond `images` are not written.
// weight of a dense convolution: dtype [out_blocks, taps, in_blocks, 32 / n, 32, n], n = 2 for bf16
// (pairs of input channels) and 1 for fp32; of a depthwise one: fp32 [taps, blocks * 32].
struct Convolution {
  const void *in, *weight;
  const int32_t *start, *taps;
  int64_t images, in_pixels, out_pixels, in_blocks, out_blocks, kernel;
  DType dtype;
  Finish finish;
};

struct Table {
  const char* isa;

  // csrc/cpu/pgd_step.inl
  void (*pgd_step)(float* out, const float* x_adv, const float* grad, const float* x,
                   const float* eps_per_sample, int64_t batch, int64_t size, float eps,
                   float step_size, Norm norm, float lo, float hi, int threads) noexcept;

  // csrc/cpu/apgd_step.inl
  void (*apgd_step)(const ApgdStep& args, int threads) noexcept;

  // csrc/cpu/random_start.inl
  void (*random_start)(float* out, const float* x, const int64_t* seed, const int64_t* index,
                       const float* eps_per_sample, int64_t batch, int64_t channels, int64_t plane,
                       float eps, Init init, Norm norm, float sigma, uint32_t step,
                       uint32_t restart, float lo, float hi, int threads) noexcept;

  // csrc/cpu/augment.inl
  void (*augment)(float* out, const uint8_t* images, const int64_t* dy, const int64_t* dx,
                  const bool* flip, int64_t batch, int64_t channels, int64_t height, int64_t width,
                  int64_t padding, bool channels_last, int threads) noexcept;

  // csrc/cpu/batch_norm.inl
  void (*batch_norm)(const BatchNorm& args, int threads) noexcept;
  void (*batch_norm_backward)(const BatchNormBackward& args, int threads) noexcept;

  // csrc/cpu/margin.inl, dlr.inl, mart_bce.inl
  Labelled margin, dlr, mart_bce;

  // csrc/cpu/cross_entropy.inl; y [batch] or, where it is null, target [batch, classes]. Returns
  // how many labels are neither `ignored` nor in [0, classes).
  int64_t (*cross_entropy)(float* loss, void* grad, const void* logits, const int64_t* y,
                           const float* target, int64_t batch, int64_t classes, double smoothing,
                           int64_t ignored, Reduction reduction, DType dtype, int threads) noexcept;

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

  // csrc/cpu/convolution.inl
  void (*convolution)(const Convolution& args, int threads) noexcept;
  void (*depthwise)(const Convolution& args, int threads) noexcept;

  // csrc/cpu/fold.inl
  void (*fold)(void* forward, void* backward, const float* weight, const float* scale,
               int64_t out_channels, int64_t in_channels, int64_t taps, int64_t out_stride,
               int64_t in_stride, int64_t tap_stride, DType dtype, int threads) noexcept;

  // csrc/cpu/patches.inl
  void (*patches)(void* out, const float* x, const int32_t* offsets, const float* scale,
                  const float* shift, int64_t batch, int64_t pixels, int64_t size,
                  int64_t image_stride, DType dtype, int threads) noexcept;
  void (*patches_backward)(float* grad, const void* patches, const int32_t* offsets, int64_t batch,
                           int64_t elements, int64_t terms, int64_t image_size, const float* scale,
                           DType dtype, int threads) noexcept;
};

// The tables compiled in that this machine can run, fastest first; returns how many.
int tables(const Table** out) noexcept;
constexpr int max_tables = 4;

}  // namespace fastadv
