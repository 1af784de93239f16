// From the leaves of a row to its outputs. Everything here is once a row, in double.
#pragma once
#include "top_k.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

inline int64_t leaf_count(int64_t vocab) { return (vocab + kLeaf - 1) / kLeaf; }

inline int leaf_columns(int64_t vocab, int64_t leaf) {
  const int64_t left = vocab - leaf * kLeaf;
  return static_cast<int>(left < kLeaf ? left : kLeaf);
}

// Sums over the row, of e = exp(c·(y − peak)) at the row's peak; `scale` [leaves] takes a leaf's sums there.
struct RowTotals {
  float top;   // the maximum of y
  float peak;  // the same, or 0 for a row of −inf
  double sum, weighted, squares, total, log_sum;
};

inline double leaf_scale(float leaf_peak, const RowTotals& r, const RowScale& s) {
  return std::exp(s.c * (static_cast<double>(leaf_peak) - r.peak));
}

inline RowTotals merge_leaves(const LeafStats* leaf, int64_t leaves, const RowScale& s, unsigned sums, double* scale) {
  RowTotals r{-kInf, 0.0f, 0.0, 0.0, 0.0, 0.0, 0.0};
  for (int64_t l = 0; l < leaves; ++l) r.top = leaf[l].peak > r.top ? leaf[l].peak : r.top;
  r.peak = r.top == -kInf ? 0.0f : r.top;
  for (int64_t l = 0; l < leaves; ++l) scale[l] = leaf_scale(leaf[l].peak, r, s);
  for (int64_t l = 0; l < leaves; ++l) {
    r.sum += scale[l] * leaf[l].sum;
    r.squares += scale[l] * scale[l] * leaf[l].squares;
    r.total += leaf[l].total;
  }
  if (sums & kEntropySum) {
    for (int64_t l = 0; l < leaves; ++l) {
      const double shift = leaf[l].peak == -kInf ? 0.0 : static_cast<double>(leaf[l].peak) - r.peak;
      r.weighted += scale[l] * (leaf[l].weighted + shift * leaf[l].sum);
    }
  }
  r.log_sum = std::log(r.sum);
  return r;
}

// H = log Σe − Σ e·(z − peak) / Σe: two terms that are not negative.
inline double row_entropy(const RowTotals& r, const RowScale& s) { return r.log_sum - s.c * r.weighted / r.sum; }

// log p = −softplus(lse of the others − z_t): exact as p → 1, and never positive.
inline double target_logp(const TargetStats& t, const LeafStats* leaf, int64_t leaves, const RowTotals& r,
                          const RowScale& s, const double* scale) {
  if (t.leaf < 0) return t.leaf == -1 ? 0.0 : kNaN;
  double others = 0.0;
  for (int64_t l = 0; l < leaves; ++l) {
    others += l == t.leaf ? leaf_scale(t.rest.peak, r, s) * t.rest.sum : scale[l] * leaf[l].sum;
  }
  const double d = std::log(others) - s.c * (static_cast<double>(t.y) - r.peak);
  return -((d > 0.0 ? d : 0.0) + std::log1p(std::exp(-std::fabs(d)))) + (d != d ? d : 0.0);
}

// Whether the target is the first argmax of the row.
inline bool target_is_first(const TargetStats& t, const LeafStats* leaf, const RowTotals& r) {
  if (t.leaf < 0 || !t.first || t.y != r.top || (r.sum != r.sum && r.top != kInf)) return false;
  for (int64_t l = 0; l < t.leaf; ++l) {
    if (leaf[l].peak == r.top) return false;
  }
  return true;
}

inline void write_top_k(TopK& best, int64_t leaves, const RowTotals& r, const RowScale& s, const ForwardOut& out,
                        int64_t row) {
  std::sort_heap(best.heap, best.heap + best.count, Better{});
  for (int64_t j = 0; j < best.k; ++j) {
    out.topk_ids[row * best.k + j] = best.heap[j].id;
    out.topk_logp[row * best.k + j] =
        static_cast<float>(s.c * (static_cast<double>(best.heap[j].y) - r.peak) - r.log_sum);
  }
  double outside = 0.0;
  for (int64_t l = 0; l < leaves; ++l) outside += leaf_scale(best.rest[l].peak, r, s) * best.rest[l].sum;
  out.tail_mass[row] = static_cast<float>(outside / r.sum);
}

