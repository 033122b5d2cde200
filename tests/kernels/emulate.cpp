// The bodies of csrc/cuda, run thread by thread on the CPU: test_cuda_emulate.py compiles this file
// and calls it. `threads` stands for the size of the grid; work[0] becomes what a launch is given.
#include "../../csrc/cuda/body.h"

namespace fastadv::cuda {
#include "../../csrc/cuda/augment.inl"
#include "../../csrc/cuda/pgd_step.inl"
#include "../../csrc/cuda/random_start.inl"
#include "../../csrc/cuda/softmax_kl.inl"

struct Loop {
  int64_t threads;
  int64_t* work;

  template <typename Body>
  void operator()(const Body& body, int64_t n) const {
    *work = n;
    for (int64_t thread = 0; thread < threads; ++thread) body(thread, threads);
  }

  template <typename Body>
  void sum(const Body& body, float* total) const {
    constexpr int block = 1024;
    double part[block];
    for (int thread = 0; thread < block; ++thread) part[thread] = body(thread, block);
    for (int n = block / 2; n > 0; n /= 2) {
      for (int thread = 0; thread < n; ++thread) part[thread] += part[thread + n];
    }
    *total = static_cast<float>(part[0]);
  }
};

}  // namespace fastadv::cuda

using namespace fastadv;
using namespace fastadv::cuda;

extern "C" {

int64_t blocks(int64_t work, int block, int multiprocessors) {
  return blocks_for(work, block, multiprocessors);
}

// Each kernel with the struct that it is launched with, and the emulation's two arguments.
#define EMULATED(name, arguments)                                     \
  void name(const arguments* args, int64_t threads, int64_t* work) {  \
    if (name##_takes(*args)) name##_with(*args, Loop{threads, work}); \
  }
FASTADV_CUDA_KERNELS(EMULATED)

float widened(uint16_t raw, bool half) { return half ? widen(F16{raw}) : widen(Bf16{raw}); }

uint16_t narrowed(float v, bool half) {
  F16 f16;
  Bf16 bf16;
  half ? narrow(v, &f16) : narrow(v, &bf16);
  return half ? f16.raw : bf16.raw;
}
}
