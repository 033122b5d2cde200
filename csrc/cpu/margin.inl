// The margin by which the strongest other class beats the label, and its gradient:
//   loss_i = max_{c != y_i} z_c - z_{y_i};  grad_i = +1 at the first maximum, -1 at y_i, else 0
// Arguments: Labelled. NaN is the largest logit. A label outside [0, classes): loss NaN, gradient
// 0. No other logit above -inf, as with one class: loss -inf, gradient 0.

static inline void signs(float* row, int64_t up, int64_t down) { row[up] = 1, row[down] = -1; }
static inline void signs(BF16* row, int64_t up, int64_t down) {
  row[up].bits = 0x3f80, row[down].bits = 0xbf80;
}
static inline void signs(F16* row, int64_t up, int64_t down) {
  row[up].bits = 0x3c00, row[down].bits = 0xbc00;
}

// The largest of z but z[y] into *top, NaN above all; its first index, or -1 where all are -inf.
template <typename T>
static int64_t runner_up(const T* z, int64_t y, int64_t classes, float* top) {
  constexpr float inf = __builtin_inff();
  I index = {}, at = I{} - 1;
  for (int lane = 0; lane < W; ++lane) index[lane] = lane;
  F best = splat(-inf);
  for (int64_t i = 0; i < classes; i += W, index += W) {
    const F v = load_head(z + i, classes - i, -inf);
    const I better = ~(v <= best) & (best == best) & (index != static_cast<int32_t>(y));
    best = better ? v : best;
    at = better ? index : at;
  }
  *top = best[0];
  int64_t first = at[0];
  for (int lane = 1; lane < W && lane < classes; ++lane) {
    const float v = best[lane];
    const bool equal = v == *top || (v != v && *top != *top);
    if (equal ? at[lane] < first : !(v <= *top) && *top == *top) *top = v, first = at[lane];
  }
  return first;
}

template <typename T>
static void margin_row(float* loss, T* grad, const T* z, int64_t y, int64_t classes) {
  const bool valid = y >= 0 && y < classes;
  float top = __builtin_nanf("");
  const int64_t other = valid ? runner_up(z, y, classes, &top) : -1;
  *loss = valid ? top - load(z + y, 1, 0)[0] : top;
  if (!grad) return;
  __builtin_memset(grad, 0, classes * sizeof(T));
  if (other >= 0) signs(grad, other, y);
}

static int64_t margin(const Labelled& a, int threads) noexcept {
  return labelled_rows(a, threads, [](auto... row) { margin_row(row...); });
}
