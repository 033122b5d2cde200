// Dense and depthwise convolutions of blocks, forward and to the input, with their finish:
//   sums[p] = sum over (source, tap) in taps(p) of weight[tap] in[source]; finish(sums), see
//   Finish.
// in: dtype [groups, in_pixels, in_blocks, 16, 32]; out and the like: [groups, out_pixels,
// out_blocks, 16, 32]; weight: see Convolution. Sums are fp32, over taps and then input channels,
// in one order whatever the threads. The gradient to the input is the same sum over transposed
// taps and weights.

constexpr int64_t chunk_pixels = 32;  // keeps a chunk's inputs and one block of weights in L2

// Bytes of weights that stay in L2 as a whole: half of it, of 2 MB where its size is not known.
static int64_t resident() {
  int64_t size = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t known = sysconf(_SC_LEVEL2_CACHE_SIZE);
  size = known;
#endif
  return size > 0 ? size / 2 : 1 << 20;
}

// How many images a group has, of 16: fewer in the last one, none beyond it.
static inline int images_of(int64_t images, int64_t group) {
  const int64_t left = images - group * rows;
  return left < 0 ? 0 : left < rows ? static_cast<int>(left) : rows;
}

// Calls body.task(first group, loop), where loop(one) calls one(output pixel, output block), so
// that all outputs are computed, two groups at a time. A task is a chunk of pixels of two groups,
// for all output blocks or, where tasks are few, a part of them: pixel by pixel where L2 holds the
// weights, else block by block.
template <typename Body>
static void for_outputs(const Convolution& c, int64_t weight_bytes, int threads, const Body& body) {
  const int64_t pairs = (c.images + 2 * rows - 1) / (2 * rows);
  const int64_t chunks = (c.out_pixels + chunk_pixels - 1) / chunk_pixels;
  const int64_t wanted = (4 * threads + pairs * chunks - 1) / (pairs * chunks);
  const int64_t parts = wanted < c.out_blocks ? wanted : c.out_blocks;
  parallel_for(parts * pairs * chunks, threads, [&](int64_t task) {
    const int64_t chunk = task % chunks, pair = task / chunks % pairs, part = task / chunks / pairs;
    const int64_t p0 = chunk * chunk_pixels, end = p0 + chunk_pixels;
    const int64_t p1 = end < c.out_pixels ? end : c.out_pixels;
    const int64_t o0 = part * c.out_blocks / parts, o1 = (part + 1) * c.out_blocks / parts;
    body.task(2 * pair, [&](const auto& one) {
      if (weight_bytes <= resident()) {
        for (int64_t p = p0; p < p1; ++p) {
          for (int64_t o = o0; o < o1; ++o) one(p, o);
        }
      } else {
        for (int64_t o = o0; o < o1; ++o) {
          for (int64_t p = p0; p < p1; ++p) one(p, o);
        }
      }
    });
  });
}

// Calls body(N, row) for runs of N rows that together are the first `images`, N a constant: `most`
// as long as there are so many, then powers of two. What lies beyond them is not read: it may hold
// denormals, which cost hundreds of cycles each.
template <int most, typename Body>
static inline void for_rows(int images, const Body& body) {
  int row = 0;
  for (; row + most <= images; row += most) body(std::integral_constant<int, most>{}, row);
  if constexpr (most > 1) {
    if (row < images) {
      for_rows<most == 6 ? 4 : most / 2>(images - row,
                                         [&](auto n, int next) { body(n, row + next); });
    }
  }
}

// Adds a [16, 32] block times a [32, 32] block of weights to N rows and two vectors of sums. The
// loops are unrolled: a loop of 32 short turns ends with a mispredicted branch.
constexpr int R = W == 16 ? 8 : 6;  // as many rows as fit in the registers, with two vectors each

template <int N>
static inline void multiply_add(F (&sum)[N][2], const float* a, const float* w) {
#pragma GCC unroll 4
  for (int k = 0; k < columns_of_block; ++k, w += columns_of_block) {
    const F w0 = load(w), w1 = load(w + W);
    for (int r = 0; r < N; ++r) {
      const F v = splat(a[r * columns_of_block + k]);
      sum[r][0] = fma(v, w0, sum[r][0]);
      sum[r][1] = fma(v, w1, sum[r][1]);
    }
  }
}

