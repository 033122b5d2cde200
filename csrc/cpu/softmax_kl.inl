// KL divergence of two softmaxes and its gradients, from a row's logits s and t at temperature T:
//   p = e^(s / T) / Zs, q = e^(t / T) / Zt, g = t - s, D = sum_c q_c g_c
//   KL = sum_c q_c (log q_c - log p_c) = D / T + log Zs - log Zt; a term with q_c = 0 counts 0
//   loss = f w KL, d/ds = f w (p - q) / T, d/dt = f w q (g - D) / T^2, d/dw = f KL
// Arguments: SoftmaxKL. Exponentials are fp32, the terms that cancel (g, D, sums) fp64. W
// rows go together: one tree reduces the sums of all, and the rest per row has a row per lane.

// The quantities that the sums of a row give, a row per lane: KL, D, Zt / Zs and f / (T Zt).
struct PerRow {
  alignas(64) double kl[W], mean[W], ratio[W], scale[W];
};

template <typename T>
static void sums(const SoftmaxKL& k, const Exp& e, Rows<T>& student, Rows<T>& teacher,
                 PerRow& out) {
  const F max_s = student.start(e), max_t = teacher.start(e);
  E zs[W], zt[W], d[W];
  for (int r = 0; r < W; ++r) {
    E sum_p = {}, sum_q = {}, sum_g = {};
    const Row<T> s = student.row(r), t = teacher.row(r);
    columns(r < student.count ? k.classes : 0, [&](int64_t c, int64_t left) {
      const F x = load_logits(s.logits + c, left), y = load_logits(t.logits + c, left);
      const F p = s.first(e, c, left), q = t.first(e, c, left);
      sum_p += widen_low(p) + widen_high(p);
      sum_q += widen_low(q) + widen_high(q);
      sum_g += product(widen_low(q), widen_low(y) - widen_low(x)) +
               product(widen_high(q), widen_high(y) - widen_high(x));
    });
    zs[r] = sum_p, zt[r] = sum_q, d[r] = sum_g;
  }

  const double per_t = 1 / k.temperature;
  for (int h = 0; h < W; h += W / 2) {
    const E a = sum_across(zs + h), b = sum_across(zt + h), mean = sum_across(d + h) / b;
    const E apart = h ? widen_high(max_s) - widen_high(max_t) : widen_low(max_s) - widen_low(max_t);
    store(out.kl + h, (mean + apart) * per_t + log(a / b));
    store(out.mean + h, mean);
    store(out.ratio + h, b / a);
    store(out.scale + h, k.factor * per_t / b);
  }
}

// The rows [first, first + rows), rows <= W: their gradients, and KL in `out`.
template <typename T>
static void kl_rows(const SoftmaxKL& k, const Exp& e, int64_t first, int rows, PerRow& out) {
  const auto side = [&](const void* logits, int64_t stride) {
    return Rows<T>(static_cast<const T*>(logits) + first * stride, stride, k.classes, rows);
  };
  Rows<T> student = side(k.student, k.student_stride), teacher = side(k.teacher, k.teacher_stride);
  sums(k, e, student, teacher, out);
  if (!k.grad_student && !k.grad_teacher) return;

  const F per_t = splat(static_cast<float>(1 / k.temperature));
  for (int r = 0; r < rows; ++r) {
    const int64_t row = (first + r) * k.classes;
    const Row<T> s = student.row(r), t = teacher.row(r);
    const double weight = k.weight ? k.weight[first + r] : 1;
    const F scale = splat(static_cast<float>(weight * out.scale[r]));
    const F ratio = splat(static_cast<float>(out.ratio[r]));
    const E mean = out.mean[r] - E{};
    columns(k.classes, [&](int64_t c, int64_t left) {
      const F p = s.again(e, c, left), q = t.again(e, c, left);
      if (k.grad_student) {
        store_head(static_cast<T*>(k.grad_student) + row + c, fma(p, ratio, -q) * scale, left);
      }
      if (k.grad_teacher) {
        const F x = load_logits(s.logits + c, left), y = load_logits(t.logits + c, left);
        const F g =
            narrow(widen_low(y) - widen_low(x) - mean, widen_high(y) - widen_high(x) - mean);
        const F grad = (q == 0 ? F{} : q * g * per_t) * scale;
        store_head(static_cast<T*>(k.grad_teacher) + row + c, grad, left);
      }
    });
  }
}

static void softmax_kl(const SoftmaxKL& k, int threads) noexcept {
  const Exp e = exp_over(k.temperature);
  Partial partial;
  for_rows(k.batch, k.classes, threads, [&](int64_t chunk, int64_t first, int rows) {
    PerRow out;
    with_type(k.dtype, [&](auto* t) {
      kl_rows<std::remove_pointer_t<decltype(t)>>(k, e, first, rows, out);
    });
    for (int r = 0; r < rows; ++r) {
      const double kl = k.factor * out.kl[r];
      const double loss = k.weight ? k.weight[first + r] * kl : kl;
      if (k.grad_weight) k.grad_weight[first + r] = static_cast<float>(kl);
      if (k.reduced) {
        partial.chunk[chunk] += loss;
      } else {
        k.loss[first + r] = static_cast<float>(loss);
      }
    }
  });
  if (k.reduced) *k.loss = partial.sum();
}
