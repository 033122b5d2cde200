// The distance of a student's features from a teacher's per sample, and both gradients:
//   mse: mean (s - t)^2;  l2: ||s - t||;  d loss / d s = k (s - t), k = 2 / size or 1 / ||s - t||
//   cosine: 1 - <s, t> / (||s|| ||t||);  d loss / d s = (<s, t> s - ||s||^2 t) / (||s||^3 ||t||)
// Arguments: FeatureDistance. A vector of norm <= 1e-12 has no direction: its cosine distance is 1,
// with gradient 0. l2 has gradient 0 up to a distance of 1e-30. Sums are
// fp64, lane by lane: 500 000 elements keep fp32's last bit, whatever their scale.

// Returns sum (s - t)^2; s_grad = k (s - t) and t_grad = -s_grad where they are not null.
template <typename T>
static double difference(T* s_grad, T* t_grad, const T* s, const T* t, int64_t n, double k) {
  const F scale = splat(static_cast<float>(k));
  Sum sum;
  for (int64_t i = 0; i < n; i += W) {
    const F d = load_head(s + i, n - i) - load_head(t + i, n - i), grad = d * scale;
    sum.add(d, d);
    if (s_grad) store_head(s_grad + i, grad, n - i);
    if (t_grad) store_head(t_grad + i, -grad, n - i);
  }
  return sum.total();
}

// out = k (a s - b t), in fp64: the terms cancel where s and t are close.
template <typename T>
static void combine(T* out, const T* s, const T* t, int64_t n, double k, double a, double b) {
  for (int64_t i = 0; i < n; i += W) {
    const D v = k * (a * widen(load_head(s + i, n - i)) - b * widen(load_head(t + i, n - i)));
    store_head(out + i, __builtin_convertvector(v, F), n - i);
  }
}

template <typename T>
static double cosine_distance(T* s_grad, T* t_grad, const T* s, const T* t, int64_t n) {
  Sum s_s, t_t, s_t;
  for (int64_t i = 0; i < n; i += W) {
    const F a = load_head(s + i, n - i), b = load_head(t + i, n - i);
    s_s.add(a, a);
    t_t.add(b, b);
    s_t.add(a, b);
  }
  const double ss = s_s.total(), tt = t_t.total(), st = s_t.total();
  const bool directed = !(ss <= 1e-24 || tt <= 1e-24);
  const double norms = directed ? __builtin_sqrt(ss * tt) : __builtin_inf();
  if (s_grad) combine(s_grad, s, t, n, directed ? 1 / (norms * ss) : 0, st, ss);
  if (t_grad) combine(t_grad, t, s, n, directed ? 1 / (norms * tt) : 0, st, tt);
  return 1 - st / norms;
}

template <typename T>
static double sample(T* s_grad, T* t_grad, const T* s, const T* t, int64_t n, Distance distance) {
  if (distance == Distance::cosine) return cosine_distance(s_grad, t_grad, s, t, n);
  if (distance == Distance::mse) return difference(s_grad, t_grad, s, t, n, 2.0 / n) / n;
  T* const none = nullptr;
  const double norm = __builtin_sqrt(difference(none, none, s, t, n, 0));
  if (s_grad || t_grad) difference(s_grad, t_grad, s, t, n, norm <= 1e-30 ? 0 : 1 / norm);
  return norm;
}

static void feature_distance(const FeatureDistance& a, int threads) noexcept {
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(a.batch, threads, [&](int64_t i) {
      const auto at = [&](auto* base) { return base ? base + i * a.size : nullptr; };
      a.loss[i] = static_cast<float>(
          sample(at(static_cast<T*>(a.student_grad)), at(static_cast<T*>(a.teacher_grad)),
                 at(static_cast<const T*>(a.student)), at(static_cast<const T*>(a.teacher)), a.size,
                 a.distance));
    });
  });
}
