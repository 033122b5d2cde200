// KL divergence of two softmaxes and its gradients, from a row's logits s and t at temperature T:
//   p = e^(s / T) / Zs, q = e^(t / T) / Zt, g = t - s, D = sum_c q_c g_c
//   KL = sum_c q_c (log q_c - log p_c) = D / T + log Zs - log Zt; a term with q_c = 0 counts 0
//   loss = f w KL, d/ds = f w (p - q) / T, d/dt = f w q (g - D) / T^2, d/dw = f KL
// Shapes: SoftmaxKL in table.h. Exponentials are fp32; what cancels (g, D and the sums) is fp64. W
// rows go together: one tree reduces the sums of all, and the rest per row has a row per lane.

// Exponentials kept from the second pass for the third, where the rows' fit.
constexpr int64_t stash = 4096;

// Calls body(c, lanes left) for each vector of a row.
template <typename Body>
static inline void columns(int64_t n, const Body& body) {
  for (int64_t c = 0; c < n; c += W) body(c, n - c);
}

template <typename T>
static inline F logits(const T* p, int64_t n) {
  return load_head(p, n, -__builtin_inff());
}

// A row's logits, the exponentials kept of it, and where they start from.
template <typename T>
struct Row {
  const T* logits;
  float* kept;
  Top top;
};

// The rows of the student or of the teacher.
template <typename T>
struct Side {
  const T* logits;
  int64_t stride, padded;
  alignas(64) float base[W], top[W], shift[W], rest[W];
  alignas(64) float kept[stash];

  void start(F maximum, const Exp& e) {
    const Top from = top_of(maximum, e);
    store(base, from.base), store(top, from.top);
    store(shift, from.shift), store(rest, from.rest);
  }

  Row<T> row(int r) {
    return {logits + r * stride,
            kept + r * padded,
            {splat(base[r]), splat(top[r]), splat(shift[r]), splat(rest[r])}};
  }
};

// q g, 0 where q is 0.
static inline E product(E q, E g) { return q == 0 ? E{} : q * g; }

// What is left of a row after its sums, a row per lane: KL, D, Zt / Zs and f / (T Zt).
struct PerRow {
  alignas(64) double kl[W], mean[W], ratio[W], scale[W];
};

template <typename T>
static void sums(const SoftmaxKL& k, const Exp& e, int rows, bool keep, Side<T>& student,
                 Side<T>& teacher, PerRow& out) {
  const int64_t n = k.classes;
  F top_s[W], top_t[W];
  for (int r = 0; r < W; ++r) {
    F a = splat(-__builtin_inff()), b = a;
    const T *s = student.logits + r * student.stride, *t = teacher.logits + r * teacher.stride;
    columns(r < rows ? n : 0, [&](int64_t c, int64_t m) {
      a = max(a, logits(s + c, m));
      b = max(b, logits(t + c, m));
    });
    top_s[r] = a, top_t[r] = b;
  }
  const F max_s = max_across(top_s), max_t = max_across(top_t);
  student.start(max_s, e), teacher.start(max_t, e);

  E zs[W], zt[W], d[W];
  for (int r = 0; r < W; ++r) {
    E sum_p = {}, sum_q = {}, sum_g = {};
    const Row<T> s = student.row(r), t = teacher.row(r);
    columns(r < rows ? n : 0, [&](int64_t c, int64_t m) {
      const F x = logits(s.logits + c, m), y = logits(t.logits + c, m);
      const F p = exp(x, e, s.top), q = exp(y, e, t.top);
      if (keep) store(s.kept + c, p), store(t.kept + c, q);
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
  const int64_t n = k.classes, padded = (n + W - 1) / W * W;
  const bool keep = rows * padded <= stash;
  Side<T> student, teacher;
  student.logits = static_cast<const T*>(k.student) + first * k.student_stride;
  teacher.logits = static_cast<const T*>(k.teacher) + first * k.teacher_stride;
  student.stride = k.student_stride, teacher.stride = k.teacher_stride;
  student.padded = teacher.padded = keep ? padded : 0;
  sums(k, e, rows, keep, student, teacher, out);
  if (!k.grad_student && !k.grad_teacher) return;

  const F per_t = splat(static_cast<float>(1 / k.temperature));
  for (int r = 0; r < rows; ++r) {
    const int64_t row = (first + r) * n;
    const Row<T> s = student.row(r), t = teacher.row(r);
    const double weight = k.weight ? k.weight[first + r] : 1;
    const F scale = splat(static_cast<float>(weight * out.scale[r]));
    const F ratio = splat(static_cast<float>(out.ratio[r]));
    const E mean = out.mean[r] - E{};
    columns(n, [&](int64_t c, int64_t m) {
      const F p = keep ? load(s.kept + c) : exp(logits(s.logits + c, m), e, s.top);
      const F q = keep ? load(t.kept + c) : exp(logits(t.logits + c, m), e, t.top);
      if (k.grad_student) {
        store_head(static_cast<T*>(k.grad_student) + row + c, fma(p, ratio, -q) * scale, m);
      }
      if (k.grad_teacher) {
        const F x = logits(s.logits + c, m), y = logits(t.logits + c, m);
        const F g =
            narrow(widen_low(y) - widen_low(x) - mean, widen_high(y) - widen_high(x) - mean);
        const F grad = (q == 0 ? F{} : q * g * per_t) * scale;
        store_head(static_cast<T*>(k.grad_teacher) + row + c, grad, m);
      }
    });
  }
}

static void softmax_kl(const SoftmaxKL& k, int threads) noexcept {
  // A chunk is at least 16 Ki elements and a 64th of the batch, whatever the threads.
  const int64_t least = 16384 / k.classes + 1, part = (k.batch + 63) / 64;
  const int64_t chunk = least > part ? least : part;
  const int64_t fit = stash / ((k.classes + W - 1) / W * W);
  const int64_t group = fit < 1 ? 1 : fit < W ? fit : W;
  const Exp e = exp_over(k.temperature);
  double partial[64] = {};
  parallel_for((k.batch + chunk - 1) / chunk, threads, [&](int64_t i) {
    const int64_t end = (i + 1) * chunk < k.batch ? (i + 1) * chunk : k.batch;
    for (int64_t first = i * chunk; first < end; first += group) {
      const int rows = static_cast<int>(end - first < group ? end - first : group);
      PerRow out;
      with_type(k.dtype, [&](auto* t) {
        kl_rows<std::remove_pointer_t<decltype(t)>>(k, e, first, rows, out);
      });
      for (int r = 0; r < rows; ++r) {
        const double kl = k.factor * out.kl[r];
        const double loss = k.weight ? k.weight[first + r] * kl : kl;
        if (k.grad_weight) k.grad_weight[first + r] = static_cast<float>(kl);
        if (k.reduced) {
          partial[i] += loss;
        } else {
          k.loss[first + r] = static_cast<float>(loss);
        }
      }
    }
  });
  if (k.reduced) {
    double total = 0;
    for (const double sum : partial) total += sum;
    *k.loss = static_cast<float>(total);
  }
}
