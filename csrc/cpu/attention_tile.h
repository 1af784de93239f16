// The softmax of a tile of queries over one split of the keys, and how splits are merged.
//
//   y = x or tanh(scale·x / softcap)   of x = q·k
//   w = exp(c·(y − peak))              c: the scale, or the soft-cap; peak: the split's own maximum of y
//   Σw and Σw·v                        of the split; then splits are merged in ascending order
//
// As in row_stats.h, the difference comes before the factor. A split is relative to its own peak, not to that of the splits
// before it: what it gives does not depend on where a walk over the keys began.
#pragma once
#include "attention_plan.h"
#include "gemm.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

constexpr float kNothing = -std::numeric_limits<float>::infinity();  // the peak of no key
constexpr int kTilePad = (kTileRows + kLanes - 1) / kLanes * kLanes;
constexpr int64_t kScorePitch = kSplit + 16;  // an odd number of cache lines

struct ScoreScale {
  bool softcap;
  TanhScale tanh;
  double c;
  Log2Scale log2;  // of c

  ScoreScale(float scale, float cap) : softcap(cap != 0.0f), tanh{}, c(softcap ? cap : scale), log2(log2_scale(c)) {
    if (softcap) tanh = tanh_scale(static_cast<double>(scale) / cap);
  }
};

// exp(c·t) for t ≤ 0, −inf among them.
inline F decayed(F t, const Log2Scale& c) {
  if constexpr (!kSplitsInf) t = max(set1(c.t_min), t);
  return exp_term(t, set1(c.hi));
}

// A peak that may be subtracted: where every score is −inf, −inf − −inf would be NaN.
inline F finite_peak(F peak) { return select(equal(peak, set1(kNothing)), set1(0.0f), peak); }

// Which of the lanes [first, first + kLanes) are seen.
inline M within(const Seen& seen, int64_t first) {
  alignas(64) static const float kIota[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const F lane = add(load(kIota), set1(static_cast<float>(first)));
  return both(at_least(lane, set1(static_cast<float>(seen.from))), greater(set1(static_cast<float>(seen.to)), lane));
}

// Peak and sum of a row's weights.
struct RowWeights {
  float peak, sum;
};

// x [columns] → w in place, 0 where the row does not see. `columns` are whole vectors; those beyond the last that is seen add
// exact zeros to sums in ascending order, so that their number changes no bit.
inline RowWeights weigh(float* x, int64_t columns, const Seen& seen, const ScoreScale& s) {
  const bool all = seen.from <= 0 && seen.to >= columns;
  F top = set1(kNothing), sum = set1(0.0f);
  for (int64_t i = 0; i < columns; i += kLanes) {
    F y = load(x + i);
    if (s.softcap) y = tanh(y, s.tanh);
    if (!all) y = select(within(seen, i), y, set1(kNothing));
    if (s.softcap || !all) store(x + i, y);
    top = max(y, top);
  }
  const float peak = reduce_max(top);
  const F base = finite_peak(set1(peak));
  for (int64_t i = 0; i < columns; i += kLanes) {
    const F w = decayed(sub(load(x + i), base), s.log2);
    store(x + i, w);
    sum = add(sum, w);
  }
  return {peak, static_cast<float>(reduce_add(sum))};
}

// What some rows have added up to, relative to their peaks: of all splits so far, or of one.
struct RowSums {
  float *peak, *sum;  // [rows], and room for a vector more
  float* values;      // [rows, width]
};

// The splits so far and the next, for the rows of a tile that see some of it:
//   peak = max(peak, peak′),  a = exp(c·(peak − max)),  b = exp(c·(peak′ − max)),  Σ = a·Σ + b·Σ′
inline void merge(const RowSums& so_far, const RowSums& next, const Seen* seen, int64_t rows, int64_t width,
                  const Log2Scale& c) {
  alignas(64) float top[kTilePad], a[kTilePad], b[kTilePad];
  for (int i = 0; i < kTilePad; i += kLanes) {
    const F before = load(so_far.peak + i), own = load(next.peak + i), larger = max(before, own);
    const F base = finite_peak(larger);
    store(top + i, larger);
    store(a + i, decayed(sub(before, base), c));
    store(b + i, decayed(sub(own, base), c));
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (seen[r].from >= seen[r].to) continue;
    so_far.peak[r] = top[r];
    so_far.sum[r] = so_far.sum[r] * a[r] + next.sum[r] * b[r];
    const F old = set1(a[r]), young = set1(b[r]);
    float *to = so_far.values + r * width, *from = next.values + r * width;
    for (int64_t i = 0; i < width; i += kLanes) store(to + i, fma(load(to + i), old, mul(load(from + i), young)));
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
