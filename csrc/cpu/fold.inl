// A convolution's weights as its twin wants them: BatchNorm's scale folded in, cast, laid out for
// `convolution` forward and to the input:
//   forward  [out blocks, taps, in blocks, 32 / n, 32 out, n in]    = scale[o] weight[o, i, t]
//   backward [in blocks, taps, out blocks, 32 / n, 32 in, n out]
// Arguments: Fold; n = 2 for bf16, 1 for fp32; zeros fill the blocks up.

// Rows of 32 values as `convolution` reads them: for bf16 each element of an even row next to that
// of the odd row after it.
static inline void interleave(float* to, const float (*rows)[columns_of_block]) {
  std::memcpy(to, rows, sizeof(float) * columns_of_block * columns_of_block);
}

static inline void interleave(BF16* to, const float (*rows)[columns_of_block]) {
  for (int k = 0; k < columns_of_block; k += 2) {
    for (int c = 0; c < columns_of_block; c += W, to += 2 * W) {
      const U even = __builtin_convertvector(encode(load(rows[k] + c), BF16{}), U);
      const U odd = __builtin_convertvector(encode(load(rows[k + 1] + c), BF16{}), U);
      const U pairs = even | odd << 16;
      std::memcpy(to, &pairs, sizeof pairs);
    }
  }
}

template <typename T>
static void fold_block(T* forward, T* backward, const float* weight, const float* scale,
                       int64_t outs, int64_t ins, int64_t out_stride, int64_t in_stride) {
  constexpr int side = columns_of_block;
  alignas(64) float by_out[side][side] = {}, by_in[side][side];
  for (int64_t o = 0; o < outs; ++o) {
    const float by = scale ? scale[o] : 1.0f;
    for (int64_t i = 0; i < ins; ++i) by_out[o][i] = weight[o * out_stride + i * in_stride] * by;
  }
  for (int o = 0; o < side; ++o) {
    for (int i = 0; i < side; ++i) by_in[i][o] = by_out[o][i];
  }
  interleave(forward, by_in);
  interleave(backward, by_out);
}

template <typename T>
static void fold_as(const Fold& f, int threads) {
  constexpr int64_t side = columns_of_block, square = side * side;
  T *forward = static_cast<T*>(f.forward), *backward = static_cast<T*>(f.backward);
  const int64_t out_blocks = (f.out_channels + side - 1) / side;
  const int64_t in_blocks = (f.in_channels + side - 1) / side;
  parallel_for(out_blocks * in_blocks, threads, [&](int64_t task) {
    const int64_t o = task / in_blocks, i = task % in_blocks;
    const int64_t outs = f.out_channels - o * side, ins = f.in_channels - i * side;
    for (int64_t t = 0; t < f.taps; ++t) {
      fold_block(forward + ((o * f.taps + t) * in_blocks + i) * square,
                 backward + ((i * f.taps + t) * out_blocks + o) * square,
                 f.weight + o * side * f.out_stride + i * side * f.in_stride + t * f.tap_stride,
                 f.scale ? f.scale + o * side : nullptr, outs < side ? outs : side,
                 ins < side ? ins : side, f.out_stride, f.in_stride);
    }
  });
}

static void fold(const Fold& f, int threads) noexcept {
  f.dtype == DType::bf16 ? fold_as<BF16>(f, threads) : fold_as<float>(f, threads);
}
