// What the kernels of pair_loss and unpaired_loss take, on the CPU and on a GPU. rlfast/ops/preference_records.py says what
// each number means; the order of the metrics is its.
#pragma once
#include "token_loss.h"

namespace rlfast {

// One response of each pair: sums [rows], or tokens [rows, length] or packed with boundaries [rows + 1].
struct PreferenceSide {
  LossField logp, ref_logp;
  LossFlags mask;
  const int64_t* cu_seqlens;
  const float* lengths;  // of sums; null: 1
  int64_t length;        // of a row of padded tokens
  bool tokens;
};

// Fields of the pairs; the stride is from pair to pair.
struct PreferenceRest {
  LossField margin, extra, shared, weights;
  const float* num_items;  // null: the number of pairs
};

struct PreferenceTerm {
  const char* score;
  const char* link;  // of the first term empty: its score, times its weight, is the reward
  int mean;
  float weight, score_hyper[2], link_hyper[4];
};

constexpr int kMostTerms = 8;

struct PreferenceCall {
  PreferenceTerm terms[kMostTerms];
  int count;  // of the terms
  int sum;    // whether the losses are summed, and not averaged
  float tail, factor;
};

struct PairMetrics {
  float loss, pairs, chosen_reward, rejected_reward, accuracy, reward_margin, chosen_logp, rejected_logp;
  float chosen_length, rejected_length;
};

struct SingleMetrics {
  float loss, desirable, undesirable, desirable_reward, undesirable_reward, desirable_logp, undesirable_logp;
};

// Contiguous; null where not needed. Of a side with packed tokens a gradient is addressed by its boundaries.
struct PreferenceOut {
  float* loss;
  float* metrics;
  float* d_logp[2];
  float* losses;
  float* rewards[2];
};

}  // namespace rlfast
