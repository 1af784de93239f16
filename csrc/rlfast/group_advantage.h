// What every group_advantage kernel takes: raw pointers and sizes. No torch in here.
#pragma once
#include "token_logps.h"

namespace rlfast {

// The baseline of a sample, and what its distance is divided by; the same as in rlfast/ops/group_records.py.
enum class Baseline : int { mean, leave_one_out, weighted, soft, second };
enum class Scale : int { none, std, others_std };

struct GroupIn {
  int64_t samples;
  const void* rewards;
  DType dtype;
  const int64_t* ids;  // [samples], or null: groups of `size`, one after the other
  int64_t size;
  const uint8_t* mask;    // or null
  const double* weights;  // of Baseline::weighted
};

struct GroupOptions {
  Baseline baseline;
  Scale scale;
  bool bessel, lone_raw, skip_zero;
  double eps, tau;
};

struct GroupOut {
  float* advantages;   // [samples]
  double* statistics;  // [4]: groups, groups of equal rewards, Σ of their means, Σ of their stds
};

}  // namespace rlfast
