// Crop, flip and scale: out[b, c, h, w] = images[b, c, h + dy - padding, w' + dx - padding] / 255,
// 0 outside the image, with w' = width - 1 - w where flip[b], else w.
// Arguments: Augment.

struct Unit {  // k / 255, correctly rounded
  float of[256];
  constexpr Unit() : of() {
    for (int k = 0; k < 256; ++k) of[k] = k / 255.0f;
  }
};
static constexpr Unit unit;

// offset - padding, kept within [-size, size], where all of the image is outside at either end.
static inline int64_t shift_of(int64_t offset, int64_t padding, int64_t size) {
  const int64_t low = padding - size, high = padding + size;
  return (offset < low ? low : offset > high ? high : offset) - padding;
}

// One row: out[w * stride] = in[first + step * w] / 255 for w in [begin, end), else 0.
static inline void augment_row(float* out, int64_t stride, const uint8_t* in, int64_t first,
                               int64_t step, int64_t begin, int64_t end, int64_t width) {
  for (int64_t w = 0; w < begin; ++w) out[w * stride] = 0;
  for (int64_t w = begin; w < end; ++w) out[w * stride] = unit.of[in[first + step * w]];
  for (int64_t w = end; w < width; ++w) out[w * stride] = 0;
}

static void augment(const Augment& a, int threads) noexcept {
  const int64_t channels = a.channels, height = a.height, width = a.width;
  const int64_t size = channels * height * width;
  const int64_t stride = a.channels_last ? channels : 1;
  const int64_t plane = a.channels_last ? 1 : height * width;
  parallel_for(a.batch, a.batch * size > 16384 ? threads : 1, [&](int64_t b) {
    const bool flip = a.flip[b];
    const int64_t down = shift_of(a.dy[b], a.padding, height);
    const int64_t right = shift_of(a.dx[b], a.padding, width);
    const int64_t left = right < 0 ? -right : 0, cut = right > 0 ? right : 0;
    const int64_t begin = flip ? cut : left, end = width - (flip ? left : cut);
    const int64_t first = right + (flip ? width - 1 : 0), step = flip ? -1 : 1;
    for (int64_t h = 0; h < height; ++h) {
      const int64_t from = h + down;
      const bool inside = from >= 0 && from < height;
      for (int64_t c = 0; c < channels; ++c) {
        const uint8_t* in = a.images + b * size + (inside ? (c * height + from) * width : 0);
        augment_row(a.out + b * size + c * plane + h * width * stride, stride, in, first, step,
                    inside ? begin : width, inside ? end : width, width);
      }
    }
  });
}
