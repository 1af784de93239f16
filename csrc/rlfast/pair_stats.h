// The divergence of two rows of logits: per leaf of the vocabulary, then merged in ascending order.
//
//   KL(p‖q) = E_p[gap] − log Σe_p + log Σe_q,  gap = (z_p − peak_p) − (z_q − peak_q)
//   JSD_β   = β·KL(T‖M) + (1 − β)·KL(S‖M),     M = (1 − β)·S + β·T
//
// A gap is a difference of two distances from a peak: p = q gives 0 in every column, and a divergence of exactly 0. A JSD takes
// a second sweep, when both log Σe are known.
#pragma once
#include "divergence.h"
#include "formula_vec.h"
#include "row_outputs.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// Both sides of a leaf, and Σ e_p·gap relative to the leaf's own peaks; infinite where q excludes what p does not.
struct PairLeaf {
  LeafStats own, other;
  double gap;
};

// Two columns vectors of p and q: e_p·gap, nothing where p = 0. e is at least 2^-126: that an outcome of p is all but impossible
// does not make it impossible, if q excludes it.
inline F gap_term(F e, F yp, F yq, F peak_p, F peak_q, F cp, F cq, F sum) {
  const F gap = sub(mul(cp, sub(yp, peak_p)), mul(cq, sub(yq, peak_q)));
  return fma(max(set1(0x1p-126f), e), select(greater(yp, set1(-kInf)), gap, set1(0.0f)), sum);
}

