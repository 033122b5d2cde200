// BatchNorm over the batch, and the sum with a residual and the ReLU that follow it.
//   forward:  y = f((x - mean) scale + bias + residual), scale = weight / sqrt(var + eps)
//   backward: h = f'(z) grad -> residual_grad;  bias_grad = sum h;
//             weight_grad = sum h (x - mean) / sqrt(var + eps);
//             x_grad = scale (h - bias_grad / n - (x - mean) weight_grad / (n sqrt(var + eps)))
// Maps: fp32 or bf16 [pixels, channels], pixels those of the whole batch. The sums of the forward
// pass of fp32 maps are fp64, where products are exact, so that var = mean of x^2 - mean^2 keeps
// its digits. The others are fp32 over `strip` pixels first, where the squares of bf16 are exact
// too. Chunks do not depend on the number of threads.

// Rows that are read side by side: more than four at once are no streams to a processor of AVX2.
constexpr int64_t strip = W > 8 ? 16 : 4;

// How a vector of channels is read and written: the last of a row may be less than full.
template <int V>
struct Lanes {
  static constexpr int count = V;  // vectors side by side
  int64_t left;

  template <typename T>
  F get(const T* p) const {
    return V > 1 ? load(p) : load_head(p, left);
  }
  template <typename T>
  void put(T* p, F v) const {
    V > 1 ? fastadv::FASTADV_ISA::put(p, v) : store_head(p, v, left);
  }
};

static inline int64_t chunks_of(int64_t pixels) {
  const int64_t chunks = pixels / 64 + 1;
  return chunks < batch_norm_chunks ? chunks : batch_norm_chunks;
}

// Calls body(chunk, first pixel, one past the last, c, Lanes) for strips of pixels and count
// vectors of channels from c on.
template <typename Body>
static inline void strips(int64_t pixels, int64_t channels, int threads, const Body& body) {
  const int64_t count = (pixels + strip - 1) / strip, chunks = chunks_of(pixels);
  parallel_for(chunks, threads, [&](int64_t chunk) {
    const int64_t end = count * (chunk + 1) / chunks;
    for (int64_t s = count * chunk / chunks; s < end; ++s) {
      const int64_t first = s * strip, last = first + strip < pixels ? first + strip : pixels;
      int64_t c = 0;
      for (; c + 2 * W <= channels; c += 2 * W) body(chunk, first, last, c, Lanes<2>{W});
      for (; c < channels; c += W) body(chunk, first, last, c, Lanes<1>{channels - c});
    }
  });
}

// A sum that is fp32 over one strip, then added in fp64.
struct QuickSum {
  F sum = {};

  void add(F a) { sum += a; }
  void add(F a, F b) { sum += a * b; }
  void add_to(double* p) const {
    Sum exact;
    exact.add(sum);
    exact.add_to(p);
  }
};
// The two sums of a chunk lie one after the other, each filled up to whole vectors.
static inline int64_t padded(int64_t channels) { return (channels + W - 1) / W * W; }

// Makes two sums over the pixels for each channel. pair(Lanes, index, c, S& one, S& two) adds to
// them the terms of one vector, `index` its place in the map and c its first channel. finish(c,
// one, two) is then called with the sums of each channel.
template <typename S, typename Pair, typename Finish>
static inline void sum_pairs(double* sums, int64_t pixels, int64_t channels, int threads,
                             const Pair& pair, const Finish& finish) {
  const int64_t size = padded(channels), chunks = chunks_of(pixels);
  std::memset(sums, 0, sizeof(double) * chunks * 2 * size);
  strips(pixels, channels, threads, [&](int64_t chunk, int64_t p, int64_t last, int64_t c, auto l) {
    constexpr int V = decltype(l)::count;
    const Pair add = pair;
    S one[V], two[V];
    for (; p < last; ++p) {
      for (int v = 0; v < V; ++v) {
        add(l, p * channels + c + v * W, c + v * W, one[v], two[v]);
      }
    }
    double* total = sums + chunk * 2 * size + c;
    for (int v = 0; v < V; ++v, total += W) {
      one[v].add_to(total);
      two[v].add_to(total + size);
    }
  });
  parallel_for(size / W, threads, [&](int64_t vector) {
    for (int64_t c = vector * W; c < (vector + 1) * W && c < channels; ++c) {
      double one = 0, two = 0;
      for (const double* sum = sums + c; sum < sums + chunks * 2 * size; sum += 2 * size) {
        one += sum[0];
        two += sum[size];
      }
      finish(c, one, two);
    }
  });
}

