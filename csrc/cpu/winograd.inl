// A dense 3 x 3 convolution of stride 1 by Winograd's F(4 x 4, 3 x 3) (Lavin & Gray 2016), with a
// quarter of the products:
//   out tile [4, 4] = A^T (sum over input channels of (B^T d B) U) A, U = G g G^T, d the [6, 6]
//   inputs of the tile
// The polynomial points are 0, +-3/4, +-3/2 and infinity: with +-1 and +-2, which most have, sums
// err twice as much. Blocks as for `convolution`; whatever their dtype, all is computed in fp32,
// sums over input channels in one order whatever the threads. The gradient to the input is the same
// with the flipped, transposed weights.

constexpr int in_side = 6, out_side = 4, taps_side = 3;  // of a tile read and written, of a kernel
constexpr int64_t chunk_rows = winograd_rows;
constexpr float point_a = 0.75f, point_b = 1.5f, aa = point_a * point_a, bb = point_b * point_b;

// B^T d of six vectors.
static inline void to_points(F (&d)[in_side]) {
  constexpr float a = point_a, b = point_b;
  const F even_a = fma(splat(-bb), d[2], d[4]), odd_a = fma(splat(-bb), d[1], d[3]);
  const F even_b = fma(splat(-aa), d[2], d[4]), odd_b = fma(splat(-aa), d[1], d[3]);
  d[0] = fma(splat(aa * bb), d[0], fma(splat(-aa - bb), d[2], d[4]));
  d[5] = fma(splat(aa * bb), d[1], fma(splat(-aa - bb), d[3], d[5]));
  d[1] = fma(splat(a), odd_a, even_a), d[2] = fma(splat(-a), odd_a, even_a);
  d[3] = fma(splat(b), odd_b, even_b), d[4] = fma(splat(-b), odd_b, even_b);
}

// A^T m of six vectors, in the first four.
static inline void from_points(F (&m)[in_side]) {
  constexpr float a = point_a, b = point_b;
  const F sum_a = m[1] + m[2], dif_a = m[1] - m[2], sum_b = m[3] + m[4], dif_b = m[3] - m[4];
  m[0] = m[0] + sum_a + sum_b;
  m[1] = fma(splat(a), dif_a, splat(b) * dif_b);
  m[2] = fma(splat(aa), sum_a, splat(bb) * sum_b);
  m[3] = fma(splat(a * aa), dif_a, fma(splat(b * bb), dif_b, m[5]));
}

// G g of three vectors. Row p of G is (1, p, p^2) / the product of p - q over the other points q.
static inline void weights_to_points(const F (&g)[taps_side], F (&u)[in_side]) {
  constexpr float by_a = 2 * aa * (aa - bb), by_b = 2 * bb * (bb - aa);
  const F even_a = splat(1 / by_a) * fma(splat(aa), g[2], g[0]),
          odd_a = splat(point_a / by_a) * g[1];
  const F even_b = splat(1 / by_b) * fma(splat(bb), g[2], g[0]),
          odd_b = splat(point_b / by_b) * g[1];
  u[0] = splat(1 / (aa * bb)) * g[0], u[5] = g[2];
  u[1] = even_a + odd_a, u[2] = even_a - odd_a, u[3] = even_b + odd_b, u[4] = even_b - odd_b;
}

// G g G^T of [32, 32] kernels [3, 3], flipped or not, whose 36 results lie `stride` apart.
static void kernels_to_points(const float (*taps)[columns_of_block][columns_of_block], bool flipped,
                              float* to, int64_t stride) {
  for (int e = 0; e < columns_of_block * columns_of_block; e += W) {
    F by_row[taps_side][in_side], column[in_side];
    for (int y = 0; y < taps_side; ++y) {
      F g[taps_side];
      for (int x = 0; x < taps_side; ++x) {
        const int tap = y * taps_side + x;
        g[x] = load(&taps[flipped ? 8 - tap : tap][0][0] + e);
      }
      weights_to_points(g, by_row[y]);
    }
    for (int x = 0; x < in_side; ++x) {
      weights_to_points({by_row[0][x], by_row[1][x], by_row[2][x]}, column);
      for (int y = 0; y < in_side; ++y) store(to + (y * in_side + x) * stride + e, column[y]);
    }
  }
}

