// The row statistics that every log-prob kernel shares: per leaf of the vocabulary, then merged in ascending order.
//
//   y = x, −x or tanh(k·x)        what a leaf is loaded as, in float32
//   z = c·y                       c > 0 takes in the logit scale, the temperature and the soft-cap
//   e = exp(c·(y − peak))         peak: the leaf's maximum of y
//
// The difference y − peak is taken before the scale, so that neither a common offset nor the temperature costs digits, and
// a temperature costs no instruction: exp_scaled takes c·log2(e) as its factor.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "token_logps.h"
#include "vec.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Which sums a leaf takes beside Σe.
enum Sums : unsigned { kEntropySum = 1, kSquareSum = 2, kTotalSum = 4 };

// How the logits of a row become y, and y becomes z. softcap: y = tanh(k·x), else y = sign·x.
struct RowScale {
  bool plain;  // y = x
  bool softcap;
  float sign;  // 1, −1, or 0 for a logit scale of 0
  TanhScale tanh;
  double c;
  Log2Scale log2;  // of c
  double chain;    // dz/dx is chain·(1 − y²), without the last factor where there is no soft-cap
};

inline RowScale row_scale(const Transform& t, int64_t row) {
  const double temperature = t.temperatures ? t.temperatures[row] : t.temperature;
  const double scale = t.logit_scale, cap = t.softcap;
  RowScale s{};
  s.softcap = cap != 0.0;
  s.sign = scale > 0 ? 1.0f : scale < 0 ? -1.0f : 0.0f;
  s.plain = !s.softcap && scale > 0;
  if (s.softcap) s.tanh = tanh_scale(scale / cap);
  s.c = (s.softcap ? cap : scale == 0 ? 1.0 : std::fabs(scale)) / temperature;
  s.log2 = log2_scale(s.c);
  s.chain = scale / temperature;
  return s;
}

// Leaf statistics, of e = exp(c·(y − peak)): Σe, Σe·(y − peak), Σe², and Σy.
struct LeafStats {
  float peak;  // −inf for a leaf of −inf and of NaN
  double sum, weighted, squares, total;
};

// The lanes of y from n on replaced by `fill`.
inline F padded(F y, int n, float fill) {
  alignas(64) float lanes[kLanes];
  store(lanes, y);
  return load_part(lanes, n, fill);
}

inline F transformed(F x, const RowScale& s) {
  return s.softcap ? tanh(x, s.tanh) : s.plain ? x : mul(x, set1(s.sign));
}

// y of a leaf of n ≤ kLeaf columns: x itself where that is float32 and needs no change, else written to `buffer` [kLeaf].
// The maximum ignores NaN, which the sums then carry.
template <class T>
inline const float* load_leaf(const T* x, int n, const RowScale& s, float* buffer, float* peak) {
  constexpr bool kWiden = sizeof(T) != sizeof(float);
  F top[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
  int i = 0;
  if (s.plain) {
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const F y = load(x + i + u * kLanes);
        if constexpr (kWiden) store(buffer + i + u * kLanes, y);
        top[u] = max(y, top[u]);
      }
    }
  }
  for (; i + kLanes <= n; i += kLanes) {
    const F y = transformed(load(x + i), s);
    if (kWiden || !s.plain) store(buffer + i, y);
    top[0] = max(y, top[0]);
  }
  if (i < n) {
    const F y = transformed(load_part(x + i, n - i, 0.0f), s);
    if (kWiden || !s.plain) store_part(buffer + i, y, n - i);
    top[1] = max(padded(y, n - i, -kInf), top[1]);
  }
  *peak = reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
  return kWiden || !s.plain ? buffer : reinterpret_cast<const float*>(x);
}

// The accumulators of one leaf: four of each sum, so that additions of one chain do not wait for each other. Σy has no
// maximum to be relative to and may cancel, so it goes to double after one addition.
template <unsigned kSums>
struct Accumulators {
  F sum[4], weighted[4], squares[4];
  D total;

  Accumulators() {
    for (int u = 0; u < 4; ++u) sum[u] = weighted[u] = squares[u] = set1(0.0f);
    total = zero_double();
  }
  // e of y, counted.
  F take(int u, F y, F peak, const Log2Scale& s) {
    F t = sub(y, peak);
    if constexpr ((kSums & kEntropySum) || !kSplitsInf) t = max(set1(s.t_min), t);
    const F e = exp_term(t, set1(s.hi));
    sum[u] = add(sum[u], e);
    if constexpr (kSums & kEntropySum) weighted[u] = fma(e, t, weighted[u]);
    if constexpr (kSums & kSquareSum) squares[u] = fma(e, e, squares[u]);
    return e;
  }
  static double reduced(const F* x) { return reduce_add(add(add(x[0], x[1]), add(x[2], x[3]))); }
};

