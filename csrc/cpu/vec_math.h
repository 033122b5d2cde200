// Reductions across lanes, exp and log over the vector type of vec.h.
#pragma once
#include "vec.h"

namespace fastadv::FASTADV_ISA {
namespace {

typedef uint64_t L __attribute__((vector_size(4 * W)));  // W / 2 uint64

// Lanes 0, 2, 4, ... of a, then of b; `odds` the others.
static inline F evens(F a, F b) {
#if defined(__AVX512F__)
  const I at = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return _mm512_permutex2var_ps(a, reinterpret_cast<__m512i>(at), b);
#elif defined(__AVX2__)
  const __m256d v = reinterpret_cast<__m256d>(_mm256_shuffle_ps(a, b, 0x88));
  return reinterpret_cast<F>(_mm256_permute4x64_pd(v, 0xd8));
#else
  return F{a[0], a[2], b[0], b[2]};
#endif
}

static inline F odds(F a, F b) {
#if defined(__AVX512F__)
  const I at = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return _mm512_permutex2var_ps(a, reinterpret_cast<__m512i>(at), b);
#elif defined(__AVX2__)
  const __m256d v = reinterpret_cast<__m256d>(_mm256_shuffle_ps(a, b, 0xdd));
  return reinterpret_cast<F>(_mm256_permute4x64_pd(v, 0xd8));
#else
  return F{a[1], a[3], b[1], b[3]};
#endif
}

static inline E evens(E a, E b) {
#if defined(__AVX512F__)
  const L at = {0, 2, 4, 6, 8, 10, 12, 14};
  return _mm512_permutex2var_pd(a, reinterpret_cast<__m512i>(at), b);
#elif defined(__AVX2__)
  return _mm256_permute4x64_pd(_mm256_unpacklo_pd(a, b), 0xd8);
#else
  return E{a[0], b[0]};
#endif
}

static inline E odds(E a, E b) {
#if defined(__AVX512F__)
  const L at = {1, 3, 5, 7, 9, 11, 13, 15};
  return _mm512_permutex2var_pd(a, reinterpret_cast<__m512i>(at), b);
#elif defined(__AVX2__)
  return _mm256_permute4x64_pd(_mm256_unpackhi_pd(a, b), 0xd8);
#else
  return E{a[1], b[1]};
#endif
}

// Reduces as many vectors as a vector has lanes: lane r of the result is op over the lanes of
// rows[r], taken pairwise in lane order. 2 shuffles and 1 op per row; overwrites rows.
template <typename V, typename Op>
static inline V across(V* rows, const Op& op) {
#pragma GCC unroll 8
  for (int n = sizeof(V) / sizeof(rows[0][0]) / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      const V a = rows[2 * i], b = rows[2 * i + 1];
      rows[i] = op(evens(a, b), odds(a, b));
    }
  }
  return rows[0];
}

static inline F max_across(F* rows) {
  return across(rows, [](F a, F b) { return max(a, b); });
}

static inline E sum_across(E* rows) {
  return across(rows, [](E a, E b) { return a + b; });
}

// fp64 sums of fp32 lanes and of products of them.
struct Sum {
  E low = {}, high = {};

  void add(F a) {
    low += widen_low(a);
    high += widen_high(a);
  }

  void add(F a, F b) {
    low += widen_low(a) * widen_low(b);
    high += widen_high(a) * widen_high(b);
  }

  // Lane by lane to [W] numbers in memory.
  void add_to(double* p) const {
    store(p, load(p) + low);
    store(p + W / 2, load(p + W / 2) + high);
  }

  double total() const {
    const E both = low + high;
    double sum = 0;
    for (int lane = 0; lane < W / 2; ++lane) sum += both[lane];
    return sum;
  }
};

// log2(e) / temperature = hi + lo; e^(x / temperature) is taken as 0 for x < least.
struct Exp {
  F hi, lo, least;
};

static inline Exp exp_over(double temperature) {
  const double log2e = 1.4426950408889634 / temperature;
  const float hi = static_cast<float>(log2e);
  return {splat(hi), splat(static_cast<float>(log2e - hi)),
          splat(static_cast<float>(-125 / log2e))};
}

// The maximum of a row, base + top, and -top (hi + lo) = rest - k, k an integer, shift = 1.5 2^23 -
// k. base is 0, so that subtracting it rounds nothing, unless |maximum| / temperature passes 2^19.
struct Top {
  F base, top, shift, rest;
};

constexpr float to_integer = 0x1.8p23f;  // z + to_integer: the low bits hold round(z), |z| < 2^22

static inline Top top_of(F maximum, const Exp& e) {
  const F z = maximum * e.hi, base = max(z, -z) < 0x1p20f ? F{} : maximum, top = maximum - base;
  const F k = fma(top, e.hi, splat(to_integer)) - to_integer;
  return {base, top, to_integer - k, -fma(top, e.lo, fma(top, e.hi, -k))};
}

// e^((x - maximum) / temperature) for x <= maximum, at most 1.5 ulp off and 0.26 on average: no
// difference or quotient is rounded on the way. 1 at the maximum, 0 below e^-86, NaN at NaN.
static inline F exp(F x, const Exp& e, const Top& from) {
  const F v = x - from.base, a = v - from.top;
  const F t = fma(a, e.hi, splat(to_integer));
  const F r = fma(v, e.hi, from.shift - t) + fma(v, e.lo, from.rest);  // in [-1/2, 1/2]
  // 2^r, relative error 2e-9; in pairs, because the chain of Horner's rule would be the bottleneck.
  const F c56 = fma(splat(0x1.41fbbcp-13f), r, splat(0x1.5f3e52p-10f)), rr = r * r;
  const F c34 = fma(splat(0x1.3b2d4cp-7f), r, splat(0x1.c6aee8p-5f));
  const F c12 = fma(splat(0x1.ebfbdcp-3f), r, splat(0x1.62e430p-1f));
  const F p = fma(fma(fma(c56, rr, c34), rr, c12), r, splat(1.0f));
  const U power = (reinterpret_cast<U>(t) << 23) + 0x3f800000;
  return a < e.least ? F{} : p * reinterpret_cast<F>(power);
}

// Natural logarithm of positive normal numbers, relative error 2e-9; NaN elsewhere.
static inline E log(E x) {
  const L bits = reinterpret_cast<L>(x);
  const L k = (bits - 0x3fe6a09e667f3bcd + 0x4000000000000000) >> 52;  // x = m 2^(k - 1024)
  const E m = reinterpret_cast<E>(bits - ((k - 1024) << 52));          // in [sqrt 1/2, sqrt 2)
  const E f = (m - 1) / (m + 1), g = f * f;
  const E series = 2 * f * (1 + g * (1.0 / 3 + g * (1.0 / 5 + g * (1.0 / 7 + g * (1.0 / 9)))));
  const E exponent = reinterpret_cast<E>(k | 0x4330000000000000) - (0x1p52 + 1024);
  return x > 0 ? exponent * 0.6931471805599453 + series : E{} + __builtin_nan("");
}

}  // namespace
}  // namespace fastadv::FASTADV_ISA