// As `fold`, of 3 x 3 kernels, which become 36 weights each; the backward ones are flipped.
static void fold_points(const Fold& f, int threads) noexcept {
  constexpr int side = columns_of_block, square = side * side, taps = taps_side * taps_side;
  float *forward = static_cast<float*>(f.forward), *backward = static_cast<float*>(f.backward);
  const int64_t out_blocks = (f.out_channels + side - 1) / side;
  const int64_t in_blocks = (f.in_channels + side - 1) / side;
  parallel_for(out_blocks * in_blocks, threads, [&](int64_t task) {
    const int64_t o0 = task / in_blocks * side, i0 = task % in_blocks * side;
    alignas(64) float by_out[taps][side][side] = {}, by_in[taps][side][side];
    for (int64_t o = 0; o < side && o0 + o < f.out_channels; ++o) {
      const float scale = f.scale ? f.scale[o0 + o] : 1.0f;
      const float* weight = f.weight + (o0 + o) * f.out_stride + i0 * f.in_stride;
      for (int64_t i = 0; i < side && i0 + i < f.in_channels; ++i, weight += f.in_stride) {
        for (int t = 0; t < taps; ++t) by_out[t][o][i] = weight[t * f.tap_stride] * scale;
      }
    }
    for (int t = 0; t < taps; ++t) {
      for (int o = 0; o < side; ++o) {
        for (int i = 0; i < side; ++i) by_in[t][i][o] = by_out[t][o][i];
      }
    }
    const int64_t o = task / in_blocks, i = task % in_blocks;
    kernels_to_points(by_in, false, forward + (o * winograd_points * in_blocks + i) * square,
                      in_blocks * square);
    kernels_to_points(by_out, true, backward + (i * winograd_points * out_blocks + o) * square,
                      out_blocks * square);
  });
}

static inline int64_t tiles_of(int64_t outputs) { return (outputs + out_side - 1) / out_side; }

// The units of a chunk, and where each has its rows. A unit is one tile of a group of images; it
// has a row for each of them.
struct Units {
  int64_t group[winograd_rows], top[winograd_rows], left[winograd_rows];
  int images[winograd_rows], first[winograd_rows];
  int count = 0, rows = 0;

  Units(const Winograd& w, int64_t begin, int64_t end) {
    const int64_t across = tiles_of(w.out_width), tiles = across * tiles_of(w.out_height);
    for (int64_t unit = begin; unit < end; ++unit, ++count) {
      const int64_t tile = unit % tiles;
      group[count] = unit / tiles;
      top[count] = tile / across * out_side, left[count] = tile % across * out_side;
      images[count] = images_of(w.images, group[count]);
      first[count] = rows;
      rows += images[count];
    }
  }
};

// The inputs of a chunk at the points: [36, in_blocks, chunk_rows, 32].
template <typename T>
static void transform_inputs(const Winograd& w, const Units& units, float* points) {
  alignas(64) static const T zeros[block_size] = {};
  const T* in = static_cast<const T*>(w.in);
  const int64_t point_size = w.in_blocks * chunk_rows * columns_of_block;
  for (int u = 0; u < units.count; ++u) {
    for (int64_t block = 0; block < w.in_blocks; ++block) {
      const T* pixels[in_side][in_side];
      for (int y = 0; y < in_side; ++y) {
        for (int x = 0; x < in_side; ++x) {
          const int64_t row = units.top[u] - w.top + y, column = units.left[u] - w.left + x;
          const bool inside = 0 <= row && row < w.height && 0 <= column && column < w.width;
          const int64_t pixel = (units.group[u] * w.height + row) * w.width + column;
          pixels[y][x] = inside ? in + (pixel * w.in_blocks + block) * block_size : zeros;
        }
      }
      float* to = points + (block * chunk_rows + units.first[u]) * columns_of_block;
      for (int e = 0; e < units.images[u] * columns_of_block; e += W) {
        F d[in_side][in_side];
        for (int x = 0; x < in_side; ++x) {
          F column[in_side];
          for (int y = 0; y < in_side; ++y) column[y] = load(pixels[y][x] + e);
          to_points(column);
          for (int y = 0; y < in_side; ++y) d[y][x] = column[y];
        }
        for (int y = 0; y < in_side; ++y) {
          to_points(d[y]);
          for (int x = 0; x < in_side; ++x) {
            store(to + (y * in_side + x) * point_size + e, d[y][x]);
          }
        }
      }
    }
  }
}

// The sums of one output block at one point: [rows, 32]. Weights are taken in parts, as
// `sum_blocks` takes them.
static void sum_point(const Winograd& w, const float* in, const float* weight, float* sums,
                      int count) {
  constexpr int square = columns_of_block * columns_of_block;
  constexpr int64_t part = 16384 / (columns_of_block * 2 * W * sizeof(float));
  for (int column = 0; column < columns_of_block; column += 2 * W) {
    for (int64_t begin = 0; begin < w.in_blocks; begin += part) {
      const int64_t end = begin + part < w.in_blocks ? begin + part : w.in_blocks;
      for_rows<R>(count, [&](auto n, int row) {
        float* at = sums + row * columns_of_block + column;
        F sum[n][2] = {};
        for (int r = 0; begin && r < n; ++r) {
          sum[r][0] = load(at + r * columns_of_block);
          sum[r][1] = load(at + r * columns_of_block + W);
        }
        for (int64_t b = begin; b < end; ++b) {
          multiply_add(sum, in + (b * chunk_rows + row) * columns_of_block,
                       weight + b * square + column);
        }
        for (int r = 0; r < n; ++r) {
          store(at + r * columns_of_block, sum[r][0]);
          store(at + r * columns_of_block + W, sum[r][1]);
        }
      });
    }
  }
}