// The sums of a leaf whose maximum is known. `next`, if kBytes is not 0, is fetched ahead: kBytes a column.
template <unsigned kSums, int kBytes = 0>
inline LeafStats leaf_sums(const float* y, int n, float leaf_peak, const Log2Scale& s, const char* next = nullptr) {
  const F peak = set1(leaf_peak == -kInf ? 0.0f : leaf_peak);
  Accumulators<kSums> a;
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    if constexpr (kBytes > 0) {
#pragma GCC unroll 4
      for (int line = 0; line < 4 * kLanes * kBytes; line += 64)
        prefetch(next + static_cast<int64_t>(i) * kBytes + line);
    }
    F x[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      x[u] = load(y + i + u * kLanes);
      a.take(u, x[u], peak, s);
    }
    if constexpr (kSums & kTotalSum) {
      a.total = accumulate(a.total, add(x[0], x[1]));
      a.total = accumulate(a.total, add(x[2], x[3]));
    }
  }
  for (; i < n; i += kLanes) {
    const int left = n - i < kLanes ? n - i : kLanes;
    a.take(0, left == kLanes ? load(y + i) : load_part(y + i, left, -kInf), peak, s);
    if constexpr (kSums & kTotalSum) {
      a.total = accumulate(a.total, left == kLanes ? load(y + i) : load_part(y + i, left, 0.0f));
    }
  }
  LeafStats out{leaf_peak, a.reduced(a.sum), 0.0, 0.0, 0.0};
  if constexpr (kSums & kEntropySum) out.weighted = a.reduced(a.weighted);
  if constexpr (kSums & kSquareSum) out.squares = a.reduced(a.squares);
  if constexpr (kSums & kTotalSum) out.total = reduce_add(a.total);
  return out;
}

template <int kBytes = 0>
inline LeafStats leaf_stats(const float* y, int n, float peak, const Log2Scale& s, unsigned sums,
                            const char* next = nullptr) {
  switch (sums) {
    case 0:
      return leaf_sums<0, kBytes>(y, n, peak, s, next);
    case 1:
      return leaf_sums<1, kBytes>(y, n, peak, s, next);
    case 2:
      return leaf_sums<2, kBytes>(y, n, peak, s, next);
    case 3:
      return leaf_sums<3, kBytes>(y, n, peak, s, next);
    case 4:
      return leaf_sums<4, kBytes>(y, n, peak, s, next);
    case 5:
      return leaf_sums<5, kBytes>(y, n, peak, s, next);
    case 6:
      return leaf_sums<6, kBytes>(y, n, peak, s, next);
    default:
      return leaf_sums<7, kBytes>(y, n, peak, s, next);
  }
}

// The maximum of a leaf; it ignores NaN.
inline float peak_of(const float* y, int n) {
  F top = set1(-kInf);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) top = max(load(y + i), top);
  if (i < n) top = max(load_part(y + i, n - i, -kInf), top);
  return reduce_max(top);
}

// What is left of a leaf without some of its columns: its own maximum, so that nothing underflows beside a large target.
struct LeafRest {
  float peak;
  double sum;
};

// `y` [n] holds −inf in the columns that are left out.
inline LeafRest leaf_rest(const float* y, int n, const Log2Scale& s) {
  const float peak = peak_of(y, n);
  return {peak, leaf_sums<0>(y, n, peak, s).sum};
}

// A target met in its leaf: its own y, and the leaf without it.
struct TargetStats {
  int64_t leaf;  // −1: not counted; −2: out of range
  bool first;    // no earlier column of the leaf is as large
  float y;
  LeafRest rest;
};

// `buffer` [kLeaf] may be y itself, which is changed back.
inline TargetStats target_stats(const float* y, int n, int64_t leaf, int at, const Log2Scale& s, float* buffer) {
  if (buffer != y) std::memcpy(buffer, y, static_cast<size_t>(n) * sizeof(float));
  TargetStats t{leaf, true, y[at], {}};
  buffer[at] = -kInf;
  t.rest = leaf_rest(buffer, n, s);
  buffer[at] = t.y;
  for (int i = 0; i < at; ++i) t.first &= y[i] < t.y;
  return t;
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
