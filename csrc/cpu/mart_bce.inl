// MART's boosted cross-entropy and its gradient, q = softmax(z), y' the likeliest class but y:
//   loss = -log q_y - log u, u = 1.0001 - q_y' + 1e-12
//   grad_c = q_c (1 - k) - [c = y] + k [c = y'], k = q_y' / u
// Arguments: Labelled, with classes >= 2. A label outside [0, classes): loss NaN, gradient 0.
// Exponentials are fp32; the terms that cancel, 1 - q_y' and the gradient at y and y', are fp64. y'
// comes from margin.inl.

template <typename T>
static void mart_bce_grad(T* grad, const Row<T>& z, const Exp& e, double sum, int64_t y,
                          int64_t other, double q, double rest, double u, int64_t n) {
  const double k = q / u, own = z.at(e, y);
  const F scale = splat(static_cast<float>((1 - k) / sum));
  columns(
      n, [&](int64_t c, int64_t left) { store_head(grad + c, z.again(e, c, left) * scale, left); });
  store(grad + y, splat(static_cast<float>((own - sum - k * own) / sum)), 1);
  if (other >= 0) store(grad + other, splat(static_cast<float>(q + k * rest)), 1);
}

template <typename T>
static void mart_bce_rows(float* loss, T* grad, const T* logits, const int64_t* y, int64_t n,
                          int count) {
  const Exp e = exp_over(1);
  Rows<T> rows(logits, n, n, count);
  alignas(64) double sum[W], log_sum[W], q[W], rest[W], u[W] = {}, log_u[W];  // rest = 1 - q_y'
  int64_t other[W];  // y', or -1 where no other logit is above -inf
  rows.exponentiate(e, sum);
  for (int r = 0; r < count; ++r) {
    const bool valid = y[r] >= 0 && y[r] < n;
    float top;
    other[r] = valid ? runner_up(logits + r * n, y[r], n, &top) : -1;
    const double likeliest = other[r] < 0 ? 0 : rows.row(r).at(e, other[r]);
    q[r] = likeliest / sum[r], rest[r] = (sum[r] - likeliest) / sum[r];
    u[r] = rest[r] + (0.0001 + 1e-12);
  }
  log_all(sum, log_sum), log_all(u, log_u);
  for (int r = 0; r < count; ++r) {
    const Row<T> z = rows.row(r);
    if (y[r] < 0 || y[r] >= n) {
      loss[r] = __builtin_nanf("");
      if (grad) __builtin_memset(grad + r * n, 0, n * sizeof(T));
      continue;
    }
    const double own = load(z.logits + y[r], 1, 0)[0];
    loss[r] = static_cast<float>(z.maximum() - own + log_sum[r] - log_u[r]);
    if (grad) {
      mart_bce_grad(grad + r * n, z, e, sum[r], y[r], other[r], q[r], rest[r], u[r], n);
    }
  }
}

static int64_t mart_bce(const Labelled& a, int threads) noexcept {
  const int64_t n = a.classes;
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(a.batch, n, threads, [&](int64_t, int64_t first, int count) {
      mart_bce_rows(a.loss + first, a.grad ? static_cast<T*>(a.grad) + first * n : nullptr,
                    static_cast<const T*>(a.logits) + first * n, a.y + first, n, count);
    });
  });
  return wrong_labels(a.y, a.batch, n);
}
