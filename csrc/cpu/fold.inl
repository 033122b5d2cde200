// A convolution's weights as its twin wants them: BatchNorm's scale folded in, cast, laid out for
// `convolution` forward and to the input:
//   forward  [out blocks, taps, in blocks, 32 / n, 32 out, n in]    = scale[o] weight[o, i, t]
//   backward [in blocks, taps, out blocks, 32 / n, 32 in, n out]
// weight: fp32 [out_channels, in_channels, taps], strides in elements; scale: fp32 [out_channels]
// or null; n = 2 for bf16, 1 for fp32; zeros fill the blocks up.
template <typename T>
static void fold_block(T* forward, T* backward, const float* weight, const float* scale,
                       int64_t outs, int64_t ins, int64_t out_stride, int64_t in_stride) {
  constexpr int n = sizeof(T) == 2 ? 2 : 1, side = columns_of_block;
  alignas(64) float block[side][side] = {};  // [in, out]
  for (int64_t o = 0; o < outs; ++o) {
    const float by = scale ? scale[o] : 1.0f;
    for (int64_t i = 0; i < ins; ++i) block[i][o] = weight[o * out_stride + i * in_stride] * by;
  }
  const auto write = [&](T* to, const auto& at) {
    alignas(64) float line[n * side];
    for (int k = 0; k < side; k += n) {
      for (int c = 0; c < side; ++c) {
        for (int j = 0; j < n; ++j) line[n * c + j] = at(k + j, c);
      }
      for (int c = 0; c < n * side; c += W) put(to + k * side + c, load(line + c));
    }
  };
  write(forward, [&](int i, int o) { return block[i][o]; });
  write(backward, [&](int o, int i) { return block[i][o]; });
}

template <typename T>
static void fold_as(T* forward, T* backward, const float* weight, const float* scale,
                    int64_t out_channels, int64_t in_channels, int64_t taps, int64_t out_stride,
                    int64_t in_stride, int64_t tap_stride, int threads) {
  constexpr int64_t side = columns_of_block, square = side * side;
  const int64_t out_blocks = (out_channels + side - 1) / side;
  const int64_t in_blocks = (in_channels + side - 1) / side;
  parallel_for(out_blocks * in_blocks, threads, [&](int64_t task) {
    const int64_t o = task / in_blocks, i = task % in_blocks;
    const int64_t outs = out_channels - o * side, ins = in_channels - i * side;
    for (int64_t t = 0; t < taps; ++t) {
      fold_block(forward + ((o * taps + t) * in_blocks + i) * square,
                 backward + ((i * taps + t) * out_blocks + o) * square,
                 weight + o * side * out_stride + i * side * in_stride + t * tap_stride,
                 scale ? scale + o * side : nullptr, outs < side ? outs : side,
                 ins < side ? ins : side, out_stride, in_stride);
    }
  });
}

static void fold(void* forward, void* backward, const float* weight, const float* scale,
                 int64_t out_channels, int64_t in_channels, int64_t taps, int64_t out_stride,
                 int64_t in_stride, int64_t tap_stride, DType dtype, int threads) noexcept {
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    fold_as(static_cast<T*>(forward), static_cast<T*>(backward), weight, scale, out_channels,
            in_channels, taps, out_stride, in_stride, tap_stride, threads);
  };
  dtype == DType::bf16 ? run(static_cast<BF16*>(nullptr)) : run(static_cast<float*>(nullptr));
}
