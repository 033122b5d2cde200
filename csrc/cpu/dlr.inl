// The difference of logits ratio and its gradient, pi the order of a row's logits from the largest:
//   n = z_y - max_{c != y} z_c, d = z_pi1 - z_pi3 + 1e-12, loss = -n / d
//   grad: -1 / d at y, 1 / d at the strongest other class, n / d^2 at pi1, -n / d^2 at pi3, summed
//   where these coincide; else 0
// Arguments: Labelled, with classes >= 3. Computed in fp64. Of equal logits the first comes first.
// NaN is the largest logit, so the loss of its row is NaN. A label outside [0, classes): loss NaN,
// gradient 0.

// The K largest logits of a row in their order, and where they are; index -1: there is none.
template <int K>
struct Leaders {
  float value[K];
  int64_t index[K];
};

// Whether a at i comes before b at j.
static inline bool ahead(float a, int64_t i, float b, int64_t j) {
  if (a != a || b != b) return a != a && (b == b || i < j);
  return a > b || (a == b && i < j);
}

// Each lane keeps the K leaders of its columns; then the lanes' are merged.
template <int K, typename T>
static Leaders<K> leaders(const T* z, int64_t classes) {
  constexpr float inf = __builtin_inff();
  F best[K];
  I at[K], index = {};
  for (int k = 0; k < K; ++k) best[k] = splat(-inf), at[k] = I{} - 1;
  for (int lane = 0; lane < W; ++lane) index[lane] = lane;
  for (int64_t c = 0; c < classes; c += W, index += W) {
    F v = load_head(z + c, classes - c, -inf);
    I i = index, down = {};  // down: lanes whose leaders from here on move one place down
    for (int k = 0; k < K; ++k) {
      const I above = (~(v <= best[k]) & (best[k] == best[k])) | (at[k] < 0);
      down |= above & (index < static_cast<int32_t>(classes));
      const F beaten = best[k];
      const I beaten_at = at[k];
      best[k] = down ? v : best[k], at[k] = down ? i : at[k];
      v = down ? beaten : v, i = down ? beaten_at : i;
    }
  }
  Leaders<K> out;
  for (int k = 0; k < K; ++k) out.value[k] = -inf, out.index[k] = -1;
  for (int lane = 0; lane < W; ++lane) {
    for (int k = 0; k < K && at[k][lane] >= 0; ++k) {
      float v = best[k][lane];
      int64_t i = at[k][lane];
      for (int j = 0; j < K && i >= 0; ++j) {
        const float other = out.value[j];
        const int64_t other_at = out.index[j];
        if (other_at >= 0 && !ahead(v, i, other, other_at)) continue;
        out.value[j] = v, out.index[j] = i;
        v = other, i = other_at;
      }
    }
  }
  return out;
}

template <typename T>
static void dlr_row(float* loss, T* grad, const T* z, int64_t y, int64_t classes) {
  if (grad) __builtin_memset(grad, 0, classes * sizeof(T));
  *loss = __builtin_nanf("");
  if (y < 0 || y >= classes) return;
  const Leaders<3> top = leaders<3>(z, classes);
  const int other = top.index[0] == y;
  const double n = static_cast<double>(load(z + y, 1, 0)[0]) - top.value[other];
  const double d = static_cast<double>(top.value[0]) - top.value[2] + 1e-12;
  *loss = static_cast<float>(-n / d);
  if (!grad) return;
  const int64_t at[4] = {y, top.index[other], top.index[0], top.index[2]};
  const double slope[4] = {-1 / d, 1 / d, n / d / d, -n / d / d};
  for (const int64_t c : at) {
    double sum = 0;
    for (int i = 0; i < 4; ++i) sum += at[i] == c ? slope[i] : 0;
    store(grad + c, splat(static_cast<float>(sum)), 1);
  }
}

static int64_t dlr(const Labelled& a, int threads) noexcept {
  return labelled_rows(a, threads, [](auto... row) { dlr_row(row...); });
}