#if defined(__AVX512BF16__)
template <int N>
static inline void multiply_add(F (&sum)[N][2], const BF16* a, const BF16* w) {
#pragma GCC unroll 4
  for (int k = 0; k < columns_of_block; k += 2, w += 2 * columns_of_block) {
    __m512bh w0, w1;
    std::memcpy(&w0, w, sizeof w0);
    std::memcpy(&w1, w + 2 * W, sizeof w1);
    for (int r = 0; r < N; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * columns_of_block + k, sizeof pair);
      const __m512bh v = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], v, w0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], v, w1);
    }
  }
}
#else
static inline F low_halves(U pairs) { return reinterpret_cast<F>(pairs << 16); }
static inline F high_halves(U pairs) { return reinterpret_cast<F>(pairs & 0xffff0000); }

template <int N>
static inline void multiply_add(F (&sum)[N][2], const BF16* a, const BF16* w) {
  for (int k = 0; k < columns_of_block; k += 2, w += 2 * columns_of_block) {
    U w0, w1;
    std::memcpy(&w0, w, sizeof w0);
    std::memcpy(&w1, w + 2 * W, sizeof w1);
    for (int r = 0; r < N; ++r) {
      uint32_t pair;
      std::memcpy(&pair, a + r * columns_of_block + k, sizeof pair);
      const F low = low_halves(U{} + pair), high = high_halves(U{} + pair);
      sum[r][0] = fma(high, high_halves(w0), fma(low, low_halves(w0), sum[r][0]));
      sum[r][1] = fma(high, high_halves(w1), fma(low, low_halves(w1), sum[r][1]));
    }
  }
}
#endif

// The sums of one output block for up to two groups of images, in vector registers: R rows and 2 W
// columns at a time. Blocks of weights are taken in parts that stay in L1 for all rows; in between
// the sums wait in memory.
template <typename T>
static void sum_blocks(const Convolution& c, float* sums, int64_t group, const int (&images)[2],
                       int64_t p, int64_t o) {
  constexpr int square = columns_of_block * columns_of_block, pair = sizeof(T) == 2 ? 2 : 1;
  constexpr int64_t part = 16384 / (columns_of_block * 2 * W * sizeof(T));
  const T* in = static_cast<const T*>(c.in) + group * c.in_pixels * c.in_blocks * block_size;
  const T* weight = static_cast<const T*>(c.weight) + o * c.kernel * c.in_blocks * square;
  const int64_t blocks = (c.start[p + 1] - c.start[p]) * c.in_blocks;
  for (int column = 0; column < columns_of_block; column += 2 * W) {
    int64_t first_tap = c.start[p], first_block = 0, done = 0;
    do {
      const int64_t count = blocks - done < part ? blocks - done : part;
      int64_t tap = first_tap, block = first_block;
      for (int g = 0; g < 2; ++g) {
        const T* of_group = in + g * c.in_pixels * c.in_blocks * block_size;
        for_rows<R>(images[g], [&](auto n, int row) {
          float* at = sums + g * block_size + row * columns_of_block + column;
          F sum[n][2] = {};
          for (int r = 0; done && r < n; ++r) {
            sum[r][0] = load(at + r * columns_of_block);
            sum[r][1] = load(at + r * columns_of_block + W);
          }
          tap = first_tap, block = first_block;
          for (int64_t i = 0; i < count; ++i) {
            const int64_t source = c.taps[2 * tap], place = c.taps[2 * tap + 1];
            multiply_add(
                sum,
                of_group + (source * c.in_blocks + block) * block_size + row * columns_of_block,
                weight + (place * c.in_blocks + block) * square + column * pair);
            if (++block == c.in_blocks) block = 0, ++tap;
          }
          for (int r = 0; r < n; ++r) {
            store(at + r * columns_of_block, sum[r][0]);
            store(at + r * columns_of_block + W, sum[r][1]);
          }
        });
      }
      first_tap = tap, first_block = block, done += count;
    } while (done < blocks);
  }
}

#if defined(__AMX_BF16__)
// Tiles of 64 bytes a row, while this lives: 0, 1 and 4 with a row for each image of a first group,
// 2, 3 and 5 of a second, 6 and 7 with 16 of weights.
struct Tiles {
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t row_count[16];
  } config = {};

  Tiles(int first, int second) {
    const int row_count[] = {first, first, second, second, first, second, rows, rows};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.row_count[i] = static_cast<uint8_t>(row_count[i] ? row_count[i] : rows);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { _tile_release(); }
};