// One output block of a chunk from its sums at the points, [36, chunk_rows, 32], and its finish.
template <typename Finishing>
static void transform_sums(const Winograd& w, const Units& units, const float* points,
                           const Finishing& finish, int64_t block) {
  constexpr int64_t point_size = chunk_rows * columns_of_block;
  alignas(64) float sums[out_side][out_side][block_size];
  for (int u = 0; u < units.count; ++u) {
    const float* from = points + units.first[u] * columns_of_block;
    for (int e = 0; e < units.images[u] * columns_of_block; e += W) {
      F m[out_side][in_side];
      for (int x = 0; x < in_side; ++x) {
        F column[in_side];
        for (int y = 0; y < in_side; ++y) {
          column[y] = load(from + (y * in_side + x) * point_size + e);
        }
        from_points(column);
        for (int y = 0; y < out_side; ++y) m[y][x] = column[y];
      }
      for (int y = 0; y < out_side; ++y) {
        from_points(m[y]);
        for (int x = 0; x < out_side; ++x) store(sums[y][x] + e, m[y][x]);
      }
    }
    for (int y = 0; y < out_side && units.top[u] + y < w.out_height; ++y) {
      for (int x = 0; x < out_side && units.left[u] + x < w.out_width; ++x) {
        const int64_t row = units.group[u] * w.out_height + units.top[u] + y;
        const int64_t pixel = row * w.out_width + units.left[u] + x;
        finish(w.finish, sums[y][x], units.images[u], pixel * w.out_blocks + block,
               block * columns_of_block);
      }
    }
  }
}

// One chunk for the output blocks o0 to o1; memory: of this thread.
template <typename T, typename Finishing>
static void winograd_chunk(const Winograd& w, const Units& units, float* memory,
                           const Finishing& finish, int64_t o0, int64_t o1) {
  constexpr int64_t square = columns_of_block * columns_of_block;
  constexpr int64_t block_rows = chunk_rows * columns_of_block;
  float* sums = memory + winograd_points * w.in_blocks * block_rows;
  transform_inputs<T>(w, units, memory);
  for (int64_t i = 0; i < winograd_points; ++i) {  // so that each weight is read once
    for (int64_t o = o0; o < o1; ++o) {
      sum_point(w, memory + i * w.in_blocks * block_rows,
                w.weight + (o * winograd_points + i) * w.in_blocks * square,
                sums + (o * winograd_points + i) * block_rows, units.rows);
    }
  }
  for (int64_t o = o0; o < o1; ++o) {
    transform_sums(w, units, sums + o * winograd_points * block_rows, finish, o);
  }
}

// A task is a chunk of units for all output blocks or, where chunks are few, a part of them.
template <typename T>
static void winograd_of(const Winograd& w, int threads) {
  const int64_t tiles = tiles_of(w.out_height) * tiles_of(w.out_width);
  const int64_t units = (w.images + rows - 1) / rows * tiles;
  const int64_t most = chunk_rows / (w.images < rows ? w.images : rows);
  const int64_t fair = (units + threads - 1) / threads, size = fair < most ? fair : most;
  const int64_t chunks = (units + size - 1) / size, wanted = (threads + chunks - 1) / chunks;
  const int64_t parts = wanted < w.out_blocks ? wanted : w.out_blocks, tasks = chunks * parts;
  const int64_t memory = winograd_points * (w.in_blocks + w.out_blocks) * chunk_rows;
  parallel_for(threads, threads, [&](int64_t thread) {
    with_finish<T>(w.finish, [&](auto finish) {
      for (int64_t t = thread * tasks / threads; t < (thread + 1) * tasks / threads; ++t) {
        const int64_t begin = t / parts * size, part = t % parts;
        const Units chunk(w, begin, begin + size < units ? begin + size : units);
        winograd_chunk<T>(w, chunk, w.memory + thread * memory * columns_of_block, finish,
                          part * w.out_blocks / parts, (part + 1) * w.out_blocks / parts);
      }
    });
  });
}

static void winograd(const Winograd& w, int threads) noexcept {
  w.dtype == DType::bf16 ? winograd_of<BF16>(w, threads) : winograd_of<float>(w, threads);
}
