// Whitening of what affine_scan has written: the mean and the variance over the valid tokens of all rows.
#pragma once
#include <cmath>
#include <vector>

#include "scan_tile.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// A sum in two doubles: its 106 bits do not depend on the order, so neither do the bits of the mean on padding or threads,
// and Σx² − (Σx)²/n keeps its digits whatever the offset of x.
struct Sum2 {
  double high = 0.0, low = 0.0;
  void add(double x, double tail = 0.0) {
    const double s = high + x, b = s - high;
    low += (high - (s - b)) + (x - b) + tail;
    high = s;
  }
};

struct Moments {
  Sum2 first, second;
  int64_t count = 0;
};

struct Sums {
  D high = zero_double(), low = zero_double();
  void accumulate(D x) {
    const D s = add(high, x), b = sub(s, high);
    low = add(low, add(sub(high, sub(s, b)), sub(x, b)));
    high = s;
  }
  void into(Sum2* to) const {
    alignas(64) double h[kDoubles], l[kDoubles];
    store_double(h, high), store_double(l, low);
    for (int i = 0; i < kDoubles; ++i) to->add(h[i], l[i]);
  }
};

inline Moments moments_of(const float* x, const uint8_t* mask, int64_t n) {
  Sums first, second;
  Moments m;
  int64_t t = 0;
  for (; t + kDoubles <= n; t += kDoubles) {
    D value = widen_load(x + t);
    if (mask) {
      alignas(64) double valid[kDoubles];
      for (int i = 0; i < kDoubles; ++i) valid[i] = mask[t + i], m.count += mask[t + i];
      value = select(nonzero(load_double(valid)), value, zero_double());
    }
    first.accumulate(value);
    second.accumulate(mul(value, value));  // 48 bits: exact
  }
  first.into(&m.first), second.into(&m.second);
  for (; t < n; ++t) {
    if (mask && !mask[t]) continue;
    const double value = x[t];
    m.first.add(value), m.second.add(value * value), m.count += mask != nullptr;
  }
  if (!mask) m.count = n;
  return m;
}

// n·Σx² − (Σx)² in two doubles.
inline double centred_squares(const Moments& m) {
  const double n = static_cast<double>(m.count), a = m.first.high + m.first.low, b = a - m.first.high;
  const double tail = (m.first.high - (a - b)) + (m.first.low - b);  // Σx = a + tail
  Sum2 s;
  const double p = n * m.second.high, square = a * a;
  s.add(p, std::fma(n, m.second.high, -p) + n * m.second.low);
  s.add(-square, -(std::fma(a, a, -square) + 2.0 * a * tail));
  return s.high + s.low;
}

inline void whiten_rows(const ScanIn& in, float* x, const Whiten& w, int threads) {
  std::vector<Moments> by_row(static_cast<size_t>(in.rows));
  const auto mask_of = [&](int64_t row) {
    return in.mask.data ? in.mask.data + in.begin(row, in.mask.stride) : nullptr;
  };
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < in.rows; ++row)
    by_row[row] = moments_of(x + in.begin(row, in.steps), mask_of(row), in.length(row));
  Moments all;
  for (const Moments& m : by_row) {
    all.first.add(m.first.high, m.first.low), all.second.add(m.second.high, m.second.low);
    all.count += m.count;
  }
  // alone, a token is at the mean: its variance is 0, with Bessel's correction too
  const double n = std::max(static_cast<double>(all.count), 1.0), freedom = std::max(n - (w.bessel ? 1.0 : 0.0), 1.0);
  const double mean = (all.first.high + all.first.low) / n, var = centred_squares(all) / (n * freedom);
  const double scale = 1.0 / (w.floor    ? std::sqrt(std::max(var, w.eps))
                              : w.inside ? std::sqrt(var + w.eps)
                                         : std::sqrt(var) + w.eps);
  const D m = set1_double(mean), k = set1_double(scale), shift = set1_double(w.shift ? 0.0 : mean);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < in.rows; ++row) {
    float* to = x + in.begin(row, in.steps);
    const uint8_t* mask = mask_of(row);
    const int64_t length = in.length(row);
    int64_t t = 0;
    for (; t + kDoubles <= length; t += kDoubles) narrow_store(to + t, fma(sub(widen_load(to + t), m), k, shift));
    for (; t < length; ++t) to[t] = static_cast<float>(std::fma(to[t] - mean, scale, w.shift ? 0.0 : mean));
    for (t = 0; mask && t < length; ++t) to[t] = mask[t] ? to[t] : 0.0f;
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
