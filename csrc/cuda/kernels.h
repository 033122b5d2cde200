// The CUDA kernels, launched on a stream over raw device memory: the ops whose GPU time is mostly
// that of their launch. Results have the CPU kernels' bits, those of softmax_kl excepted.
//
// Every entry returns null, or why nothing was launched. It allocates nothing and waits for
// nothing, so that a CUDA graph can capture it, and leaves the thread's current device as it was.
#pragma once
#include <cstdint>

#include "../table.h"

namespace fastadv::cuda {

struct Place {
  int device;
  uintptr_t stream;  // of that device
};

// Arguments as in table.h, unless said otherwise.
struct PgdStep {  // linf
  float* out;
  const float *x_adv, *grad, *x, *eps_per_sample;
  int64_t batch, size;
  float eps, step_size, lo, hi;
};

struct RandomStart {  // uniform, linf
  float* out;
  const float* x;
  uint64_t seed;  // the value: it lies in the host's memory
  const int64_t* index;
  const float* eps_per_sample;
  int64_t batch, channels, plane;
  float eps;
  uint32_t step, restart;
  float lo, hi;
};

struct Augment {
  float* out;
  const uint8_t* images;
  const int64_t *dy, *dx;
  const bool* flip;
  int64_t batch, channels, height, width, padding;
  bool channels_last;
};

const char* pgd_step(const PgdStep& args, Place place) noexcept;
const char* random_start(const RandomStart& args, Place place) noexcept;
const char* augment(const Augment& args, Place place) noexcept;
const char* softmax_kl(const SoftmaxKL& args, Place place) noexcept;

// CUDA versions, 1000 major + 10 minor: that these kernels were built with, and the newest that the
// driver supports, 0 without a driver.
int built_version() noexcept;
int driver_version() noexcept;

}  // namespace fastadv::cuda
