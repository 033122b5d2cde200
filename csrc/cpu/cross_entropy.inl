// Cross-entropy of a softmax with probabilities t or with the one-hot t of a label, smoothed:
//   q = (1 - a) t + a / C, Q = sum_c q_c, Z = sum_c e^(z_c - max z)
//   loss = sum_c q_c (max z - z_c) + Q log Z; a term with t_c = 0 counts a / C alone
//   grad = Q e^(z - max z) / Z - q
// Arguments: CrossEntropy. A mean is over the rows that are not ignored, and grad has its factor. A
// label that is `ignored`: loss and gradient 0; any other outside [0, classes): loss NaN, gradient
// 0. Exponentials are fp32; sums, and terms that cancel, are fp64.

// Per row: Z, log Z, sum_c t_c, sum_c t_c (max z - z_c) and sum_c (max z - z_c).
struct CrossEntropySums {
  alignas(64) double z[W], log_z[W], mass[W], far[W], spread[W];
};

template <typename T>
static void cross_entropy_sums(Rows<T>& rows, const Exp& e, const int64_t* y, const float* target,
                               bool smoothed, CrossEntropySums& out) {
  const int64_t n = rows.classes;
  rows.exponentiate(e, out.z);
  log_all(out.z, out.log_z);
  if (smoothed) {
    rows.sum(out.spread, [&](int r) {
      const Row<T> z = rows.row(r);
      return [z = z.logits, top = z.maximum()](int64_t c, int64_t left) {
        const F x = load_head(z + c, left, static_cast<float>(top));
        return top - widen_low(x) + (top - widen_high(x));
      };
    });
  }
  if (y) {
    for (int r = 0; r < rows.count; ++r) {
      const bool valid = y[r] >= 0 && y[r] < n;  // an ignored one's loss is not taken
      const Row<T> z = rows.row(r);
      out.mass[r] = valid ? 1 : __builtin_nan("");
      out.far[r] = valid ? z.maximum() - load(z.logits + y[r], 1, 0)[0] : 0;
    }
    return;
  }
  rows.sum(out.mass, [&](int r) {
    return [t = target + r * n](int64_t c, int64_t left) {
      const F v = load_head(t + c, left);
      return widen_low(v) + widen_high(v);
    };
  });
  rows.sum(out.far, [&](int r) {
    const Row<T> z = rows.row(r);
    return [z = z.logits, top = z.maximum(), t = target + r * n](int64_t c, int64_t left) {
      const F x = load_logits(z + c, left), v = load_head(t + c, left);
      return product(widen_low(v), top - widen_low(x)) +
             product(widen_high(v), top - widen_high(x));
    };
  });
}

// grad = factor (e scale - q) for one row, e the exponentials; the label's element anew in fp64.
template <typename T>
static void cross_entropy_grad(T* grad, const Row<T>& z, const Exp& e, double sum, double mass,
                               const int64_t* y, const float* target, int64_t n, double a,
                               int64_t ignored, double factor) {
  const bool valid = !y || (*y >= 0 && *y < n && *y != ignored);
  if (!valid) {
    __builtin_memset(grad, 0, n * sizeof(T));
    return;
  }
  const F scale = splat(static_cast<float>(factor * mass / sum));
  const F keep = splat(static_cast<float>(factor * (1 - a)));
  const F even = splat(static_cast<float>(factor * a / n));
  columns(n, [&](int64_t c, int64_t left) {
    const F q = target ? fma(load_head(target + c, left), keep, even) : even;
    store_head(grad + c, fma(z.again(e, c, left), scale, -q), left);
  });
  if (y) {  // p - 1 without the cancellation that makes it 0 at a confident row
    const double value = factor * ((z.at(e, *y) - sum) / sum + a * (n - 1) / n);
    store(grad + *y, splat(static_cast<float>(value)), 1);
  }
}

static int64_t cross_entropy(const CrossEntropy& k, int threads) noexcept {
  const Exp e = exp_over(1);
  const double a = k.smoothing;
  const int64_t classes = k.classes, ignored = k.ignored;
  int64_t kept = k.batch;
  for (int64_t i = 0; k.y && i < k.batch; ++i) kept -= k.y[i] == ignored;
  const double factor = k.reduction == Reduction::mean && kept > 0 ? 1.0 / kept : 1.0;
  Partial partial;
  with_type(k.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(k.batch, classes, threads, [&](int64_t chunk, int64_t first, int count) {
      Rows<T> rows(static_cast<const T*>(k.logits) + first * classes, classes, classes, count);
      const int64_t* labels = k.y ? k.y + first : nullptr;
      const float* soft = k.target ? k.target + first * classes : nullptr;
      CrossEntropySums sums;
      cross_entropy_sums(rows, e, labels, soft, a > 0, sums);
      for (int r = 0; r < count; ++r) {
        const double mass = (1 - a) * sums.mass[r] + a;
        double value = (a < 1 ? (1 - a) * sums.far[r] : 0) +
                       (a > 0 ? a / classes * sums.spread[r] : 0) + mass * sums.log_z[r];
        value = labels && labels[r] == ignored ? 0 : factor * value;
        if (k.reduction == Reduction::none) {
          k.loss[first + r] = static_cast<float>(value);
        } else {
          partial.chunk[chunk] += value;
        }
        if (k.grad) {
          cross_entropy_grad(static_cast<T*>(k.grad) + (first + r) * classes, rows.row(r), e,
                             sums.z[r], mass, labels ? labels + r : nullptr,
                             soft ? soft + r * classes : nullptr, classes, a, ignored, factor);
        }
      }
    });
  });
  if (k.reduction != Reduction::none) *k.loss = partial.sum();
  return k.y ? wrong_labels(k.y, k.batch, classes, ignored) : 0;
}
