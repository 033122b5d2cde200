// Shared by the ops over rows of logits. `for_rows` divides the rows among the threads. `Rows`
// makes the passes of a softmax over up to W rows together: one tree of additions then reduces the
// sums of all of them, and the exponentials of one pass are kept for the next.
#pragma once
#include "vec_math.h"

namespace fastadv::FASTADV_ISA {
namespace {

// How many exponentials are kept from one pass for the next; the rows of a larger group compute
// them again.
constexpr int64_t stash = 4096;

// Calls body(c, lanes left) for each vector of a row.
template <typename Body>
static inline void columns(int64_t n, const Body& body) {
  for (int64_t c = 0; c < n; c += W) body(c, n - c);
}

// -inf past the end, whose exponential is 0.
template <typename T>
static inline F load_logits(const T* p, int64_t n) {
  return load_head(p, n, -__builtin_inff());
}

// q g, but 0 where q is 0, even if g is infinite or NaN.
static inline E product(E q, E g) { return q == 0 ? E{} : q * g; }

// One row: its logits z, the memory that keeps its exponentials e^((z - max) / T), null where they
// do not fit, and its maximum, prepared for `exp`.
template <typename T>
struct Row {
  const T* logits;
  float* kept;
  Top from;

  // The exponentials of the classes from c on. The first pass over the row calls `first`, which
  // keeps them; later passes call `again`.
  F first(const Exp& e, int64_t c, int64_t left) const {
    const F v = exp(load_logits(logits + c, left), e, from);
    if (kept) store(kept + c, v);
    return v;
  }
  F again(const Exp& e, int64_t c, int64_t left) const {
    return kept ? load(kept + c) : exp(load_logits(logits + c, left), e, from);
  }
  double at(const Exp& e, int64_t c) const { return kept ? kept[c] : again(e, c, 1)[0]; }

  double maximum() const { return from.base[0] + from.top[0]; }
};

// Up to W rows of logits.
template <typename T>
struct Rows {
  const T* logits;
  int64_t stride, classes, padded;
  int count;
  bool keep;
  alignas(64) float base[W], top[W], shift[W], rest[W];
  alignas(64) float kept[stash];

  Rows(const T* logits, int64_t stride, int64_t classes, int count)
      : logits(logits),
        stride(stride),
        classes(classes),
        padded((classes + W - 1) / W * W),
        count(count),
        keep(count * padded <= stash) {}

  // The first pass. Returns the maxima, a row per lane.
  F start(const Exp& e) {
    F tops[W];
    for (int r = 0; r < W; ++r) {
      F most = splat(-__builtin_inff());
      const T* z = logits + r * stride;
      columns(r < count ? classes : 0,
              [&](int64_t c, int64_t left) { most = max(most, load_logits(z + c, left)); });
      tops[r] = most;
    }
    const F maximum = max_across(tops);
    const Top from = top_of(maximum, e);
    store(base, from.base), store(top, from.top);
    store(shift, from.shift), store(rest, from.rest);
    return maximum;
  }

  Row<T> row(int r) {
    return {logits + r * stride,
            keep ? kept + r * padded : nullptr,
            {splat(base[r]), splat(top[r]), splat(shift[r]), splat(rest[r])}};
  }

  // make(r) returns a function of (c, lanes left); out[r] is its sum over the vectors of row r.
  template <typename Make>
  void sum(double* out, const Make& make) {
    E sums[W] = {};
    for (int r = 0; r < count; ++r) {
      const auto term = make(r);
      E total = {};
      columns(classes, [&](int64_t c, int64_t left) { total += term(c, left); });
      sums[r] = total;
    }
    store(out, sum_across(sums)), store(out + W / 2, sum_across(sums + W / 2));
  }

  // The first two passes: out[r] = sum_c e^((z_c - max) / T).
  void exponentiate(const Exp& e, double* out) {
    start(e);
    sum(out, [&](int r) {
      return [&e, z = row(r)](int64_t c, int64_t left) {
        const F v = z.first(e, c, left);
        return widen_low(v) + widen_high(v);
      };
    });
  }
};

// out[r] = log(in[r]) for W numbers, positive and normal.
static inline void log_all(const double* in, double* out) {
  for (int h = 0; h < W; h += W / 2) store(out + h, log(load(in + h)));
}

// Calls body(chunk, first row, rows) for groups of up to W rows, as many as the stash holds, in at
// most 64 chunks: of 16 Ki elements and a 64th of the batch at least, whatever the threads.
template <typename Body>
static void for_rows(int64_t batch, int64_t classes, int threads, const Body& body) {
  const int64_t least = 16384 / classes + 1, part = (batch + 63) / 64;
  const int64_t chunk = least > part ? least : part;
  const int64_t fit = stash / ((classes + W - 1) / W * W);
  const int64_t group = fit < 1 ? 1 : fit < W ? fit : W;
  parallel_for((batch + chunk - 1) / chunk, threads, [&](int64_t i) {
    const int64_t end = (i + 1) * chunk < batch ? (i + 1) * chunk : batch;
    for (int64_t first = i * chunk; first < end; first += group) {
      body(i, first, static_cast<int>(end - first < group ? end - first : group));
    }
  });
}

// Adds up one number per chunk of `for_rows`, in the order of the chunks whatever the threads.
struct Partial {
  double chunk[64] = {};

  double total() const {
    double sum = 0;
    for (const double part : chunk) sum += part;
    return sum;
  }
  float sum() const { return static_cast<float>(total()); }
};

// How many of the labels are neither `ignored` nor in [0, classes).
static inline int64_t wrong_labels(const int64_t* y, int64_t batch, int64_t classes,
                                   int64_t ignored = 0) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < batch; ++i) {
    wrong += y[i] != ignored && static_cast<uint64_t>(y[i]) >= static_cast<uint64_t>(classes);
  }
  return wrong;
}

// Calls row(loss, grad or null, logits, label, classes) for every row, with its pointers and type.
// Returns `wrong_labels`.
template <typename Body>
static int64_t labelled_rows(const Labelled& a, int threads, const Body& row) {
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows(a.batch, a.classes, threads, [&](int64_t, int64_t first, int count) {
      for (int64_t i = first; i < first + count; ++i) {
        row(a.loss + i, a.grad ? static_cast<T*>(a.grad) + i * a.classes : nullptr,
            static_cast<const T*>(a.logits) + i * a.classes, a.y[i], a.classes);
      }
    });
  });
  return wrong_labels(a.y, a.batch, a.classes);
}

}  // namespace
}  // namespace fastadv::FASTADV_ISA