// Every output of a row. targets [candidates]; `best` is null without top-k; `scale` [leaves] is scratch.
inline void write_row(const LeafStats* leaf, int64_t vocab, const TargetStats* targets, int64_t candidates, TopK* best,
                      const RowScale& s, unsigned sums, double* scale, const ForwardOut& out, int64_t row,
                      int64_t rows) {
  const int64_t leaves = leaf_count(vocab);
  const RowTotals r = merge_leaves(leaf, leaves, s, sums, scale);
  out.peak[row] = r.peak;
  out.log_sum[row] = static_cast<float>(r.log_sum);
  if (out.lse) out.lse[row] = static_cast<float>(s.c * r.peak + r.log_sum);
  for (int64_t k = 0; k < candidates; ++k) {
    const float logp = static_cast<float>(target_logp(targets[k], leaf, leaves, r, s, scale));
    out.logp[row * candidates + k] = out.saved_logp[k * rows + row] = logp;
    if (out.is_top1) out.is_top1[row * candidates + k] = target_is_first(targets[k], leaf, r);
  }
  if (out.entropy) {
    out.entropy[row] = out.saved_entropy[row] = static_cast<float>(row_entropy(r, s));
  }
  if (out.log_sum_sq_probs) out.log_sum_sq_probs[row] = static_cast<float>(std::log(r.squares) - 2.0 * r.log_sum);
  if (out.mean_logits) out.mean_logits[row] = static_cast<float>(s.c * r.total / static_cast<double>(vocab));
  if (best) write_top_k(*best, leaves, r, s, out, row);
}

// A skipped row: zeros, and −1 for ids.
inline void write_skipped_row(int64_t candidates, const ForwardOut& out, int64_t row, int64_t rows) {
  out.peak[row] = out.log_sum[row] = 0.0f;
  if (out.lse) out.lse[row] = 0.0f;
  for (int64_t k = 0; k < candidates; ++k) {
    out.logp[row * candidates + k] = out.saved_logp[k * rows + row] = 0.0f;
    if (out.is_top1) out.is_top1[row * candidates + k] = 0;
  }
  if (out.entropy) out.entropy[row] = out.saved_entropy[row] = 0.0f;
  if (out.log_sum_sq_probs) out.log_sum_sq_probs[row] = 0.0f;
  if (out.mean_logits) out.mean_logits[row] = 0.0f;
  if (!out.top_k) return;
  out.tail_mass[row] = 0.0f;
  for (int64_t j = 0; j < out.top_k; ++j) {
    out.topk_ids[row * out.top_k + j] = -1;
    out.topk_logp[row * out.top_k + j] = 0.0f;
  }
}

inline bool skipped(const Targets& t, int64_t row) {
  if (t.mask && !t.mask[row]) return true;
  for (int64_t k = 0; k < t.candidates; ++k) {
    if (t.ids[row * t.candidates + k] != kIgnoreIndex) return false;
  }
  return t.candidates > 0;
}

// The targets of a row of logits, each in its leaf; `buffer` and `copy` [kLeaf].
template <class T>
void find_targets(const T* x, int64_t vocab, const Targets& targets, const RowScale& s, int64_t row, float* buffer,
                  float* copy, TargetStats* found) {
  for (int64_t k = 0; k < targets.candidates; ++k) {
    const int64_t id = targets.ids[row * targets.candidates + k], at = id / kLeaf;
    if (id < 0 || id >= vocab) {
      found[k] = {id == kIgnoreIndex ? -1 : -2, false, 0.0f, {}};
      continue;
    }
    float peak;
    const int n = leaf_columns(vocab, at);
    const float* y = load_leaf(x + at * kLeaf, n, s, buffer, &peak);
    found[k] = target_stats(y, n, at, static_cast<int>(id % kLeaf), s.log2, copy);
  }
}

inline unsigned wanted_sums(const ForwardOut& out) {
  unsigned sums = 0;
  if (out.entropy) sums |= kEntropySum;
  if (out.log_sum_sq_probs) sums |= kSquareSum;
  if (out.mean_logits) sums |= kTotalSum;
  return sums;
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
