// The vector type every CPU kernel is written against: W fp32 lanes (16 with AVX-512, 8 with AVX2,
// else 4 in whatever the compiler's baseline offers), on the compiler's vector extensions.
// Arithmetic, comparison and `mask ? a : b` are the operators; this file adds memory, min/max
// and conversions, vec_math.h reductions, exp and log. Everything is static: see kernels.cpp.
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

static inline F splat(float v) { return v - F{}; }  // no instruction of its own, unlike v + 0

static inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
static inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
#elif defined(__AVX2__)
static inline __m256i first_lanes(int64_t n) {
  const I lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  return reinterpret_cast<__m256i>(lanes < static_cast<int32_t>(n));
}
#endif

// The first n < W lanes; the others hold `fill` and are never read from memory.
static inline F load(const float* p, int64_t n, float fill) {
#if defined(__AVX512F__)
  return _mm512_mask_loadu_ps(splat(fill), first_lanes(n), p);
#elif defined(__AVX2__)
  const __m256i first = first_lanes(n);
  return _mm256_blendv_ps(splat(fill), _mm256_maskload_ps(p, first), reinterpret_cast<F>(first));
#else
  F v = splat(fill);
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

static inline void store(float* p, F v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, first_lanes(n), v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, first_lanes(n), v);
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
#if defined(__AVX512F__)  // gcc makes four instructions of the conversion
  const U bits = reinterpret_cast<U>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v)));
#elif defined(__AVX2__)
  const U bits = reinterpret_cast<U>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
#else
  const U bits = __builtin_convertvector(v, U);
#endif
  return reinterpret_cast<F>(bits << 16);
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
#if defined(__AVX512F__)
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return _mm512_mask_mov_ps(splat(fill), first_lanes(n), decode(reinterpret_cast<H>(bits), T{}));
#else
  H bits = {};
  for (int64_t i = 0; i < n; ++i) bits[i] = p[i].bits;
  F v = decode(bits, T{});
  for (int64_t i = n; i < W; ++i) v[i] = fill;
  return v;
#endif
}

template <typename T>
static inline void store(T* p, F v, int64_t n) {
  const H packed = encode(v, T{});
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, first_lanes(n), reinterpret_cast<__m256i>(packed));
#else
  for (int64_t i = 0; i < n; ++i) p[i].bits = packed[i];
#endif
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

static inline E load(const double* p) {
  E v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(double* p, E v) { std::memcpy(p, &v, sizeof v); }

static inline D widen(F v) { return __builtin_convertvector(v, D); }

static inline F narrow(D v) { return __builtin_convertvector(v, F); }

static inline F narrow(E a, E b) {
#if defined(__AVX512F__)
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a)), _mm512_cvtpd_ps(b), 1);
#elif defined(__AVX2__)
  return _mm256_set_m128(_mm256_cvtpd_ps(b), _mm256_cvtpd_ps(a));
#else
  return __builtin_convertvector((D{a[0], a[1], b[0], b[1]}), F);
#endif
}

// a * b + c, rounded once (without the instruction: once in fp64, once in fp32).
static inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return narrow(widen(a) * widen(b) + widen(c));
#endif
}

static inline D sqrt(D v) {
  for (int i = 0; i < W; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}

// The upper and lower 32 bits of a * b.
static inline void multiply(U a, uint32_t b, U* high, U* low) {
#if defined(__AVX512F__)
  const __m512i v = reinterpret_cast<__m512i>(a), m = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(v, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), m);
  *high = reinterpret_cast<U>(_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB));
  *low = reinterpret_cast<U>(_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CDAB));
#elif defined(__AVX2__)
  const __m256i v = reinterpret_cast<__m256i>(a), m = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(v, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), m);
  *high = reinterpret_cast<U>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  *low = reinterpret_cast<U>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#elif defined(__SSE2__)
  const __m128i v = reinterpret_cast<__m128i>(a), m = _mm_set1_epi32(static_cast<int>(b));
  const __m128i even = _mm_mul_epu32(v, m), odd = _mm_mul_epu32(_mm_srli_epi64(v, 32), m);
  *high = reinterpret_cast<U>(
      _mm_unpacklo_epi32(_mm_shuffle_epi32(even, 0x0d), _mm_shuffle_epi32(odd, 0x0d)));
  *low = reinterpret_cast<U>(
      _mm_unpacklo_epi32(_mm_shuffle_epi32(even, 0x08), _mm_shuffle_epi32(odd, 0x08)));
#else
  for (int i = 0; i < W; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    (*high)[i] = static_cast<uint32_t>(product >> 32);
    (*low)[i] = static_cast<uint32_t>(product);
  }
#endif
}

// The 4 x 4 transpose inside each group of 4 lanes: v[j][4 k + i] and v[i][4 k + j] change places.
static inline void transpose4(F* v) {
#if defined(__AVX512F__)
  const __m512 a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpacklo_ps(v[2], v[3]);
  const __m512 c = _mm512_unpackhi_ps(v[0], v[1]), d = _mm512_unpackhi_ps(v[2], v[3]);
  v[0] = _mm512_shuffle_ps(a, b, 0x44), v[1] = _mm512_shuffle_ps(a, b, 0xee);
  v[2] = _mm512_shuffle_ps(c, d, 0x44), v[3] = _mm512_shuffle_ps(c, d, 0xee);
#elif defined(__AVX2__)
  const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpacklo_ps(v[2], v[3]);
  const __m256 c = _mm256_unpackhi_ps(v[0], v[1]), d = _mm256_unpackhi_ps(v[2], v[3]);
  v[0] = _mm256_shuffle_ps(a, b, 0x44), v[1] = _mm256_shuffle_ps(a, b, 0xee);
  v[2] = _mm256_shuffle_ps(c, d, 0x44), v[3] = _mm256_shuffle_ps(c, d, 0xee);
#else
  F r[4] = {};
  for (int j = 0; j < 4; ++j) {
    for (int l = 0; l < W; ++l) r[j][l] = v[l % 4][l - l % 4 + j];
  }
  for (int j = 0; j < 4; ++j) v[j] = r[j];
#endif
}

// Calls body(i) for i in [0, count) on a static schedule; small work stays on the calling thread.
template <typename Body>
static inline void parallel_for(int64_t count, int threads, const Body& body) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 1)
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace
}  // namespace fastadv::FASTADV_ISA
