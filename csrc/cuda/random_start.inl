// out = clip(x + eps * n, lo, hi), n = 2 u - 1 with u on the grid k 2^-24: words, counters and
// order of the elements as in csrc/cpu/random_start.inl.

struct Counter {
  uint32_t key0, key1, sample, step, restart;
};

FASTADV_BODY void philox(const Counter& s, uint32_t block, uint32_t* word) {
  uint32_t a = block, b = s.sample, c = s.step, d = s.restart, key0 = s.key0, key1 = s.key1;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t{a} * 0xD2511F53u, q = uint64_t{c} * 0xCD9E8D57u;
    a = static_cast<uint32_t>(q >> 32) ^ b ^ key0;
    b = static_cast<uint32_t>(q);
    c = static_cast<uint32_t>(p >> 32) ^ d ^ key1;
    d = static_cast<uint32_t>(p);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  word[0] = a, word[1] = b, word[2] = c, word[3] = d;
}

FASTADV_BODY float shifted(const RandomStart& a, float x, float eps, uint32_t word) {
  const float n = (static_cast<int32_t>(word >> 8) - (1 << 23)) * 0x1p-23f;
  return clip(x + eps * n, a.lo, a.hi);
}

FASTADV_BODY Counter counter_of(const RandomStart& a, int64_t sample) {
  const int64_t id = a.index ? a.index[sample] : sample;
  return {static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32),
          static_cast<uint32_t>(id), a.step, a.restart};
}

FASTADV_BODY float eps_of(const RandomStart& a, int64_t sample) {
  return a.eps_per_sample ? a.eps_per_sample[sample] : a.eps;
}

// Four pixels of all C channels: one block of words per channel, C accesses of 16 bytes.
template <int C>
struct RandomStartQuads {
  static constexpr int block = 256;
  RandomStart a;

  FASTADV_BODY void operator()(int64_t thread, int64_t threads) const {
    const int64_t quads = a.plane / 4, count = a.batch * quads;
    for (int64_t i = thread; i < count; i += threads) {
      const int64_t sample = i / quads, quad = i % quads, at = i * (4 * C);
      Floats<4> v[C];
#pragma unroll
      for (int c = 0; c < C; ++c) v[c] = load<4>(a.x + at + 4 * c);
      const Counter counter = counter_of(a, sample);
      const float eps = eps_of(a, sample);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        uint32_t word[4];
        philox(counter, static_cast<uint32_t>(c * quads + quad), word);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& x = v[(j * C + c) / 4].at[(j * C + c) % 4];
          x = shifted(a, x, eps, word[j]);
        }
      }
#pragma unroll
      for (int c = 0; c < C; ++c) store(a.out + at + 4 * c, v[c]);
    }
  }
};

// Any layout and size: the four elements of one block of words, one by one.
struct RandomStartSingles {
  static constexpr int block = 256;
  RandomStart a;

  FASTADV_BODY void operator()(int64_t thread, int64_t threads) const {
    const int64_t size = a.channels * a.plane, blocks = (size + 3) / 4;
    for (int64_t i = thread; i < a.batch * blocks; i += threads) {
      const int64_t sample = i / blocks, first = i % blocks * 4;
      uint32_t word[4];
      philox(counter_of(a, sample), static_cast<uint32_t>(first / 4), word);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t e = first + j;
        if (e >= size) break;
        const int64_t at = sample * size + e % a.plane * a.channels + e / a.plane;
        a.out[at] = shifted(a, a.x[at], eps_of(a, sample), word[j]);
      }
    }
  }
};

inline bool random_start_takes(const RandomStart& a) {
  return a.init == Init::uniform && a.norm == Norm::linf;
}

template <typename Launch>
void random_start_with(const RandomStart& a, const Launch& launch) {
  const bool fours = a.plane % 4 == 0 && aligned(a.out, a.x);
  if (fours && a.channels == 1) {
    launch(RandomStartQuads<1>{a}, a.batch * (a.plane / 4));
  } else if (fours && a.channels == 3) {
    launch(RandomStartQuads<3>{a}, a.batch * (a.plane / 4));
  } else {
    launch(RandomStartSingles{a}, a.batch * ((a.channels * a.plane + 3) / 4));
  }
}
