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

// The arguments that fastadv/_native.py gives to csrc/bind.cpp, and the emulation's two.
void pgd_step(float* out, const float* x_adv, const float* grad, const float* x,
              const float* eps_per_sample, int64_t batch, int64_t size, float eps, float step_size,
              int, float lo, float hi, int64_t threads, int64_t* work) {
  pgd_step_with({out, x_adv, grad, x, eps_per_sample, batch, size, eps, step_size, lo, hi},
                Loop{threads, work});
}

void random_start(float* out, const float* x, const uint64_t* seed, const int64_t* index,
                  const float* eps_per_sample, int64_t batch, int64_t channels, int64_t plane,
                  float eps, int, int, float, uint32_t step, uint32_t restart, float lo, float hi,
                  int64_t threads, int64_t* work) {
  random_start_with(
      {out, x, *seed, index, eps_per_sample, batch, channels, plane, eps, step, restart, lo, hi},
      Loop{threads, work});
}

void augment(float* out, const uint8_t* images, const int64_t* dy, const int64_t* dx,
             const bool* flip, int64_t batch, int64_t channels, int64_t height, int64_t width,
             int64_t padding, bool channels_last, int64_t threads, int64_t* work) {
  augment_with({out, images, dy, dx, flip, batch, channels, height, width, padding, channels_last},
               Loop{threads, work});
}

void softmax_kl(float* loss, void* grad_student, void* grad_teacher, float* grad_weight,
                const void* student, const void* teacher, const float* weight, int64_t batch,
                int64_t classes, int64_t student_stride, int64_t teacher_stride, double temperature,
                double factor, bool reduced, int dtype, int64_t threads, int64_t* work) {
  softmax_kl_with(
      {loss, grad_student, grad_teacher, grad_weight, student, teacher, weight, batch, classes,
       student_stride, teacher_stride, temperature, factor, reduced, static_cast<DType>(dtype)},
      Loop{threads, work});
}

float widened(uint16_t raw, bool half) { return half ? widen(F16{raw}) : widen(Bf16{raw}); }

uint16_t narrowed(float v, bool half) {
  F16 f16;
  Bf16 bf16;
  half ? narrow(v, &f16) : narrow(v, &bf16);
  return half ? f16.raw : bf16.raw;
}
}
