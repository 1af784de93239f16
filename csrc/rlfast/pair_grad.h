// The gradient of a divergence with respect to the logits of one side: S is the own side, T the other.
//
//   KL(T‖S)   ∂/∂z_j = S_j − T_j
//   KL(S‖T)   ∂/∂z_j = S_j·(gap_j − E_S[gap])
//   JSD_β     ∂/∂z_j = −(1 − β)·S_j·(log M_j/S_j + KL(S‖M))
//
// and what the own side's logp, entropy and log-sum-exp add (row_grad.h). The centre comes in two parts: where S_j is near 1
// the bracket is a difference of numbers that are nearly equal.
#pragma once
#include "pair_stats.h"
#include "row_grad.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

struct PairGrad {
  RowGrad own;  // of logp, entropy and log-sum-exp
  bool more;    // whether own adds anything
  bool valued;  // whether the divergence does
  bool broken;  // it is undefined: NaN
  float other_peak, ks, kt, high, low, more_a, more_b;
  Mixture mixture;
};

inline PairGrad pair_grad(const RowScale& s, const RowScale& t, const Measure& measure, const PairIn& in,
                          const int64_t* ids, int64_t candidates, int64_t vocab, int64_t row, int64_t rows) {
  const double own_log_sum = in.own.log_sum[row], other_log_sum = in.other_log_sum[row];
  const double g = in.g_value ? in.g_value[row] * s.chain : 0.0;
  PairGrad p{
      row_grad(s, in.own, ids, candidates, vocab, row),
      in.own.g_logp || in.own.g_lse || in.own.g_entropy,
      in.g_value != nullptr,
      in.centre[row] != in.centre[row],
      in.other_peak[row],
      0.0f,
      0.0f,
      in.centre[row],
      in.centre[rows + row],
      0.0f,
      0.0f,
      Mixture(in.own.peak[row], in.own.log_sum[row], s, in.other_peak[row], in.other_log_sum[row], t, measure.beta)};
  if (measure.kind == Kind::jsd) {
    p.ks = static_cast<float>(-g * (1.0 - measure.beta));
    const double sum = std::exp(own_log_sum);  // the mixture has S where row_grad.h has e
    p.more_a = static_cast<float>(p.own.a * sum), p.more_b = static_cast<float>(p.own.b * sum);
  } else {
    p.ks = static_cast<float>(g * std::exp(-own_log_sum)), p.kt = static_cast<float>(g * std::exp(-other_log_sum));
    p.more_a = p.own.a, p.more_b = p.own.b;
  }
  return p;
}

// ∂L/∂x of a vector of columns, all but a target's own term. x and y: logits of the own side and of the other.
template <Kind kKind, bool kMore>
inline F pair_dlogits(F x, F y, const RowScale& s, const RowScale& t, const PairGrad& g) {
  F slope = set1(1.0f);
  if (s.softcap) {
    const F e = tanh_exponential(x, s.tanh);
    x = tanh(x, e, s.tanh);
    slope = sech2(e);
  } else if (!s.plain) {
    x = mul(x, set1(s.sign));
  }
  y = transformed(y, t);
  const F distance = sub(x, set1(g.own.peak)), near = max(set1(s.log2.t_min), distance);
  F p, d;
  if constexpr (kKind == Kind::jsd) {
    const Mixed v = mixed(x, y, g.mixture);
    p = v.s;
    d = mul(mul(p, set1(g.ks)), add(add(v.m_over_s, set1(g.high)), set1(g.low)));
  } else {
    p = exp_scaled(near, set1(s.log2.hi), set1(s.log2.lo));
    const F far = sub(y, set1(g.other_peak));
    if constexpr (kKind == Kind::forward) {
      const F q = exp_scaled(max(set1(t.log2.t_min), far), set1(t.log2.hi), set1(t.log2.lo));
      d = sub(mul(p, set1(g.ks)), mul(q, set1(g.kt)));
    } else {
      const F gap = sub(mul(g.mixture.cs, distance), mul(g.mixture.ct, far));
      const F away = sub(sub(gap, set1(g.high)), set1(g.low));
      d = select(equal(p, set1(0.0f)), p, mul(mul(p, set1(g.ks)), away));
    }
  }
  if constexpr (kMore) d = fma(p, fma(set1(g.more_b), near, set1(g.more_a)), d);
  return s.softcap ? mul(d, slope) : d;
}

template <Kind kKind, bool kMore, Store kStore, class In, class Out>
inline void pair_loop(const In* x, const In* y, Out* out, int64_t n, const RowScale& s, const RowScale& t,
                      const PairGrad& g) {
  int64_t i = 0;
  const auto part = [&](int left) {
    const F d = pair_dlogits<kKind, kMore>(load_part(x + i, left, 0.0f), load_part(y + i, left, 0.0f), s, t, g);
    store_part(out + i, d, left);
  };
  if constexpr (kStore == Store::streamed) {
    // up to the first address that a streaming store takes
    const uintptr_t width = kLanes * sizeof(Out), past = reinterpret_cast<uintptr_t>(out) % width;
    const int64_t head = past ? static_cast<int64_t>((width - past) / sizeof(Out)) : 0;
    if (head > n) return pair_loop<kKind, kMore, Store::cached>(x, y, out, n, s, t, g);
    if (head) part(static_cast<int>(head));
    i = head;
    for (; i + kLanes <= n; i += kLanes) stream(out + i, pair_dlogits<kKind, kMore>(load(x + i), load(y + i), s, t, g));
  } else {
    for (; i + kLanes <= n; i += kLanes) store(out + i, pair_dlogits<kKind, kMore>(load(x + i), load(y + i), s, t, g));
  }
  if (i < n) part(static_cast<int>(n - i));
}

// n columns of a row, all but the targets' own term. `out` may be `x`.
template <Store kStore, class In, class Out>
inline void pair_span(const In* x, const In* y, Out* out, int64_t n, Kind kind, const RowScale& s, const RowScale& t,
                      const PairGrad& g) {
  if (!g.valued) return dlogits_span<kStore>(x, out, n, s, g.own);
  if (g.broken) {
    for (int64_t i = 0; i < n; ++i) from_float(static_cast<float>(kNaN), out + i);
    return;
  }
  const auto with = [&](auto f) { f(x, y, out, n, s, t, g); };
  switch (kind) {
    case Kind::forward:
      return g.more ? with(pair_loop<Kind::forward, true, kStore, In, Out>)
                    : with(pair_loop<Kind::forward, false, kStore, In, Out>);
    case Kind::reverse:
      return g.more ? with(pair_loop<Kind::reverse, true, kStore, In, Out>)
                    : with(pair_loop<Kind::reverse, false, kStore, In, Out>);
    case Kind::jsd:
      return g.more ? with(pair_loop<Kind::jsd, true, kStore, In, Out>)
                    : with(pair_loop<Kind::jsd, false, kStore, In, Out>);
  }
}

// ∂L/∂x at the k-th target, whole.
inline float target_pair(float x, float y, int64_t k, Kind kind, const RowScale& s, const RowScale& t,
                         const PairGrad& g, const BackwardIn& in, const int64_t* ids, int64_t candidates, int64_t row,
                         int64_t rows) {
  PairGrad alone = g;
  alone.more = false;
  float d = 0.0f;
  if (g.valued) pair_span<Store::cached>(&x, &y, &d, 1, kind, s, t, alone);
  return d + target_dlogit(x, k, s, g.own, in, ids, candidates, row, rows);
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
