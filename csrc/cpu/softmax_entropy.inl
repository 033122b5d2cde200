// Entropy of a softmax at temperature T and its gradient, from a = (z - max z) / T, q = e^a / S:
//   exact, for an offset o of 0: H = log S - m, m = sum_c q_c a_c, dH/dz = -q (a - m) / T
//   o > 0: H = -sum_c q_c log(q_c + o), dH/dz = -q (g - G) / T, g = log(q + o) + q / (q + o),
//   G = sum_c q_c g_c
// Arguments: SoftmaxEntropy; the loss is H. A class with q_c = 0 counts 0. Exponentials and g are
// fp32, all else is fp64.

template <typename T>
static void exact_entropy(float* loss, T* grad, Rows<T>& rows, const Exp& e, const double* sum,
                          double per_t) {
  const int64_t n = rows.classes;
  alignas(64) double log_sum[W], moment[W];
  log_all(sum, log_sum);
  rows.sum(moment, [&](int r) {
    const Row<T> z = rows.row(r);
    return [&e, z, top = z.maximum()](int64_t c, int64_t left) {
      const F x = load_logits(z.logits + c, left), v = z.again(e, c, left);
      return product(widen_low(v), widen_low(x) - top) +
             product(widen_high(v), widen_high(x) - top);
    };
  });
  for (int r = 0; r < rows.count; ++r) {
    const Row<T> z = rows.row(r);
    const double top = z.maximum(), mean = moment[r] / sum[r];
    loss[r] = static_cast<float>(log_sum[r] - mean * per_t);
    if (!grad) continue;
    const F scale = splat(static_cast<float>(-per_t * per_t / sum[r]));
    columns(n, [&](int64_t c, int64_t left) {
      const F x = load_logits(z.logits + c, left), v = z.again(e, c, left);
      const F g = narrow(widen_low(x) - top - mean, widen_high(x) - top - mean);
      store_head(grad + r * n + c, v == 0 ? F{} : v * g * scale, left);
    });
  }
}

// log(q + o), and g.
struct Guarded {
  E log_q, slope;
};

static inline Guarded guarded(E q, double offset) {
  const E guard = q + offset, log_q = log(guard);
  return {log_q, log_q + q / guard};
}

template <typename T>
static void guarded_entropy(float* loss, T* grad, Rows<T>& rows, const Exp& e, const double* sum,
                            double per_t, double offset) {
  const int64_t n = rows.classes;
  alignas(64) double entropy[W], ratio[W];  // ratio: sum_c q_c^2 / (q_c + o), so that G = ratio - H
  alignas(64) float slopes[stash];          // g, where the exponentials are kept
  const auto slopes_of = [&](int r) { return rows.keep ? slopes + r * rows.padded : nullptr; };
  rows.sum(entropy, [&](int r) {
    return [&e, offset, z = rows.row(r), kept = slopes_of(r), per_sum = 1 / sum[r]](int64_t c,
                                                                                    int64_t left) {
      const F v = z.again(e, c, left);
      const E low = widen_low(v) * per_sum, high = widen_high(v) * per_sum;
      const Guarded a = guarded(low, offset), b = guarded(high, offset);
      if (kept) store(kept + c, narrow(a.slope, b.slope));
      return -(low * a.log_q + high * b.log_q);
    };
  });
  for (int r = 0; r < rows.count; ++r) loss[r] = static_cast<float>(entropy[r]);
  if (!grad) return;
  rows.sum(ratio, [&](int r) {
    return [&e, offset, z = rows.row(r), per_sum = 1 / sum[r]](int64_t c, int64_t left) {
      const F v = z.again(e, c, left);
      const E low = widen_low(v) * per_sum, high = widen_high(v) * per_sum;
      return low * low / (low + offset) + high * high / (high + offset);
    };
  });
  for (int r = 0; r < rows.count; ++r) {
    const Row<T> z = rows.row(r);
    const float* kept = slopes_of(r);
    const double per_sum = 1 / sum[r];
    const F scale = splat(static_cast<float>(-per_t * per_sum));
    const F mean = splat(static_cast<float>(ratio[r] - entropy[r]));
    columns(n, [&](int64_t c, int64_t left) {
      const F v = z.again(e, c, left);
      const F g = kept ? load(kept + c)
                       : narrow(guarded(widen_low(v) * per_sum, offset).slope,
                                guarded(widen_high(v) * per_sum, offset).slope);
      store_head(grad + r * n + c, v * (g - mean) * scale, left);
    });
  }
}

static void softmax_entropy(const SoftmaxEntropy& a, int threads) noexcept {
  const Exp e = exp_over(a.temperature);
  const double per_t = 1 / a.temperature;
  const int64_t n = a.classes;
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(a.batch, n, threads, [&](int64_t, int64_t first, int count) {
      Rows<T> rows(static_cast<const T*>(a.logits) + first * n, n, n, count);
      T* out = a.grad ? static_cast<T*>(a.grad) + first * n : nullptr;
      alignas(64) double sum[W];
      rows.exponentiate(e, sum);
      if (a.offset > 0) {
        guarded_entropy(a.loss + first, out, rows, e, sum, per_t, a.offset);
      } else {
        exact_entropy(a.loss + first, out, rows, e, sum, per_t);
      }
    });
  });
}
