// Improved KL divergence and its gradients, from a row's logits a and n and its weights w:
//   p = e^a / Zp, q = e^n / Zq, d = n - a, S = sum_c w_c, m = sum_c w_c d_c / S, share = beta S /
//   sum_i S_i^2
//   loss = alpha / B (log Zp - sum_c q_c a_c) + share / 2 sum_c w_c (d_c - m)^2, summed over rows
//   d/dn = g = share w (d - m), d/da = alpha / B (p - q) - g: q of the first term is a constant
// Arguments: IKL. A class with q_c = 0 or w_c = 0 counts 0 in its term. Exponentials are fp32, d
// and all sums fp64. W rows go together, as in softmax_kl.inl.

alignas(64) static const float ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// The weights of the classes from c on, 0 past the end; `row` is null where all are alike.
static inline F weights(const float* row, int64_t c, int64_t left) {
  return load_head(row ? row + c : ones, left);
}

static inline const float* weight_row(const IKL& k, int64_t i) {
  return k.weight ? k.weight + i * k.weight_stride : nullptr;
}

// sum_i S_i^2; infinite or NaN where a weight is negative, infinite or NaN.
static double squared_weights(const IKL& k, int threads) {
  if (!k.weight) return static_cast<double>(k.batch) * k.classes * k.classes;
  Partial partial;
  for_rows(k.batch, k.classes, threads, [&](int64_t chunk, int64_t first, int rows) {
    for (int64_t i = first; i < first + rows; ++i) {
      Sum sum;
      columns(k.classes, [&](int64_t c, int64_t left) {
        const F w = load_head(weight_row(k, i) + c, left);
        sum.add(w >= 0 ? w : splat(__builtin_nanf("")));
      });
      partial.chunk[chunk] += sum.total() * sum.total();
    }
  });
  return partial.total();
}

// What the first sums of a row give, a row per lane: SCE, m, Zq / Zp, alpha / (B Zq) and share.
struct Divergence {
  alignas(64) double first[W], mean[W], ratio[W], scale[W], share[W];
};

template <typename T>
static void ikl_sums(const IKL& k, const Exp& e, double total, int64_t row, Rows<T>& adv,
                     Rows<T>& clean, Divergence& out) {
  adv.start(e), clean.start(e);
  E zp[W], zq[W], qa[W], mass[W], wd[W];
  for (int r = 0; r < W; ++r) {
    E sum_p = {}, sum_q = {}, sum_a = {}, sum_w = {}, sum_d = {};
    const Row<T> a = adv.row(r), n = clean.row(r);
    const double top = a.maximum();
    columns(r < adv.count ? k.classes : 0, [&](int64_t c, int64_t left) {
      const F x = load_logits(a.logits + c, left), y = load_logits(n.logits + c, left);
      const F p = a.first(e, c, left), q = n.first(e, c, left);
      const F w = weights(weight_row(k, row + r), c, left);
      const E x0 = widen_low(x), x1 = widen_high(x), w0 = widen_low(w), w1 = widen_high(w);
      sum_p += widen_low(p) + widen_high(p);
      sum_q += widen_low(q) + widen_high(q);
      sum_a += product(widen_low(q), x0 - top) + product(widen_high(q), x1 - top);
      sum_w += w0 + w1;
      sum_d += product(w0, widen_low(y) - x0) + product(w1, widen_high(y) - x1);
    });
    zp[r] = sum_p, zq[r] = sum_q, qa[r] = sum_a, mass[r] = sum_w, wd[r] = sum_d;
  }
  for (int h = 0; h < W; h += W / 2) {
    const E p = sum_across(zp + h), q = sum_across(zq + h), s = sum_across(mass + h);
    store(out.first + h, log(p) - sum_across(qa + h) / q);
    store(out.mean + h, sum_across(wd + h) / (s == 0 ? E{} + 1 : s));
    store(out.ratio + h, q / p);
    store(out.scale + h, k.alpha / k.batch / q);
    store(out.share + h, k.beta * s / (total == 0 ? 1 : total));
  }
}

// Returns the loss of the rows [row, row + rows), rows <= W, and writes their gradients.
template <typename T>
static double ikl_rows(const IKL& k, const Exp& e, double total, int64_t row, int rows) {
  const auto side = [&](const void* logits, int64_t stride) {
    return Rows<T>(static_cast<const T*>(logits) + row * stride, stride, k.classes, rows);
  };
  Rows<T> adv = side(k.adv, k.adv_stride), clean = side(k.clean, k.clean_stride);
  Divergence of;
  ikl_sums(k, e, total, row, adv, clean, of);

  double loss = 0;
  for (int r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * k.classes;
    const Row<T> a = adv.row(r), n = clean.row(r);
    const F scale = splat(static_cast<float>(of.scale[r]));
    const F ratio = splat(static_cast<float>(of.ratio[r]));
    const E mean = of.mean[r] - E{}, share = of.share[r] - E{};
    Sum second;
    columns(k.classes, [&](int64_t c, int64_t left) {
      const F x = load_logits(a.logits + c, left), y = load_logits(n.logits + c, left);
      const F w = weights(weight_row(k, row + r), c, left);
      const E w0 = widen_low(w), w1 = widen_high(w);
      const E d0 = w0 == 0 ? E{} : widen_low(y) - widen_low(x) - mean;
      const E d1 = w1 == 0 ? E{} : widen_high(y) - widen_high(x) - mean;
      const E wd0 = w0 * d0, wd1 = w1 * d1;
      second.low += wd0 * d0, second.high += wd1 * d1;
      const F slope = narrow(wd0 * share, wd1 * share);
      if (k.grad_clean) store_head(static_cast<T*>(k.grad_clean) + at + c, slope, left);
      if (k.grad_adv) {
        const F p = a.again(e, c, left), q = n.again(e, c, left);
        const F grad = fma(p, ratio, -q) * scale - slope;
        store_head(static_cast<T*>(k.grad_adv) + at + c, grad, left);
      }
    });
    loss += k.alpha / k.batch * of.first[r] + of.share[r] / 2 * second.total();
  }
  return loss;
}

static int64_t ikl(const IKL& k, int threads) noexcept {
  const double total = squared_weights(k, threads);
  if (!(total < __builtin_inf())) return 1;
  const Exp e = exp_over(1);
  Partial partial;
  for_rows(k.batch, k.classes, threads, [&](int64_t chunk, int64_t first, int rows) {
    with_type(k.dtype, [&](auto* t) {
      partial.chunk[chunk] +=
          ikl_rows<std::remove_pointer_t<decltype(t)>>(k, e, total, first, rows);
    });
  });
  *k.loss = partial.sum();
  return 0;
}