// `next_own` and `next_other`, if kBytes is not 0, are fetched ahead: kBytes a column.
template <unsigned kSums, bool kOwn, int kBytes>
inline PairLeaf pair_sums(const float* own, const float* other, int n, float own_peak, float other_peak,
                          const RowScale& s, const RowScale& t, const char* next_own, const char* next_other) {
  const F ps = set1(own_peak == -kInf ? 0.0f : own_peak), pt = set1(other_peak == -kInf ? 0.0f : other_peak);
  const F cs = set1(static_cast<float>(s.c)), ct = set1(static_cast<float>(t.c));
  Accumulators<kSums> a;
  Accumulators<0> b;
  F gap[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  const auto take = [&](int u, F x, F y) {
    const F es = a.take(u, x, ps, s.log2), et = b.take(u, y, pt, t.log2);
    gap[u] = kOwn ? gap_term(es, x, y, ps, pt, cs, ct, gap[u]) : gap_term(et, y, x, pt, ps, ct, cs, gap[u]);
  };
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    if constexpr (kBytes > 0) {
#pragma GCC unroll 4
      for (int line = 0; line < 4 * kLanes * kBytes; line += 64) {
        prefetch(next_own + static_cast<int64_t>(i) * kBytes + line);
        prefetch(next_other + static_cast<int64_t>(i) * kBytes + line);
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) take(u, load(own + i + u * kLanes), load(other + i + u * kLanes));
  }
  for (; i < n; i += kLanes) {
    const int left = n - i;
    if (left >= kLanes) {
      take(0, load(own + i), load(other + i));
    } else {
      take(0, load_part(own + i, left, -kInf), load_part(other + i, left, -kInf));
    }
  }
  PairLeaf out{{own_peak, a.reduced(a.sum), 0.0, 0.0, 0.0}, {other_peak, b.reduced(b.sum), 0.0, 0.0, 0.0}, 0.0};
  if constexpr (kSums & kEntropySum) out.own.weighted = a.reduced(a.weighted);
  out.gap = a.reduced(gap);
  return out;
}

template <int kBytes = 0>
inline PairLeaf pair_leaf(const float* own, const float* other, int n, float own_peak, float other_peak,
                          const RowScale& s, const RowScale& t, unsigned sums, Kind kind,
                          const char* next_own = nullptr, const char* next_other = nullptr) {
  if (kind == Kind::jsd) {
    return {leaf_stats<kBytes>(own, n, own_peak, s.log2, sums, next_own),
            leaf_stats<kBytes>(other, n, other_peak, t.log2, 0, next_other), 0.0};
  }
  const auto with = [&](auto f) { return f(own, other, n, own_peak, other_peak, s, t, next_own, next_other); };
  if (kind == Kind::forward) {
    return sums ? with(pair_sums<kEntropySum, false, kBytes>) : with(pair_sums<0, false, kBytes>);
  }
  return sums ? with(pair_sums<kEntropySum, true, kBytes>) : with(pair_sums<0, true, kBytes>);
}

// What a JSD needs of a row to compare a column of the two sides.
struct Mixture {
  F peak_s, peak_t, cs, ct, inverse_s, inverse_t, apart, beta, rest;

  // Both log Σe as they are saved, rounded: an error of `apart` moves every column by the same, and is gone from a gradient if the
  // centre was made with it too.
  Mixture(float own_peak, float own_log_sum, const RowScale& s, float other_peak, float other_log_sum,
          const RowScale& t, double b)
      : peak_s(set1(own_peak)),
        peak_t(set1(other_peak)),
        cs(set1(static_cast<float>(s.c))),
        ct(set1(static_cast<float>(t.c))),
        inverse_s(set1(static_cast<float>(std::exp(-static_cast<double>(own_log_sum))))),
        inverse_t(set1(static_cast<float>(std::exp(-static_cast<double>(other_log_sum))))),
        apart(set1(other_log_sum - own_log_sum)),
        beta(set1(static_cast<float>(b))),
        rest(set1(static_cast<float>(1.0 - b))) {}
};

struct Mixed {
  F s, t, m_over_s, m_over_t;  // S, T, log M/S, log M/T
};

// From u = log T − log S and w = e^−|u|, the smaller of the two over the larger: log M/S = log(1 + β·(w − 1)) for u ≤ 0,
// log M/T = log(1 + (1 − β)·(w − 1)) for u > 0, and the other is u away. Beyond 110 nats w is 0.
inline Mixed mixed(F x, F y, const Mixture& m) {
  const F zs = mul(m.cs, sub(x, m.peak_s)), zt = mul(m.ct, sub(y, m.peak_t));
  const F u = min(max(sub(sub(zt, zs), m.apart), set1(-110.0f)), set1(110.0f));  // NaN, neither is possible: −110
  const M up = greater(u, set1(0.0f));
  const F larger = mul(exp(select(up, zt, zs)), select(up, m.inverse_t, m.inverse_s));
  const F w = exp(negative(abs(u))), smaller = mul(larger, w);
  const F log = log_of(fma(select(up, m.rest, m.beta), sub(w, set1(1.0f)), set1(1.0f)));
  return {select(up, smaller, larger), select(up, larger, smaller), add(log, select(up, u, set1(0.0f))),
          sub(log, select(up, set1(0.0f), u))};
}

// KL(S‖M) and KL(T‖M) of one leaf.
struct Halves {
  double s, t;
};

inline Halves mixed_sums(const float* own, const float* other, int n, const Mixture& m) {
  F s[2] = {set1(0.0f), set1(0.0f)}, t[2] = {set1(0.0f), set1(0.0f)};
  int u = 0;
  for (int i = 0; i < n; i += kLanes, u ^= 1) {
    const int left = n - i;
    const F x = left < kLanes ? load_part(own + i, left, -kInf) : load(own + i);
    const F y = left < kLanes ? load_part(other + i, left, -kInf) : load(other + i);
    const Mixed v = mixed(x, y, m);
    s[u] = fma(v.s, v.m_over_s, s[u]);
    t[u] = fma(v.t, v.m_over_t, t[u]);
  }
  return {-reduce_add(add(s[0], s[1])), -reduce_add(add(t[0], t[1]))};
}

// A row when the leaves of both sides are merged.
struct PairTotals {
  RowTotals own, other;
  double gap;     // E_p[gap]
  bool possible;  // neither side is NaN or empty
};

inline Mixture mixture_of(const PairTotals& r, const RowScale& s, const RowScale& t, double beta) {
  return Mixture(r.own.peak, static_cast<float>(r.own.log_sum), s, r.other.peak, static_cast<float>(r.other.log_sum), t,
                 beta);
}

// own, other and gap [leaves]; scale [2, leaves] is scratch.
inline PairTotals merge_pair(const LeafStats* own, const LeafStats* other, const double* gap, int64_t leaves,
                             const RowScale& s, const RowScale& t, Kind kind, double* scale) {
  PairTotals r{merge_leaves(own, leaves, s, 0, scale), merge_leaves(other, leaves, t, 0, scale + leaves), 0.0, false};
  r.possible = r.own.sum > 0.0 && r.other.sum > 0.0;
  if (kind == Kind::jsd) return r;
  const bool from_own = kind == Kind::reverse;
  const auto shift = [](float leaf_peak, const RowTotals& row, double c) {
    return leaf_peak == -kInf ? 0.0 : c * (static_cast<double>(leaf_peak) - row.peak);
  };
  for (int64_t l = 0; l < leaves; ++l) {
    const double apart = shift(own[l].peak, r.own, s.c) - shift(other[l].peak, r.other, t.c);
    const double sum = from_own ? own[l].sum : other[l].sum, weight = from_own ? scale[l] : scale[leaves + l];
    // an infinite gap counts, whatever its weight underflows to
    r.gap += gap[l] == kInf ? gap[l] : weight * (gap[l] + sum * (from_own ? apart : -apart));
  }
  r.gap /= from_own ? r.own.sum : r.other.sum;
  return r;
}

inline void write_parts(double x, float* to, int64_t row, int64_t rows) {
  to[row] = static_cast<float>(x);
  to[rows + row] = static_cast<float>(x - to[row]);
}

// What is the pair's own of a row's outputs; `halves` of a JSD.
inline void write_pair(const PairTotals& r, const Halves& halves, const RowScale& t, const Measure& measure,
                       const PairOut& out, int64_t row, int64_t rows) {
  double value = 0.0, own = 0.0, other = 0.0;
  switch (measure.kind) {
    case Kind::forward:
      value = r.gap - r.other.log_sum + r.own.log_sum, other = r.gap;
      break;
    case Kind::reverse:
      value = r.gap - r.own.log_sum + r.other.log_sum, own = r.gap;
      break;
    case Kind::jsd:
      value = measure.beta * halves.t + (1.0 - measure.beta) * halves.s, own = halves.s, other = halves.t;
  }
  if (value < 0.0) value = 0.0;
  if (!r.possible) value = own = other = kNaN;
  out.value[row] = static_cast<float>(value);
  out.ref_peak[row] = r.other.peak;
  out.ref_log_sum[row] = static_cast<float>(r.other.log_sum);
  if (out.ref_lse) out.ref_lse[row] = static_cast<float>(t.c * r.other.peak + r.other.log_sum);
  write_parts(own, out.centre, row, rows);
  write_parts(other, out.ref_centre, row, rows);
}

inline void write_skipped_pair(int64_t candidates, const PairOut& out, int64_t row, int64_t rows) {
  write_skipped_row(candidates, out.student, row, rows);
  out.value[row] = out.ref_peak[row] = out.ref_log_sum[row] = 0.0f;
  if (out.ref_lse) out.ref_lse[row] = 0.0f;
  write_parts(0.0, out.centre, row, rows);
  write_parts(0.0, out.ref_centre, row, rows);
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
