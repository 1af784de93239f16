// What every token_loss kernel takes, on the CPU and on a GPU. rlfast/ops/loss_records.py says what each number means;
// the integers of the plan and the order of the metrics are its.
#pragma once
#include <cmath>

#include "token_logps.h"

namespace rlfast {

enum Unit : int { kUnitToken, kUnitSeqMean, kUnitSeqSum, kUnitSeqMeanThrough };
enum Reduce : int { kTokenMean, kTokenSum, kSeqMeanTokenMean, kSeqMeanTokenSum, kSeqSumOverMaxLen };
enum Level : int { kNoLevel, kAtToken, kAtSeqSum, kAtSeqMean };

// Of the effective sample size: a larger weight counts for the largest, a smaller one for 0.
constexpr float kSmallestWeight = 1e-15f, kLargestWeight = 1e15f;
constexpr double kLogLeast = -18.420680743952367;  // log 1e-8: what a weight of 0 counts for in a log-ratio
constexpr double kLogMost = 20.0;

// A float field of the tokens; data is null if there is none.
struct LossField {
  const void* data;
  DType dtype;
  int64_t stride;  // elements from row to row
  int64_t step;    // elements from token to token: 1, or 0 where a row has one value
};

// A bool field; null: all true.
struct LossFlags {
  const uint8_t* data;
  int64_t stride;
};

// [rows, length] padded, or packed: [length] with cu_seqlens [rows + 1].
struct LossFields {
  LossField logp, old_logp, ref_logp, rollout_logp, adv, entropy, weights, extra;
  LossFlags mask, keep;
  const int64_t* cu_seqlens;
  const float* num_items;  // null: the batch's own count
  const float* coefs;      // [2], factors of beta and entropy_coef; null: 1
  int64_t rows, length;
};

struct LossPlan {
  int unit, signed_bounds, mean_adv, kl_through, kl_ratio, reduce, count_empty, entropy_mean;
  int weight, weight_in_ratio, gate, gate_kind, gate_masks;
};

struct LossSettings {
  float beta, entropy_coef, inner_low, inner_high, unit_low, unit_high, weight_low, weight_high;
  float gate_low, gate_high, off_policy, max_len, factor, entropy_factor;
};

// One objective: names of formulas (the estimator's is empty if there is none) and their hyper-parameters.
struct LossObjective {
  LossPlan plan;
  LossSettings settings;
  const char* surrogate;
  const char* estimator;
  const float* hyper;
  const float* kl_hyper;
};

struct LossMetrics {
  float loss, scale, entropy_scale, tokens, sequences, policy_loss, kl, entropy, approx_kl_k1, approx_kl_k3;
  float clip_low, clip_high, ratio_mean, ratio_max, ess, dropped, rollout_ratio_mean, rollout_ratio_max;
};

struct LossOut {
  float* loss;
  LossMetrics* metrics;
  float* dlogp;     // contiguous like logp; null if not needed
  float* dentropy;  // the same
};

// Whether a token's part depends on its sequence: else any split of the tokens will do.
inline bool row_wise(const LossPlan& p, const LossSettings& s) {
  return p.unit != kUnitToken || p.reduce >= kSeqMeanTokenMean || p.weight > kAtToken || p.gate > kAtToken ||
         p.mean_adv || p.gate_masks || s.off_policy < HUGE_VALF;
}

}  // namespace rlfast
