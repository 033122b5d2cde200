// Shared by the engine's kernels: elements of a block, bits of a mask, and the finish of the sums.
#pragma once
#include "vec_math.h"

namespace fastadv::FASTADV_ISA {
namespace {

constexpr int rows = images_per_block, columns_of_block = channels_per_block;
constexpr int vectors = columns_of_block / W;  // per row of a block

// Rounds as `store` does, on the machine's instruction where there is one. It takes denormals for
// zeros, which is why only activations of networks and their gradients are written by it.
static inline void put(float* p, F v) { store(p, v); }

static inline void put(BF16* p, F v) {
#if defined(__AVX512BF16__)
  const __m256bh packed = _mm512_cvtneps_pbh(v);
  std::memcpy(p, &packed, sizeof packed);
#else
  store(p, v);
#endif
}

// Bit i: whether lane i of a mask is set; and back.
static inline uint32_t to_bits(I mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<F>(mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}

static inline I from_bits(uint32_t bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<I>(_mm512_movm_epi32(static_cast<__mmask16>(bits)));
#else
  I lanes;
  for (int i = 0; i < W; ++i) lanes[i] = 1 << i;
  return (lanes & static_cast<int32_t>(bits)) != 0;
#endif
}

// p[offset] in each lane, 0 where the offset is negative.
static inline F gather(const float* p, I offset) {
#if defined(__AVX512F__)
  return _mm512_mask_i32gather_ps(F{}, _mm512_movepi32_mask(reinterpret_cast<__m512i>(~offset)),
                                  reinterpret_cast<__m512i>(offset), p, 4);
#else
  F v = {};
  for (int i = 0; i < W; ++i) v[i] = offset[i] < 0 ? 0 : p[offset[i]];
  return v;
#endif
}

static inline F gather(const BF16* p, I offset) {
#if defined(__AVX512F__)
  const I pair = reinterpret_cast<I>(gather(reinterpret_cast<const float*>(p), offset >> 1));
  return reinterpret_cast<F>(offset & 1 ? pair & ~0xffff : pair << 16);
#else
  U v = {};
  for (int i = 0; i < W; ++i) v[i] = offset[i] < 0 ? 0 : p[offset[i]].bits;
  return reinterpret_cast<F>(v << 16);
#endif
}

// 1 / (1 + e^-z).
static inline F sigmoid(F z) {
  const Exp e = exp_over(1);
  const F small = exp(-max(z, -z), e, top_of(F{}, e));  // e^-|z|
  const F larger = 1 / (1 + small);
  return z < 0 ? small * larger : larger;
}

// The finish of one block of sums, fp32 [16, 32], of the first `images`: see Finish. `block`: its
// number in memory.
template <typename T, bool backward, Activation activation>
static inline void finish_block(const Finish& f, const float* sums, int images, int64_t block,
                                int64_t column) {
  const int64_t at = block * block_size;
  const auto in = [&](const void* base, int64_t e) {
    return load(static_cast<const T*>(base) + e);
  };
  const auto out = [&](void* base, int64_t e, F v) { put(static_cast<T*>(base) + e, v); };
  F bias[vectors], scale[vectors], shift[vectors];
  for (int j = 0; j < vectors; ++j) {
    bias[j] = f.bias ? load(f.bias + column + j * W) : F{};
    scale[j] = f.scale ? load(f.scale + column + j * W) : splat(1.0f);
    shift[j] = f.shift ? load(f.shift + column + j * W) : F{};
  }
  for (int r = 0; r < images; ++r) {
    uint32_t bits = 0;
    if (backward && activation == Activation::relu) {
      bits = static_cast<const uint32_t*>(f.slope)[block * rows + r];
    }
    for (int j = 0; j < vectors; ++j) {
      const int64_t e = at + r * columns_of_block + j * W;
      F v = load(sums + r * columns_of_block + j * W) + bias[j];
      if (f.before) v += in(f.before, e);
      if (backward) {
        if (activation == Activation::relu) v = from_bits(bits >> (j * W)) ? v : F{};
        if (activation == Activation::silu) v *= in(f.slope, e);
        v *= scale[j];
        if (f.after) v += in(f.after, e);
        out(f.out, e, v);
        continue;
      }
      if (f.out) out(f.out, e, v);
      if (!f.active) continue;
      const F z = fma(v, scale[j], shift[j]), cap = splat(f.cap);
      if (activation == Activation::none) out(f.active, e, z);
      if (activation == Activation::relu) {
        out(f.active, e, min(cap, max(F{}, z)));  // NaN stays NaN
        bits |= to_bits((z > 0) & (z < cap)) << (j * W);
      }
      if (activation == Activation::silu) {
        const F s = sigmoid(z);
        out(f.active, e, z * s);
        if (f.slope) out(f.slope, e, s * (1 + z * (1 - s)));
      }
    }
    if (!backward && activation == Activation::relu && f.slope) {
      static_cast<uint32_t*>(f.slope)[block * rows + r] = bits;
    }
  }
}

// Calls body(finish) with the finish_block that these arguments take.
template <typename T, typename Body>
static inline void with_finish(const Finish& f, const Body& body) {
  const auto direction = [&](auto backward) {
    constexpr bool b = decltype(backward)::value;
    switch (f.activation) {
      case Activation::none:
        return body(finish_block<T, b, Activation::none>);
      case Activation::relu:
        return body(finish_block<T, b, Activation::relu>);
      case Activation::silu:
        return body(finish_block<T, b, Activation::silu>);
    }
  };
  f.backward ? direction(std::true_type{}) : direction(std::false_type{});
}

}  // namespace
}  // namespace fastadv::FASTADV_ISA
