// The bookkeeping and the step of APGD after each gradient, for every sample:
//   g = grad, 0 where it is not finite; bad_gradients += 1 where there is such an element
//   better_found: x_found = x_adv;  better_best: x_best, grad_best = x_adv, g
//   restart: x_adv, g = x_best, grad_best
//   z = P(x_adv + step_size d), d = sign(g) or g / ||g|| (0 where g is 0)
//   x_adv, x_old = P(x_adv + weight (z - x_adv) + (1 - weight) (x_adv - x_old)), x_adv
// P projects into the eps-ball around x and the box; arguments: ApgdStep.

struct Ascent {  // one sample
  float *x_adv, *x_old, *x_best, *grad_best, *x_found;
  const float *grad, *x;
  const float *from, *grad_from;  // where the step starts, once `keep` has been there
  bool better_best, better_found;
  F step, eps, weight, rest, lo, hi;  // rest: 1 - weight
};

static inline F finite(F v) { return v - v == F{} ? v : F{}; }

// Keeps n lanes as the best and found; marks in `bad` the lanes whose gradient is not finite.
static inline void keep(const Ascent& a, int64_t i, int64_t n, I* bad) {
  const F x_adv = load_head(a.x_adv + i, n), raw = load_head(a.grad + i, n), g = finite(raw);
  *bad |= g != raw;
  if (a.better_found) store_head(a.x_found + i, x_adv, n);
  if (a.better_best) {
    store_head(a.x_best + i, x_adv, n);
    store_head(a.grad_best + i, g, n);
  }
}

static inline F gradient(const Ascent& a, int64_t i, int64_t n) {
  return finite(load_head(a.grad_from + i, n));
}

// Moves from `from` by `weight` towards z and on along the last move.
static inline F with_momentum(const Ascent& a, F from, F z, F x_old) {
  return from + a.weight * (z - from) + a.rest * (from - x_old);
}

static I linf_ascent(const Ascent& a, int64_t size) {
  I bad = {};
  for (int64_t i = 0; i < size; i += W) {
    const int64_t n = size - i;
    keep(a, i, n, &bad);
    const F from = load_head(a.from + i, n), x = load_head(a.x + i, n);
    const F z = linf_point(from, gradient(a, i, n), x, a.eps, a.step, a.lo, a.hi);
    const F moved = with_momentum(a, from, z, load_head(a.x_old + i, n));
    store_head(a.x_old + i, from, n);
    store_head(a.x_adv + i, linf_project(moved, x, a.eps, a.lo, a.hi), n);
  }
  return bad;
}

static I l2_ascent(const Ascent& a, int64_t size) {
  I bad = {};
  const double norm = l2_norm(size, [&](int64_t i, int64_t n) {
    keep(a, i, n, &bad);
    return gradient(a, i, n);
  });
  const double scale = l2_scale(a.step[0], norm);
  const auto stepped = [&](int64_t i, int64_t n) {
    return l2_moved(load_head(a.from + i, n), gradient(a, i, n), load_head(a.x + i, n), scale);
  };
  const F shrink_z = l2_shrink(l2_norm(size, stepped), a.eps[0]);
  // The unprojected point waits in x_old for its distance to be known.
  const double length = l2_norm(size, [&](int64_t i, int64_t n) {
    const F from = load_head(a.from + i, n), x = load_head(a.x + i, n);
    const F z = clip(x + stepped(i, n) * shrink_z, a.lo, a.hi);
    const F moved = with_momentum(a, from, z, load_head(a.x_old + i, n));
    store_head(a.x_old + i, moved, n);
    return load_head(a.x_old + i, n) - x;  // `moved` is not 0 past the end where lo > 0
  });
  const F shrink = l2_shrink(length, a.eps[0]);
  for (int64_t i = 0; i < size; i += W) {
    const int64_t n = size - i;
    const F from = load_head(a.from + i, n), x = load_head(a.x + i, n);
    const F moved = load_head(a.x_old + i, n);
    store_head(a.x_old + i, from, n);
    store_head(a.x_adv + i, clip(x + (moved - x) * shrink, a.lo, a.hi), n);
  }
  return bad;
}

static void apgd_step(const ApgdStep& args, int threads) noexcept {
  parallel_for(args.batch, threads, [&](int64_t b) {
    const int64_t at = b * args.size;
    const Ascent a = {args.x_adv + at,
                      args.x_old + at,
                      args.x_best + at,
                      args.grad_best + at,
                      args.x_found + at,
                      args.grad + at,
                      args.x + at,
                      (args.restart[b] ? args.x_best : args.x_adv) + at,
                      (args.restart[b] ? args.grad_best : args.grad) + at,
                      args.better_best[b],
                      args.better_found[b],
                      splat(args.step_size[b]),
                      splat(args.eps_per_sample ? args.eps_per_sample[b] : args.eps),
                      splat(static_cast<float>(args.weight)),
                      splat(static_cast<float>(1 - args.weight)),
                      splat(args.lo),
                      splat(args.hi)};
    const I bad = (args.norm == Norm::l2 ? l2_ascent : linf_ascent)(a, args.size);
    bool any = false;
    for (int lane = 0; lane < W; ++lane) any |= bad[lane] != 0;
    if (any) __atomic_fetch_add(args.bad_gradients, 1, __ATOMIC_RELAXED);
  });
}
