// What every affine_scan kernel takes: raw pointers, sizes, strides. No torch in here.
//
// Each estimator is A_t = b_t + a_t·A_{t+1}; with V' and G' the value and the return after token t,
//     G_t = r_t + γ·((1 − λ)·V' + λ·G')                                             advantage G_t − V_t
//     G_t = V_t + min(ρ̄, ρ_t)·δ_t + γλ·min(c̄, ρ_t)·(G' − V'), δ_t = r_t + γV' − V_t   V-trace
//     G_t = r_t + a_t·G'                                                            the bare scan
#pragma once
#include "token_logps.h"

namespace rlfast {

// Valid tokens of a row after which the carry goes through a product, G = P·carry + Q, so that segments of a long row can be
// scanned side by side. Counted from the row's end, whatever the padding and the threads.
constexpr int64_t kScanSegment = 65536;

// One number a token; row r begins at element r·stride, or at cu[r] where rows are packed. Null: not given.
struct TokenInput {
  const void* data;
  DType dtype;
  int64_t stride;
};
struct TokenFlags {
  const uint8_t* data;  // 0 or 1
  int64_t stride;
};

// γ or λ: one number, or one a row, or one a token (dense).
struct Rate {
  double one;
  const double* data;  // null: `one`
  bool by_token;
};

struct ScanIn {
  int64_t rows, steps;  // padded [rows, steps]
  const int64_t* cu;    // [rows + 1] offsets of packed rows, or null
  TokenInput rewards, values, log_ratio, kl, coefficients, next_values;
  TokenFlags mask, done, truncated;
  const double* row_rewards;  // [rows]: added at the last valid token
  const double* bootstrap;    // [rows]: V' and G' after the last token
  Rate gamma, lam, critic_lam;
  double kl_coef;
  float clip_rho, clip_c, clip_pg;
  bool vtrace;
  bool zero;     // masked tokens count as r = V = 0 and are passed through the recurrence; else they are left out of it
  bool reverse;  // from the end of a row to its start
  bool decoupled;  // advantages by lam, returns by critic_lam

  RLFAST_HOST_DEVICE int64_t begin(int64_t row, int64_t stride) const { return cu ? cu[row] : row * stride; }
  RLFAST_HOST_DEVICE int64_t length(int64_t row) const { return cu ? cu[row + 1] - cu[row] : steps; }
};

// (x − mean)·(var + eps)^−½ over the valid tokens of all rows.
struct Whiten {
  bool on, bessel;
  bool inside;  // eps under the root, else beside it
  bool floor;   // the variance is at least eps, in place of the sum
  bool shift;   // to a mean of 0
  double eps;
};

struct ScanOut {
  float* advantages;  // dense; null: not wanted
  float* returns;
};

}  // namespace rlfast
