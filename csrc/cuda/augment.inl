// Crop, flip and scale, as in csrc/cpu/augment.inl; N neighbours of the result to a store.

// k / 255 for k in 0 to 255, correctly rounded: the product with 1 / 255, corrected by its error.
FASTADV_BODY float unit(uint8_t k) {
  constexpr float reciprocal = 1 / 255.0f;
  const float q = k * reciprocal;
  return fmaf(fmaf(-255.0f, q, k), reciprocal, q);
}

// offset - padding, kept within [-size, size], where all of the image is outside at either end.
FASTADV_BODY int64_t shift_of(int64_t offset, int64_t padding, int64_t size) {
  const int64_t low = padding - size, high = padding + size;
  return (offset < low ? low : offset > high ? high : offset) - padding;
}

template <int N>
struct AugmentBody {
  static constexpr int block = 256;
  Augment a;

  FASTADV_BODY void operator()(int64_t thread, int64_t threads) const {
    const int64_t plane = a.height * a.width, size = a.channels * plane, groups = size / N;
    for (int64_t i = thread; i < a.batch * groups; i += threads) {
      const int64_t b = i / groups, first = i % groups * N;
      const int64_t down = shift_of(a.dy[b], a.padding, a.height);
      const int64_t right = shift_of(a.dx[b], a.padding, a.width);
      const bool flip = a.flip[b];
      const int64_t inner = a.channels_last ? first / a.channels : first;
      int64_t w = inner % a.width, h = inner / a.width % a.height;
      int64_t c = a.channels_last ? first % a.channels : first / plane;
      Floats<N> v;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int64_t from_h = h + down, from_w = right + (flip ? a.width - 1 - w : w);
        const bool inside = from_h >= 0 && from_h < a.height && from_w >= 0 && from_w < a.width;
        v.at[n] = inside ? unit(a.images[b * size + c * plane + from_h * a.width + from_w]) : 0;
        if (a.channels_last) {
          if (++c == a.channels) c = 0, ++w;
          if (w == a.width) w = 0, ++h;
        } else {
          if (++w == a.width) w = 0, ++h;
          if (h == a.height) h = 0, ++c;
        }
      }
      store(a.out + i * N, v);
    }
  }
};

inline bool augment_takes(const Augment&) { return true; }

template <typename Launch>
void augment_with(const Augment& a, const Launch& launch) {
  const int64_t size = a.channels * a.height * a.width;
  if (size % 4 == 0 && aligned(a.out)) {
    launch(AugmentBody<4>{a}, a.batch * size / 4);
  } else {
    launch(AugmentBody<1>{a}, a.batch * size);
  }
}
