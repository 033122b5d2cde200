// Loads, stores and arithmetic that the bodies of the CUDA kernels share.
//
// A body is a function object of (thread, threads) that does the part of one of `threads` threads,
// whatever their number. Bodies know nothing of each other or of CUDA, so that tests compile the
// same lines for the CPU (tests/kernels/emulate.cpp) and compare bits. Each op ends in a function
// that picks its body and hands it to `launch`, which is a kernel launch here and a loop there.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#ifdef __CUDACC__
#define FASTADV_BODY __host__ __device__ __forceinline__
#else
#define FASTADV_BODY inline
#endif

namespace fastadv::cuda {

// N consecutive numbers, read or written by one access.
template <int N>
struct alignas(4 * N) Floats {
  float at[N];
};

template <int N>
FASTADV_BODY Floats<N> load(const float* p) {
  return *reinterpret_cast<const Floats<N>*>(p);
}

template <int N>
FASTADV_BODY void store(float* p, const Floats<N>& v) {
  *reinterpret_cast<Floats<N>*>(p) = v;
}

// Whether all may be accessed 16 bytes at a time.
template <typename... Pointers>
inline bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % 16) == 0;
}

// NaN where v is, and v of equals: the CPU kernels' order of arguments.
FASTADV_BODY float clip(float v, float lo, float hi) {
  const float above = lo > v ? lo : v;
  return hi < above ? hi : above;
}

template <typename To, typename From>
FASTADV_BODY To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// How many blocks make a thread per item of work, but no more threads than the device holds at
// once.
inline int64_t blocks_for(int64_t work, int block, int multiprocessors) {
  constexpr int64_t threads_per_multiprocessor = 2048;
  const int64_t wanted = (work + block - 1) / block;
  const int64_t most = multiprocessors * (threads_per_multiprocessor / block);
  return wanted < most ? wanted : most;
}

}  // namespace fastadv::cuda
