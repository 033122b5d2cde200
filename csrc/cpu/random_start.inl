// Random start: out = clip(x + scale * n, lo, hi), one draw n per element.
//   init uniform, linf: n = 2 u - 1, u on the grid k 2^-24;        scale = eps
//   init uniform, l2:   n ~ N(0, 1), uniform in the ball with      scale = eps v^(1/size) / ||n||
//   init gaussian:      n ~ N(0, 1);                               scale = sigma
// Arguments: RandomStart. Random words are Philox4x32-10 (Salmon et al. 2011) under the key `seed`:
// word element % 4 of the counter (element / 4, index, step, restart). v in (0, 1] is word 0 of the
// block `radius_block`.

constexpr int64_t chunk = 64;  // elements drawn at once, on every instruction set
constexpr uint32_t radius_block = 0xffffffffu;

struct Stream {  // the random words of one sample
  uint32_t key0, key1, sample, step, restart;
};

static inline void philox(const Stream& s, U block, U* word) {
  U a = block, b = U{} + s.sample, c = U{} + s.step, d = U{} + s.restart;
  uint32_t key0 = s.key0, key1 = s.key1;
  for (int round = 0; round < 10; ++round) {
    U a_high, a_low, c_high, c_low;
    multiply(a, 0xD2511F53u, &a_high, &a_low);
    multiply(c, 0xCD9E8D57u, &c_high, &c_low);
    a = c_high ^ b ^ key0;
    b = c_low;
    c = a_high ^ d ^ key1;
    d = a_low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  word[0] = a, word[1] = b, word[2] = c, word[3] = d;
}

// c0 + c1 x + c2 x^2 + ...
template <typename... Rest>
static inline F polynomial(F x, float c0, Rest... rest) {
  if constexpr (sizeof...(rest) == 0) {
    return splat(c0);
  } else {
    return c0 + x * polynomial(x, rest...);
  }
}

// sqrt(-2 ln u) for u = k 2^-24 in (0, 1], k = 1 + the word's upper 24 bits; at most 5.77.
// ln u = e ln 2 + ln(1 + f), 1 + f in [sqrt(1/2), sqrt(2)), with f - f^2 / 2 + f^3 p(f) for the
// last.
static inline D gaussian_radius(U word) {
  const F k = __builtin_convertvector(reinterpret_cast<I>(word >> 8) + 1, F);
  const I bits = reinterpret_cast<I>(k), e = (bits - 0x3f3504f3) >> 23;
  const F f = reinterpret_cast<F>(bits - (e << 23)) - 1.0f;
  const F p = polynomial(f, 0.33333331f, -0.2500082f, 0.20001227f, -0.16623357f, 0.14201757f,
                         -0.1316018f, 0.12761576f, -0.076344967f);
  const D ln2 = D{} + 0.693147180559945309;
  const D log =
      __builtin_convertvector(e - 24, D) * ln2 + (widen(f) + widen(f * f * (f * p - 0.5f)));
  return sqrt(-2.0 * log);
}

// Two normal draws from two words (Box and Muller 1958): r cos t and r sin t, t = 2 pi k 2^-24.
// The nearest quarter turn q is taken off in integers, so the rest is exact and within pi / 4. The
// leading terms are in fp64: both draws are within 1.2 ulp, on every instruction set the same.
static inline void box_muller(U word0, U word1, F* cosine, F* sine) {
  const I turn = reinterpret_cast<I>(word1 >> 8), q = (turn + (1 << 21)) >> 22;
  const D t = __builtin_convertvector(turn - (q << 22), D) * 0x1.921fb54442d18p-22;
  const F y = narrow(t), z = y * y;
  const D c =
      1 - (0.5 * t * t - widen(z * z * polynomial(z, 0.041666646f, -0.0013887316f, 2.4433157e-5f)));
  const D s = t + widen(y * (z * polynomial(z, -0.16666655f, 0.0083321603f, -0.00019515282f)));
  const D r = gaussian_radius(word0);
  const F along = narrow(r * c), across = narrow(r * s);
  const I odd = (q & 1) != 0;
  const F zero = {};
  // Quarter turns: (c, s), (-s, c), (-c, -s), (s, -c).
  const F first = odd ? across : along, second = odd ? along : across;
  *cosine = ((q + 1) & 2) != 0 ? zero - first : first;
  *sine = (q & 2) != 0 ? zero - second : second;
}

// The draws of the elements [first, first + chunk) of a sample; first is a multiple of chunk.
static inline void draw(float* out, const Stream& s, int64_t first, bool normal) {
  // transpose4 leaves consecutive elements where lane 4 k + j holds block j W / 4 + k.
  U lane;
  for (int l = 0; l < W; ++l) lane[l] = l % 4 * (W / 4) + l / 4;
  for (int64_t i = 0; i < chunk; i += 4 * W) {
    U word[4];
    philox(s, lane + static_cast<uint32_t>((first + i) / 4), word);
    F v[4];
    if (normal) {
      box_muller(word[0], word[1], v, v + 1);
      box_muller(word[2], word[3], v + 2, v + 3);
    } else {
      for (int j = 0; j < 4; ++j) {
        v[j] = __builtin_convertvector(reinterpret_cast<I>(word[j] >> 8) - (1 << 23), F) * 0x1p-23f;
      }
    }
    transpose4(v);
    for (int j = 0; j < 4; ++j) store(out + i + j * W, v[j]);
  }
}

// eps v^(1/size) / ||n||. The norm adds up in 16 fp64 lanes by element number, so that neither
// layout nor instruction set changes a bit.
static float ball_scale(const Stream& s, int64_t size, float eps) {
  D sum[16 / W] = {};
  for (int64_t e = 0; e < size; e += chunk) {
    float n[chunk];
    draw(n, s, e, true);
    for (int64_t i = size - e; i < chunk; ++i) n[i] = 0;
    for (int i = 0; i < chunk; i += W) {
      const D v = widen(load(n + i));
      sum[i / W % (16 / W)] += v * v;
    }
  }
  double total = 0;
  for (int i = 0; i < 16; ++i) total += sum[i / W][i % W];
  U word[4];
  philox(s, U{} + radius_block, word);
  const double radius = eps * __builtin_pow((word[0][0] + 1.0) * 0x1p-32, 1.0 / size);
  return total > 0 ? static_cast<float>(radius / __builtin_sqrt(total)) : 0.0f;
}

// out = clip(x + scale n) for the elements [first, last) of a sample.
static void shift(float* out, const float* x, const Stream& s, int64_t first, int64_t last,
                  int64_t channels, int64_t plane, bool normal, float scale, float lo, float hi) {
  for (int64_t e = first; e < last; e += chunk) {
    float n[chunk];
    draw(n, s, e, normal);
    const int64_t count = last - e < chunk ? last - e : chunk;
    if (channels == 1) {
      for (int64_t i = 0; i < count; i += W) {
        const int64_t r = count - i;
        const F v = (r < W ? load(x + e + i, r, 0) : load(x + e + i)) + scale * load(n + i);
        const F clipped = min(splat(hi), max(splat(lo), v));
        r < W ? store(out + e + i, clipped, r) : store(out + e + i, clipped);
      }
      continue;
    }
    int64_t channel = e / plane, pixel = e % plane;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = pixel * channels + channel;
      const float v = x[at] + scale * n[i], above = v < lo ? lo : v;
      out[at] = above > hi ? hi : above;
      if (++pixel == plane) pixel = 0, ++channel;
    }
  }
}

static void random_start(const RandomStart& a, int threads) noexcept {
  // A block is one sample where that is one piece of work, else 4 Ki elements of it.
  const int64_t size = a.channels * a.plane;
  const bool ball = a.init == Init::uniform && a.norm == Norm::l2;
  const bool gaussian = a.init == Init::gaussian;
  const int64_t block = ball || a.channels > 1 ? size : 4096;
  const int64_t blocks = size > 0 ? (size + block - 1) / block : 0;
  parallel_for(a.batch * blocks, a.batch * size > 16384 ? threads : 1, [&](int64_t task) {
    const int64_t b = task / blocks, first = task % blocks * block;
    const Stream s = {static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32),
                      static_cast<uint32_t>(a.index ? a.index[b] : b), a.step, a.restart};
    const float radius = a.eps_per_sample ? a.eps_per_sample[b] : a.eps;
    const float scale = gaussian ? a.sigma : ball ? ball_scale(s, size, radius) : radius;
    shift(a.out + b * size, a.x + b * size, s, first, size - first < block ? size : first + block,
          a.channels, a.plane, ball || gaussian, scale, a.lo, a.hi);
  });
}
