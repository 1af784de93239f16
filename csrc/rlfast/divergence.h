// What the divergence kernels take beside token_logps.h: two distributions over one vocabulary, S and T.
#pragma once
#include "linear_token_logps.h"

namespace rlfast {

// S is the own side and T the other. Seen from T, forward and reverse change places and β becomes 1 − β.
enum class Kind : int { forward = 0, reverse = 1, jsd = 2 };

struct Measure {
  Kind kind;    // forward: KL(T‖S), reverse: KL(S‖T), jsd: β·KL(T‖M) + (1 − β)·KL(S‖M), M = (1 − β)·S + β·T
  double beta;  // 0 < β < 1
};

// `student` as in token_logps. The centres are what the gradients of either side need, as high + low: KL(p‖M) of a JSD, of a KL
// the mean over p of gap = (z_p − peak_p) − (z_q − peak_q), each in the row of whoever p is.
struct PairOut {
  ForwardOut student;
  float* value;    // [rows]
  float* ref_lse;  // [rows], or null
  float* ref_peak;
  float* ref_log_sum;
  float* centre;      // [2, rows]
  float* ref_centre;  // [2, rows]
};

struct PairIn {
  BackwardIn own;  // of the side whose gradient is wanted
  const float* other_peak;
  const float* other_log_sum;
  const float* centre;   // [2, rows]: the own side's
  const float* g_value;  // [rows], or null
};

}  // namespace rlfast
