// One projected gradient step on a batch of `batch` samples of `size` elements each:
//   linf: x_adv' = clip(clamp(x_adv + step_size * sign(grad), x - eps, x + eps), lo, hi)
//   l2:   d = x_adv + step_size * grad / ||grad|| - x;  x_adv' = clip(x + d * min(1, eps / ||d||))
// Arguments: PgdStep. sign(0) = sign(NaN) = 0; a sample whose gradient is zero or has a NaN takes
// no l2 step.

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

static void l2_sample(float* out, const float* x_adv, const float* grad, const float* x, int64_t n,
                      float eps, float step_size, float lo, float hi) {
  const auto gradient = [&](int64_t i, int64_t r) { return load_head(grad + i, r); };
  const double scale = l2_scale(step_size, l2_norm(n, gradient));
  const auto moved = [&](int64_t i, int64_t r) {
    return l2_moved(load_head(x_adv + i, r), gradient(i, r), load_head(x + i, r), scale);
  };
  const F shrink = l2_shrink(l2_norm(n, moved), eps), l = splat(lo), h = splat(hi);
  for (int64_t i = 0; i < n; i += W) {
    const int64_t r = n - i;
    store_head(out + i, clip(load_head(x + i, r) + moved(i, r) * shrink, l, h), r);
  }
}

static void pgd_step(const PgdStep& a, int threads) noexcept {
  // A block is one sample where a sample has its own work, else 16 Ki elements of the whole batch.
  const bool per_sample = a.norm == Norm::l2 || a.eps_per_sample != nullptr;
  const int64_t block = per_sample ? a.size : 16384;
  const int64_t total = a.batch * a.size;
  parallel_for((total + block - 1) / (block > 0 ? block : 1), threads, [&](int64_t b) {
    const int64_t at = b * block, n = total - at < block ? total - at : block;
    const auto span = a.norm == Norm::l2 ? l2_sample : linf_span;
    span(a.out + at, a.x_adv + at, a.grad + at, a.x + at, n,
         a.eps_per_sample ? a.eps_per_sample[b] : a.eps, a.step_size, a.lo, a.hi);
  });
}