// Calls body(Lanes, index, c) for all vectors of a map, in the order of memory.
template <typename Body>
static inline void over_map(int64_t pixels, int64_t channels, int threads, const Body& body) {
  const int64_t chunks = chunks_of(pixels);
  parallel_for(chunks, threads, [=, &body](int64_t chunk) {
    const Body run = body;  // its pointers in registers: a store might write those behind `body`
    const int64_t width = channels, last = pixels * (chunk + 1) / chunks;
    for (int64_t p = pixels * chunk / chunks; p < last; ++p) {
      int64_t c = 0;
      for (; c + W <= width; c += W) run(Lanes<2>{W}, p * width + c, c);
      if (c < width) run(Lanes<1>{width - c}, p * width + c, c);
    }
  });
}

template <typename T>
static void batch_norm_as(const BatchNorm& k, int threads) {
  const T *x = static_cast<const T*>(k.x), *residual = static_cast<const T*>(k.residual);
  T* y = static_cast<T*>(k.y);
  const float *mean = k.mean, *bias = k.bias;
  float* scale = k.factors;
  const auto moments = [=](auto lanes, int64_t i, int64_t, auto& one, auto& two) {
    const F v = lanes.get(x + i);
    one.add(v);
    two.add(v, v);
  };
  const auto finish = [&](int64_t c, double one, double two) {
    const double m = one / k.pixels, var = two / k.pixels - m * m;
    k.mean[c] = static_cast<float>(m);
    k.var[c] = static_cast<float>(var < 0 ? 0 : var);
    scale[c] = static_cast<float>(k.weight[c] / __builtin_sqrt(k.var[c] + k.eps));
  };
  using S = std::conditional_t<std::is_same_v<T, float>, Sum, QuickSum>;
  sum_pairs<S>(k.sums, k.pixels, k.channels, threads, moments, finish);
  const F floor = splat(k.relu ? 0 : -__builtin_inff());
  over_map(k.pixels, k.channels, threads, [=](auto lanes, int64_t i, int64_t c) {
    F v = (lanes.get(x + i) - lanes.get(mean + c)) * lanes.get(scale + c) + lanes.get(bias + c);
    if (residual) v += lanes.get(residual + i);
    lanes.put(y + i, max(floor, v));
  });
}

static void batch_norm(const BatchNorm& k, int threads) noexcept {
  k.dtype == DType::bf16 ? batch_norm_as<BF16>(k, threads) : batch_norm_as<float>(k, threads);
}

template <typename T>
static void batch_norm_backward_as(const BatchNormBackward& k, int threads) {
  const T *grad = static_cast<const T*>(k.grad), *y = static_cast<const T*>(k.y);
  const T* x = static_cast<const T*>(k.x);
  const float *mean = k.mean, *bias = k.bias;
  float *scale = k.factors, *level = scale + k.channels, *slant = level + k.channels;
  for (int64_t c = 0; c < k.channels; ++c) {
    scale[c] = static_cast<float>(k.weight[c] / __builtin_sqrt(k.var[c] + k.eps));
  }
  // h; where there was no residual, ReLU's slope costs no reading of y.
  const auto slope = [=](auto lanes, int64_t i, int64_t c, F centred) {
    const F g = lanes.get(grad + i);
    if (y) return lanes.get(y + i) <= 0 ? F{} : g;
    return bias ? centred * lanes.get(scale + c) + lanes.get(bias + c) <= 0 ? F{} : g : g;
  };
  const auto slopes = [=](auto lanes, int64_t i, int64_t c, auto& one, auto& two) {
    const F centred = lanes.get(x + i) - lanes.get(mean + c), h = slope(lanes, i, c, centred);
    one.add(h);
    two.add(h, centred);
  };
  const auto finish = [&](int64_t c, double one, double two) {
    const double per_std = 1 / __builtin_sqrt(k.var[c] + k.eps);
    k.bias_grad[c] = static_cast<float>(one);
    k.weight_grad[c] = static_cast<float>(two * per_std);
    level[c] = static_cast<float>(one / k.pixels);
    slant[c] = static_cast<float>(two * per_std * per_std / k.pixels);
  };
  sum_pairs<QuickSum>(k.sums, k.pixels, k.channels, threads, slopes, finish);
  T *x_grad = static_cast<T*>(k.x_grad), *residual_grad = static_cast<T*>(k.residual_grad);
  over_map(k.pixels, k.channels, threads, [=](auto lanes, int64_t i, int64_t c) {
    const F centred = lanes.get(x + i) - lanes.get(mean + c), h = slope(lanes, i, c, centred);
    const F flat = h - lanes.get(level + c) - centred * lanes.get(slant + c);
    lanes.put(x_grad + i, flat * lanes.get(scale + c));
    if (residual_grad) lanes.put(residual_grad + i, h);
  });
}

static void batch_norm_backward(const BatchNormBackward& k, int threads) noexcept {
  k.dtype == DType::bf16 ? batch_norm_backward_as<BF16>(k, threads)
                         : batch_norm_backward_as<float>(k, threads);
}
