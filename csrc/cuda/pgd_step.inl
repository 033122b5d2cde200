// x_adv' = clip(clamp(x_adv + step_size * sign(grad), x - eps, x + eps), lo, hi), as in
// csrc/cpu/pgd_step.inl; N elements to an access, 6 loads in flight; the rest of
// the batch by single elements.

template <int N>
struct PgdStepBody {
  static constexpr int block = 256, unroll = 2;
  PgdStep a;

  FASTADV_BODY float point(float x_adv, float grad, float x, float eps) const {
    const float up = grad > 0 ? a.step_size : 0.0f, step = grad < 0 ? -a.step_size : up;
    return clip(clip(x_adv + step, x - eps, x + eps), a.lo, a.hi);
  }

  FASTADV_BODY void operator()(int64_t thread, int64_t threads) const {
    const int64_t count = a.batch * a.size / N;
    for (int64_t i = thread; i < count; i += unroll * threads) {
      Floats<N> x_adv[unroll], grad[unroll], x[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const int64_t at = (i + u * threads) * N;
        if (i + u * threads >= count) break;
        x_adv[u] = load<N>(a.x_adv + at);
        grad[u] = load<N>(a.grad + at);
        x[u] = load<N>(a.x + at);
      }
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const int64_t at = (i + u * threads) * N;
        if (i + u * threads >= count) break;
        const float eps = a.eps_per_sample ? a.eps_per_sample[at / a.size] : a.eps;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          x_adv[u].at[n] = point(x_adv[u].at[n], grad[u].at[n], x[u].at[n], eps);
        }
        store(a.out + at, x_adv[u]);
      }
    }
    for (int64_t at = count * N + thread; at < a.batch * a.size; at += threads) {
      const float eps = a.eps_per_sample ? a.eps_per_sample[at / a.size] : a.eps;
      a.out[at] = point(a.x_adv[at], a.grad[at], a.x[at], eps);
    }
  }
};

inline bool pgd_step_takes(const PgdStep& a) { return a.norm == Norm::linf; }

template <typename Launch>
void pgd_step_with(const PgdStep& a, const Launch& launch) {
  // Four elements are of one sample where each sample has its own eps.
  const bool fours = a.size % 4 == 0 || !a.eps_per_sample;
  const int64_t total = a.batch * a.size;
  if (fours && aligned(a.out, a.x_adv, a.grad, a.x)) {
    launch(PgdStepBody<4>{a}, (total + 3) / 4);
  } else {
    launch(PgdStepBody<1>{a}, total);
  }
}
