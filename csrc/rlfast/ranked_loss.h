// What the kernels of ranked_loss take. rlfast/ops/ranked_records.py says what each number means; the order of the metrics
// is its.
#pragma once
#include "token_loss.h"

namespace rlfast {

// [rows, size] padded, or packed with boundaries [rows + 1]; the weights' stride is from group to group.
struct RankedGroups {
  LossField scores, ref_scores, rewards, divisor;
  LossFlags mask;
  const int64_t* cu_seqlens;
  LossField weights;
  const float* num_items;  // null: the number of groups
  int64_t rows, size;
};

struct RankedCall {
  const char* form;
  int sum;  // whether the losses are summed, and not averaged
  float beta, tau, top, nll, nll_by_size, factor;
};

struct RankedMetrics {
  float loss, groups, candidates, accuracy, best_reward, best_score;
};

// Contiguous; null where not needed. A gradient of packed scores is addressed by their boundaries.
struct RankedOut {
  float* loss;
  RankedMetrics* metrics;
  float* d_scores;
  float* losses;
};

}  // namespace rlfast
