// What every token_loss kernel takes, on the CPU and on a GPU: rlfast/ops/loss_records.py says what each number means.
#pragma once
#include <cmath>

#include "token_logps.h"

namespace rlfast {

// A field of the tokens: that of token t of row r lies at r·row_stride + t·stride. Packed sequences are one row.
struct Field {
  const void* data;  // null: not given
  DType dtype;
  int64_t row_stride, stride;  // in elements; a stride of 0: a row has one
};

struct Flags {
  const uint8_t* data;  // null: all true
  int64_t row_stride;
};

struct LossFields {
  int64_t sequences, length;  // length: tokens of a row; packed, of all sequences
  Field logp, old_logp, ref_logp, rollout_logp, adv, entropy, weights, extra;
  Flags mask, keep;
  const int64_t* cu_seqlens;  // [sequences + 1], or null: not packed
  const float* num_items;     // [], or null
  const float* coefs;         // [2], or null
};

enum Unit : int { kToken, kSeqMean, kSeqSum, kSeqMeanThrough };
enum Reduce : int { kTokenMean, kTokenSum, kSeqMeanTokenMean, kSeqMeanTokenSum, kSeqSumOverMaxLen };
enum Level : int { kNoLevel, kAtToken, kAtSeqSum, kAtSeqMean };

struct LossPlan {
  int unit, by_sign, mean_adv, kl_through, kl_ratio, reduce, count_empty, entropy_mean, weight, weight_in_ratio, gate,
      gate_kind, gate_masks;
};

struct LossSettings {
  float beta, entropy_coef, inner_low, inner_high, unit_low, unit_high, weight_low, weight_high, gate_low, gate_high,
      off_policy, max_len, factor, entropy_factor;
};

constexpr int kMaxHyper = 4;  // of a surrogate

// Formulas by their place in the lists of csrc/rlfast/formulas.gen.h, and their hyper-parameters in order.
struct LossFormulas {
  int surrogate;
  int estimator;  // −1: none
  float hyper[kMaxHyper], kl_hyper[2];
};

struct LossMetrics {
  float loss, scale, entropy_scale, tokens, sequences, policy_loss, kl, entropy, approx_kl_k1, approx_kl_k3, clip_low,
      clip_high, ratio_mean, ratio_max, ess, dropped, rollout_ratio_mean, rollout_ratio_max;
};

// Gradients are [rows, length]; null: not wanted.
struct LossOut {
  float* loss;
  LossMetrics* metrics;
  float *dlogp, *dentropy;
};

struct LossCall {
  LossFields fields;
  LossPlan plan;
  LossSettings settings;
  LossFormulas formulas;
  LossOut out;
};

// Whether a token's part depends on its sequence. static: an inline function may be merged over instruction sets.
static inline bool row_wise(const LossPlan& p, const LossSettings& s) {
  return p.unit != kToken || p.mean_adv || p.reduce >= kSeqMeanTokenMean || p.weight > kAtToken || p.gate > kAtToken ||
         s.off_policy < HUGE_VALF;
}

constexpr float kLargestWeight = 1e15f, kLogLeast = -18.420680743952367f, kLogMost = 20.0f;

}  // namespace rlfast
