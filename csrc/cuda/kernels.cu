// All CUDA kernels: the bodies of the ops, each behind one of two __global__ functions. Compiled
// without contraction into FMA, so that results have the CPU kernels' bits.
#include <cuda_runtime_api.h>

#include "body.h"

namespace fastadv::cuda {
namespace {
#include "augment.inl"
#include "pgd_step.inl"
#include "random_start.inl"
#include "softmax_kl.inl"

constexpr int sum_block = 1024;

// The bounds limit a thread to 64 registers, so that 1024 threads, half of what a multiprocessor
// can hold, are resident at once.
template <typename Body>
__global__ void __launch_bounds__(Body::block, 1024 / Body::block) grid_kernel(const Body body) {
  body(int64_t{blockIdx.x} * Body::block + threadIdx.x, int64_t{gridDim.x} * Body::block);
}

// Writes the sum over all threads to total. They are added pairwise, always in the same order, so
// that two runs agree bit for bit.
template <typename Body>
__global__ void __launch_bounds__(sum_block) sum_kernel(const Body body, float* total) {
  __shared__ double part[sum_block];
  const int thread = threadIdx.x;
  part[thread] = body(thread, sum_block);
  for (int n = sum_block / 2; n > 0; n /= 2) {
    __syncthreads();
    if (thread < n) part[thread] += part[thread + n];
  }
  if (thread == 0) *total = static_cast<float>(part[0]);
}

struct Launch {
  cudaStream_t stream;
  int multiprocessors;

  template <typename Body>
  void operator()(const Body& body, int64_t work) const {
    const int64_t blocks = blocks_for(work, Body::block, multiprocessors);
    if (blocks > 0) {
      grid_kernel<<<static_cast<unsigned>(blocks), Body::block, 0, stream>>>(body);
    }
  }

  template <typename Body>
  void sum(const Body& body, float* total) const {
    sum_kernel<<<1, sum_block, 0, stream>>>(body, total);
  }
};

// Calls body(Launch) with the device current; returns CUDA's error message, or null.
template <typename Body>
const char* on(Place place, const Body& body) {
  int before = place.device, multiprocessors = 0;
  cudaGetDevice(&before);
  cudaError_t error = cudaSetDevice(place.device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, place.device);
  }
  if (error == cudaSuccess) {
    body(Launch{reinterpret_cast<cudaStream_t>(place.stream), multiprocessors});
    error = cudaGetLastError();
  }
  if (before != place.device) cudaSetDevice(before);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

#define FASTADV_ENTRY(name, arguments)                                          \
  const char* name(const arguments& args, Place place) noexcept {               \
    if (!name##_takes(args)) return "no CUDA kernel takes this norm or init";   \
    return on(place, [&](const Launch& launch) { name##_with(args, launch); }); \
  }
FASTADV_CUDA_KERNELS(FASTADV_ENTRY)

int built_version() noexcept { return CUDART_VERSION; }

int driver_version() noexcept {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
}

}  // namespace fastadv::cuda
