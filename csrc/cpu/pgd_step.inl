// One projected gradient step on a batch of `batch` samples of `size` elements each:
//   linf: x_adv' = clip(clamp(x_adv + step_size * sign(grad), x - eps, x + eps), lo, hi)
//   l2:   d = x_adv + step_size * grad / ||grad|| - x;  x_adv' = clip(x + d * min(1, eps / ||d||))
// out, x_adv, grad, x: fp32 [batch, size], dense, in the same element order; out may be x_adv.
// eps_per_sample: fp32 [batch] or null, then eps holds for all. sign(0) = sign(NaN) = 0; a sample
// whose gradient is zero or has a NaN takes no l2 step.

static inline F linf_point(F x_adv, F grad, F x, F eps, F step, F lo, F hi) {
  const F zero = {};
  const F moved = x_adv + (grad > zero ? step : (grad < zero ? -step : zero));
  return min(hi, max(lo, min(x + eps, max(x - eps, moved))));
}

static void linf_span(float* out, const float* x_adv, const float* grad, const float* x, int64_t n,
                      float eps, float step_size, float lo, float hi) {
  const F e = splat(eps), s = splat(step_size), l = splat(lo), h = splat(hi);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    store(out + i, linf_point(load(x_adv + i), load(grad + i), load(x + i), e, s, l, h));
  }
  if (i < n) {
    const int64_t r = n - i;
    const F moved =
        linf_point(load(x_adv + i, r, 0), load(grad + i, r, 0), load(x + i, r, 0), e, s, l, h);
    store(out + i, moved, r);
  }
}

// sqrt(sum of squares) of f(i, lanes) over a sample, in fp64: a vanishing gradient's squares
// underflow in fp32. Lane sums are added in lane order, so the result is the same on every machine
// with the same W.
template <typename Load>
static double l2_norm(int64_t n, const Load& at) {
  D sum = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const D v = widen(at(i, W));
    sum += v * v;
  }
  if (i < n) {
    const D v = widen(at(i, n - i));
    sum += v * v;
  }
  double total = 0;
  for (int lane = 0; lane < W; ++lane) total += sum[lane];
  return __builtin_sqrt(total);
}

static inline F load_upto(const float* p, int64_t n) { return n == W ? load(p) : load(p, n, 0); }

static void l2_sample(float* out, const float* x_adv, const float* grad, const float* x, int64_t n,
                      float eps, float step_size, float lo, float hi) {
  const double grad_norm = l2_norm(n, [&](int64_t i, int64_t r) { return load_upto(grad + i, r); });
  const double scale = grad_norm > 0 ? step_size / grad_norm : 0.0;
  const D s = D{} + scale;
  // In fp64 until the last rounding: step / ||grad|| may overflow fp32 while step * grad / ||grad||
  // does not.
  const auto moved = [&](int64_t i, int64_t r) {
    const F step = scale > 0 ? __builtin_convertvector(widen(load_upto(grad + i, r)) * s, F) : F{};
    return load_upto(x_adv + i, r) + step - load_upto(x + i, r);
  };
  const double norm = l2_norm(n, moved);
  const F shrink = splat(norm > eps ? static_cast<float>(eps / norm) : 1.0f);
  const F l = splat(lo), h = splat(hi);
  for (int64_t i = 0; i < n; i += W) {
    const int64_t r = n - i < W ? n - i : W;
    const F v = min(h, max(l, load_upto(x + i, r) + moved(i, r) * shrink));
    r == W ? store(out + i, v) : store(out + i, v, r);
  }
}

static void pgd_step(float* out, const float* x_adv, const float* grad, const float* x,
                     const float* eps_per_sample, int64_t batch, int64_t size, float eps,
                     float step_size, Norm norm, float lo, float hi, int threads) noexcept {
  // A block is one sample where a sample has its own work, else 16 Ki elements of the whole batch.
  const bool per_sample = norm == Norm::l2 || eps_per_sample != nullptr;
  const int64_t block = per_sample ? size : 16384;
  const int64_t total = batch * size;
  parallel_for((total + block - 1) / (block > 0 ? block : 1), threads, [&](int64_t b) {
    const int64_t at = b * block, n = total - at < block ? total - at : block;
    const auto span = norm == Norm::l2 ? l2_sample : linf_span;
    span(out + at, x_adv + at, grad + at, x + at, n, eps_per_sample ? eps_per_sample[b] : eps,
         step_size, lo, hi);
  });
}
