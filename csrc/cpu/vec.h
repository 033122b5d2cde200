// The vector type every CPU kernel is written against: W fp32 lanes (16 with AVX-512, 8 with AVX2,
// else 4 in whatever the compiler's baseline offers), on the compiler's vector extensions.
// Arithmetic, comparison and `mask ? a : b` are the operators; this file adds memory, min/max,
// reductions and exp. Everything is static: see kernels.cpp.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastadv::FASTADV_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F __attribute__((vector_size(4 * W)));     // W fp32
typedef int32_t I __attribute__((vector_size(4 * W)));   // W int32; also the type of a mask
typedef uint32_t U __attribute__((vector_size(4 * W)));  // W uint32
typedef double D __attribute__((vector_size(8 * W)));    // W fp64

static inline F splat(float v) { return F{} + v; }

static inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

// The first n < W lanes; the others hold `fill` and are never read from memory.
static inline F load(const float* p, int64_t n, float fill) {
#if defined(__AVX512F__)
  return _mm512_mask_loadu_ps(splat(fill), static_cast<__mmask16>((1u << n) - 1), p);
#else
  F v = splat(fill);
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

static inline void store(float* p, F v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// b where either is NaN, as the x86 instructions do.
static inline F min(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

static inline F max(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

static inline D widen(F v) { return __builtin_convertvector(v, D); }

// Calls body(i) for i in [0, count) on a static schedule; small work stays on the calling thread.
template <typename Body>
static inline void parallel_for(int64_t count, int threads, const Body& body) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 1)
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace
}  // namespace fastadv::FASTADV_ISA
