// KL divergence of two softmaxes and its gradients for rows of few classes, a thread to a row:
//   p = e^(s / T) / Zs, q = e^(t / T) / Zt, g = t - s, D = sum_c q_c g_c
//   KL = D / T + log Zs - log Zt; a term with q_c = 0 counts 0
//   loss = f w KL, d/ds = f w (p - q) / T, d/dt = f w q (g - D) / T^2, d/dw = f KL
// Arguments: SoftmaxKL. Exponentials are fp32, from 2^x. The terms that cancel (g, D and
// the sums) are fp64. Each pass reads the logits again: of few classes they are in the cache.

struct Bf16 {
  uint16_t raw;
};
struct F16 {
  uint16_t raw;
};

FASTADV_BODY float widen(float v) { return v; }
FASTADV_BODY float widen(Bf16 v) { return bits<float>(uint32_t{v.raw} << 16); }
FASTADV_BODY float widen(F16 v) {
  const uint32_t magnitude = v.raw & 0x7fffu, sign = (v.raw & 0x8000u) << 16;
  // With fp32's exponent 112 too small, which a product makes good for subnormal numbers too.
  const uint32_t finite = bits<uint32_t>(bits<float>(magnitude << 13) * 0x1p112f);
  return bits<float>(sign | (magnitude < 0x7c00u ? finite : 0x7f800000u | magnitude << 13));
}

// Rounded to nearest, of two to the even one; NaN stays NaN.
FASTADV_BODY void narrow(float v, float* out) { *out = v; }
FASTADV_BODY void narrow(float v, Bf16* out) {
  const uint32_t raw = bits<uint32_t>(v);
  out->raw = v != v ? 0x7fc0 : static_cast<uint16_t>((raw + 0x7fffu + (raw >> 16 & 1)) >> 16);
}
FASTADV_BODY void narrow(float v, F16* out) {
  const uint32_t raw = bits<uint32_t>(v), magnitude = raw & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00;  // 65520 and more round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: the sum with 1/2 has the result's last place.
    half = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  out->raw = static_cast<uint16_t>(raw >> 16 & 0x8000u) | static_cast<uint16_t>(half);
}

FASTADV_BODY double product(double q, double g) { return q == 0 ? 0.0 : q * g; }

template <typename T>
struct KLRow {
  const T *s, *t;
  int64_t classes;
  float per_t, top_s, top_t;  // per_t: log2(e) / T
  double zs, zt, mean;

  FASTADV_BODY KLRow(const SoftmaxKL& k, int64_t row)
      : s(static_cast<const T*>(k.student) + row * k.student_stride),
        t(static_cast<const T*>(k.teacher) + row * k.teacher_stride),
        classes(k.classes),
        per_t(static_cast<float>(1.4426950408889634 / k.temperature)),
        top_s(widen(s[0])),
        top_t(widen(t[0])) {
    for (int64_t c = 1; c < classes; ++c) {
      const float x = widen(s[c]), y = widen(t[c]);
      top_s = x > top_s ? x : top_s;
      top_t = y > top_t ? y : top_t;
    }
    double sum_p = 0, sum_q = 0, sum_g = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const double p = student(c), q = teacher(c);
      sum_p += p;
      sum_q += q;
      sum_g += product(q, gap(c));
    }
    zs = sum_p, zt = sum_q, mean = sum_g / sum_q;
  }

  FASTADV_BODY float student(int64_t c) const { return exp2f((widen(s[c]) - top_s) * per_t); }
  FASTADV_BODY float teacher(int64_t c) const { return exp2f((widen(t[c]) - top_t) * per_t); }
  FASTADV_BODY double gap(int64_t c) const {
    return static_cast<double>(widen(t[c])) - static_cast<double>(widen(s[c]));
  }
  FASTADV_BODY double kl(double temperature) const {
    const double apart = static_cast<double>(top_s) - static_cast<double>(top_t);
    return (mean + apart) / temperature + log(zs / zt);
  }
};

// Writes a row's gradients and returns its loss.
template <typename T>
FASTADV_BODY double kl_row(const SoftmaxKL& k, int64_t i) {
  const KLRow<T> row(k, i);
  const double kl = k.factor * row.kl(k.temperature), weight = k.weight ? k.weight[i] : 1.0;
  if (k.grad_weight) k.grad_weight[i] = static_cast<float>(kl);
  const float ratio = static_cast<float>(row.zt / row.zs);
  const float scale = static_cast<float>(weight * k.factor / (k.temperature * row.zt));
  const float per_t = static_cast<float>(1 / k.temperature);
  for (int64_t c = 0; c < k.classes; ++c) {
    const float q = row.teacher(c);
    if (k.grad_student) {
      narrow(fmaf(row.student(c), ratio, -q) * scale,
             static_cast<T*>(k.grad_student) + i * k.classes + c);
    }
    if (k.grad_teacher) {
      const float g = static_cast<float>(row.gap(c) - row.mean);
      narrow((q == 0 ? 0.0f : q * g * per_t) * scale,
             static_cast<T*>(k.grad_teacher) + i * k.classes + c);
    }
  }
  return k.weight ? weight * kl : kl;
}

template <typename T>
struct SoftmaxKLRows {
  static constexpr int block = 64;
  SoftmaxKL k;

  FASTADV_BODY void operator()(int64_t thread, int64_t threads) const {
    for (int64_t i = thread; i < k.batch; i += threads) {
      k.loss[i] = static_cast<float>(kl_row<T>(k, i));
    }
  }
};

// The same, as the sum over a thread's rows; one block adds up those of its threads.
template <typename T>
struct SoftmaxKLSum {
  SoftmaxKL k;

  FASTADV_BODY double operator()(int64_t thread, int64_t threads) const {
    double sum = 0;
    for (int64_t i = thread; i < k.batch; i += threads) sum += kl_row<T>(k, i);
    return sum;
  }
};

template <typename T, typename Launch>
void softmax_kl_of(const SoftmaxKL& k, const Launch& launch) {
  if (k.reduced) {
    launch.sum(SoftmaxKLSum<T>{k}, k.loss);
  } else {
    launch(SoftmaxKLRows<T>{k}, k.batch);
  }
}

inline bool softmax_kl_takes(const SoftmaxKL&) { return true; }

template <typename Launch>
void softmax_kl_with(const SoftmaxKL& k, const Launch& launch) {
  switch (k.dtype) {
    case DType::f32:
      return softmax_kl_of<float>(k, launch);
    case DType::bf16:
      return softmax_kl_of<Bf16>(k, launch);
    case DType::f16:
      return softmax_kl_of<F16>(k, launch);
  }
}
