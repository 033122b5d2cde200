// The CUDA kernels, launched on a stream over raw device memory: those of the ops whose time on a
// GPU is mostly the launch. Results have the CPU kernels' bits, those of softmax_kl excepted.
//
// Every function returns null, or why nothing was launched. It allocates nothing and waits for
// nothing, so that a CUDA graph can capture it, and leaves the thread's current device as it was.
#pragma once
#include <cstdint>

#include "../augment.h"
#include "../pgd_step.h"
#include "../random_start.h"
#include "../softmax_kl.h"

// KERNEL(name, arguments); the arguments are those of the CPU's kernel of that name.
#define FASTADV_CUDA_KERNELS(KERNEL) \
  KERNEL(augment, Augment)           \
  KERNEL(pgd_step, PgdStep)          \
  KERNEL(random_start, RandomStart)  \
  KERNEL(softmax_kl, SoftmaxKL)

namespace fastadv::cuda {

struct Place {
  int device;
  uintptr_t stream;  // of that device
};

#define FASTADV_ENTRY(name, arguments) \
  const char* name(const arguments& args, Place place) noexcept;
FASTADV_CUDA_KERNELS(FASTADV_ENTRY)
#undef FASTADV_ENTRY

// CUDA versions, 1000 major + 10 minor: that these kernels were built with, and the newest that the
// driver supports, 0 without a driver.
int built_version() noexcept;
int driver_version() noexcept;

}  // namespace fastadv::cuda