// The sums of one output block, for one group of images or for `both` it and the next.
template <bool both>
static void sum_tiles(const Convolution& c, float* sums, int64_t group, int64_t p, int64_t o) {
  const BF16* in = static_cast<const BF16*>(c.in) + group * c.in_pixels * c.in_blocks * block_size;
  const int64_t next = c.in_pixels * c.in_blocks * block_size;
  const BF16* weight = static_cast<const BF16*>(c.weight) + o * c.kernel * c.in_blocks * 1024;
  _tile_zero(0);
  _tile_zero(1);
  if (both) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int32_t t = c.start[p]; t < c.start[p + 1]; ++t) {
    const BF16* a = in + c.taps[2 * t] * c.in_blocks * block_size;
    const BF16* w = weight + c.taps[2 * t + 1] * c.in_blocks * 1024;
    for (int64_t i = 0; i < c.in_blocks; ++i, a += block_size, w += 1024) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, w, 128);
      _tile_loadd(7, w + 32, 128);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (both) {
        _tile_loadd(5, a + next, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  if (both) {
    _tile_stored(2, sums + block_size, 128);
    _tile_stored(3, sums + block_size + 16, 128);
  }
}
#endif

template <typename T>
struct Dense {
  const Convolution& c;

  template <typename Loop>
  void task(int64_t group, const Loop& loop) const {
    const int images[] = {images_of(c.images, group), images_of(c.images, group + 1)};
    with_finish<T>(c.finish, [&](auto finish) {
      alignas(64) float sums[2 * block_size];
#if defined(__AMX_BF16__)
      const Tiles tiles(images[0], images[1]);
#endif
      loop([&](int64_t p, int64_t o) {
#if defined(__AMX_BF16__)
        if constexpr (std::is_same_v<T, BF16>) {
          images[1] ? sum_tiles<true>(c, sums, group, p, o)
                    : sum_tiles<false>(c, sums, group, p, o);
        } else
#endif
        {
          sum_blocks<T>(c, sums, group, images, p, o);
        }
        for (int64_t g = 0; g < 2 && images[g]; ++g) {
          const int64_t block = ((group + g) * c.out_pixels + p) * c.out_blocks + o;
          finish(c.finish, sums + g * block_size, images[g], block, o * columns_of_block);
        }
      });
    });
  }
};

// The sums of one block, each channel by itself, for the first `images` of its group.
template <typename T>
static inline void sum_channels(const Convolution& c, float* sums, int64_t group, int images,
                                int64_t p, int64_t o) {
  const T* in = static_cast<const T*>(c.in) + (group * c.in_pixels * c.in_blocks + o) * block_size;
  const float* weight = static_cast<const float*>(c.weight) + o * columns_of_block;
  for (int column = 0; column < columns_of_block; column += W) {
    for_rows<rows>(images, [&](auto n, int row) {
      const int64_t first = row * columns_of_block + column;
      F sum[n] = {};
      for (int32_t t = c.start[p]; t < c.start[p + 1]; ++t) {
        const T* a = in + c.taps[2 * t] * c.in_blocks * block_size + first;
        const F w = load(weight + c.taps[2 * t + 1] * c.in_blocks * columns_of_block + column);
        for (int r = 0; r < n; ++r) sum[r] = fma(load(a + r * columns_of_block), w, sum[r]);
      }
      for (int r = 0; r < n; ++r) store(sums + first + r * columns_of_block, sum[r]);
    });
  }
}

// in_blocks == out_blocks.
template <typename T>
struct Depthwise {
  const Convolution& c;

  template <typename Loop>
  void task(int64_t first, const Loop& loop) const {
    with_finish<T>(c.finish, [&](auto finish) {
      alignas(64) float sums[block_size];
      loop([&](int64_t p, int64_t o) {
        for (int64_t g = first; g < first + 2; ++g) {
          const int images = images_of(c.images, g);
          if (!images) break;
          sum_channels<T>(c, sums, g, images, p, o);
          const int64_t block = (g * c.out_pixels + p) * c.out_blocks + o;
          finish(c.finish, sums, images, block, o * columns_of_block);
        }
      });
    });
  }
};

static void convolution(const Convolution& c, int threads) noexcept {
  const int64_t weights = c.out_blocks * c.kernel * c.in_blocks * 2 * block_size;
  if (c.dtype == DType::bf16) return for_outputs(c, 2 * weights, threads, Dense<BF16>{c});
  for_outputs(c, 4 * weights, threads, Dense<float>{c});
}

static void depthwise(const Convolution& c, int threads) noexcept {
  if (c.dtype == DType::bf16) return for_outputs(c, 0, threads, Depthwise<BF16>{c});
  for_outputs(c, 0, threads, Depthwise<float>{c});
}
