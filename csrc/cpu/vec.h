// The vector type every CPU kernel is written against: W fp32 lanes (16 with AVX-512, 8 with AVX2,
// else 4 in whatever the compiler's baseline offers), on the compiler's vector extensions.
// Arithmetic, comparison and `mask ? a : b` are the operators; this file adds memory, min/max,
// reductions and exp. Everything is static: see kernels.cpp.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
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

// The 16-bit float types, as they lie in memory; W of them are an H.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
typedef uint16_t H __attribute__((vector_size(2 * W)));

static inline F decode(H v, BF16) {
  return reinterpret_cast<F>(__builtin_convertvector(v, U) << 16);
}

// Rounded to nearest even; NaN stays NaN.
static inline H encode(F v, BF16) {
  const U bits = reinterpret_cast<U>(v);
  const U rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : bits >> 16 | 0x40, H);
}

static inline F decode(H v, F16) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(v));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(v));
#else
  const U bits = __builtin_convertvector(v, U), sign = (bits & 0x8000) << 16;
  const U shifted = (bits & 0x7fff) << 13;
  const U scaled = reinterpret_cast<U>(reinterpret_cast<F>(shifted) * 0x1p112f);
  return reinterpret_cast<F>(sign | (shifted < 0x7c00u << 13 ? scaled : shifted | 0x7f800000));
#endif
}

// Rounded to nearest even, to infinity from 65520; NaN stays NaN.
static inline H encode(F v, F16) {
#if defined(__AVX512F__)
  return reinterpret_cast<H>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  return reinterpret_cast<H>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const U bits = reinterpret_cast<U>(v), size = bits & 0x7fffffff;
  const U normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
  const U small = reinterpret_cast<U>(reinterpret_cast<F>(size) + 0.5f) - 0x3f000000;
  const U finite = size < 113u << 23 ? small : normal;
  const U infinite = size > 0x7f800000 ? U{} + 0x7e00 : U{} + 0x7c00;
  const U half = size < 0x477ff000 ? finite : infinite;
  return __builtin_convertvector(half | (bits >> 16 & 0x8000), H);
#endif
}

template <typename T>
static inline F load(const T* p) {
  H v;
  std::memcpy(&v, p, sizeof v);
  return decode(v, T{});
}

template <typename T>
static inline void store(T* p, F v) {
  const H packed = encode(v, T{});
  std::memcpy(p, &packed, sizeof packed);
}

template <typename T>
static inline F load(const T* p, int64_t n, float fill) {
  H bits = {};
  for (int64_t i = 0; i < n; ++i) bits[i] = p[i].bits;
  F v = decode(bits, T{});
  for (int64_t i = n; i < W; ++i) v[i] = fill;
  return v;
}

template <typename T>
static inline void store(T* p, F v, int64_t n) {
  const H packed = encode(v, T{});
  for (int64_t i = 0; i < n; ++i) p[i].bits = packed[i];
}

// The first min(n, W) lanes.
template <typename T>
static inline F load_head(const T* p, int64_t n, float fill = 0) {
  return n < W ? load(p, n, fill) : load(p);
}

template <typename T>
static inline void store_head(T* p, F v, int64_t n) {
  n < W ? store(p, v, n) : store(p, v);
}

// Calls body with a null pointer to the element type.
template <typename Body>
static inline void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(static_cast<float*>(nullptr));
    case DType::bf16:
      return body(static_cast<BF16*>(nullptr));
    case DType::f16:
      return body(static_cast<F16*>(nullptr));
  }
}

// W / 2 fp64. Arithmetic on a D goes through memory; on its halves it stays in registers.
typedef double E __attribute__((vector_size(4 * W)));

static inline E widen_low(F v) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm512_castps512_ps256(v));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm256_castps256_ps128(v));
#else
  return E{v[0], v[1]};
#endif
}

static inline E widen_high(F v) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#else
  return E{v[2], v[3]};
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
