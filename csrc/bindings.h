// The arguments of token_logps as both extensions take them from Python: integers, floats and addresses in one positional
// call, which costs about a microsecond. rlfast/native/token_logps.py passes them.
#pragma once
#include <cstdint>

#include "rlfast/affine_scan.h"
#include "rlfast/linear_token_logps.h"

namespace rlfast {

using Address = uintptr_t;

// The optional outputs, as bits; the same as in rlfast/ops/records.py.
enum OutputBits : int { kEntropy = 1, kLogSumSqProbs = 2, kMeanLogits = 4, kIsTop1 = 8, kLse = 16 };

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The rows of the op's `aux` [rows of the record, n] in their order: Row.of in rlfast/ops/records.py.
inline ForwardOut forward_out(Address logp, Address lse, Address entropy, Address is_top1, Address topk_logp,
                              Address topk_ids, int64_t top_k, Address aux, int bits, int64_t candidates, int64_t n) {
  float* row = at<float>(aux);
  const auto next = [&](bool there) {
    float* here = there ? row : nullptr;
    row += there ? n : 0;
    return here;
  };
  ForwardOut out{};
  out.logp = at<float>(logp);
  out.lse = bits & kLse ? at<float>(lse) : nullptr;
  out.entropy = bits & kEntropy ? at<float>(entropy) : nullptr;
  out.is_top1 = bits & kIsTop1 ? at<uint8_t>(is_top1) : nullptr;
  out.topk_logp = top_k ? at<float>(topk_logp) : nullptr;
  out.topk_ids = top_k ? at<int64_t>(topk_ids) : nullptr;
  out.top_k = top_k;
  out.peak = next(true);
  out.log_sum = next(true);
  out.saved_logp = row;
  row += candidates * n;
  out.saved_entropy = next(bits & kEntropy);
  out.log_sum_sq_probs = next(bits & kLogSumSqProbs);
  out.mean_logits = next(bits & kMeanLogits);
  out.tail_mass = next(top_k > 0);
  return out;
}

inline BackwardIn backward_in(Address aux, Address g_logp, Address g_lse, Address g_entropy, int64_t candidates,
                              int64_t n) {
  const float* row = at<const float>(aux);
  BackwardIn in{};
  in.peak = row;
  in.log_sum = row + n;
  in.saved_logp = row + 2 * n;
  in.saved_entropy = g_entropy ? row + (2 + candidates) * n : nullptr;
  in.g_logp = at<const float>(g_logp);
  in.g_lse = at<const float>(g_lse);
  in.g_entropy = at<const float>(g_entropy);
  return in;
}

// What a forward and a backward share: the logits, the transform, the targets.
#define RLFAST_INPUT_ARGS                                                                                             \
  Address logits, int dtype, int64_t outer, int64_t inner, int64_t vocab, int64_t stride_outer, int64_t stride_inner, \
      Address temperatures, float temperature, float softcap, float logit_scale, Address ids, Address mask,           \
      int64_t candidates

#define RLFAST_INPUT_RECORDS                                                                            \
  Logits{at<void>(logits), static_cast<DType>(dtype), outer, inner, vocab, stride_outer, stride_inner}, \
      Transform{at<const float>(temperatures), temperature, softcap, logit_scale}, Targets {            \
    at<const int64_t>(ids), at<const uint8_t>(mask), candidates                                         \
  }

#define RLFAST_FORWARD_OUT_ARGS                                                                                    \
  Address logp, Address lse, Address entropy, Address is_top1, Address topk_logp, Address topk_ids, int64_t top_k, \
      Address aux, int bits

#define RLFAST_FORWARD_ARGS RLFAST_INPUT_ARGS, RLFAST_FORWARD_OUT_ARGS

#define RLFAST_FORWARD_RECORDS \
  RLFAST_INPUT_RECORDS,        \
      forward_out(logp, lse, entropy, is_top1, topk_logp, topk_ids, top_k, aux, bits, candidates, outer* inner)

#define RLFAST_BACKWARD_ARGS                                                                                        \
  RLFAST_INPUT_ARGS, Address aux, Address g_logp, Address g_lse, Address g_entropy, Address out, int64_t out_outer, \
      int64_t out_inner

#define RLFAST_BACKWARD_RECORDS                                                                        \
  RLFAST_INPUT_RECORDS, backward_in(aux, g_logp, g_lse, g_entropy, candidates, outer* inner), Logits { \
    at<void>(out), static_cast<DType>(dtype), outer, inner, vocab, out_outer, out_inner                \
  }

// linear_token_logps: rlfast/native/linear_token_logps.py passes them.
#define RLFAST_HEAD_ARGS                                                                                    \
  Address hidden, Address weight, Address bias, int dtype, int64_t rows, int64_t depth, int64_t vocab,      \
      int64_t stride_hidden, int64_t stride_weight, Address temperatures, float temperature, float softcap, \
      float logit_scale, Address ids, Address mask, int64_t candidates

#define RLFAST_HEAD_RECORDS                                                                  \
  Head{at<const void>(hidden),                                                               \
       at<const void>(weight),                                                               \
       at<const void>(bias),                                                                 \
       static_cast<DType>(dtype),                                                            \
       rows,                                                                                 \
       depth,                                                                                \
       vocab,                                                                                \
       stride_hidden,                                                                        \
       stride_weight},                                                                       \
      Transform{at<const float>(temperatures), temperature, softcap, logit_scale}, Targets { \
    at<const int64_t>(ids), at<const uint8_t>(mask), candidates                              \
  }

// affine_scan: rlfast/native/affine_scan.py passes them. A token's input is an address, a dtype and a row stride; a flag an
// address and a row stride; a rate an address and what it is given per.
#define RLFAST_SCAN_ARGS                                                                                              \
  int64_t rows, int64_t steps, Address cu, Address rewards, int rewards_type, int64_t rewards_stride, Address values, \
      int values_type, int64_t values_stride, Address log_ratio, int ratio_type, int64_t ratio_stride, Address kl,    \
      int kl_type, int64_t kl_stride, Address coefficients, int coefficients_type, int64_t coefficients_stride,       \
      Address next_values, int next_type, int64_t next_stride, Address mask, int64_t mask_stride, Address done,       \
      int64_t done_stride, Address truncated, int64_t truncated_stride, Address row_rewards, Address bootstrap,       \
      double gamma, Address gammas, bool gamma_by_token, double lam, Address lams, bool lam_by_token,                 \
      double critic_lam, Address critic_lams, bool critic_by_token, double kl_coef, float clip_rho, float clip_c,     \
      float clip_pg, int options, int whiten, double eps, Address advantages, Address returns

// Bits of `options` and of `whiten`: the same as in rlfast/ops/scan_records.py.
enum ScanBits : int { kVtrace = 1, kZero = 2, kReverse = 4, kDecoupled = 8 };
enum WhitenBits : int { kWhiten = 1, kBessel = 2, kInside = 4, kFloor = 8, kShift = 16 };

#define RLFAST_SCAN_RECORDS                                                                            \
  ScanIn{rows,                                                                                         \
         steps,                                                                                        \
         at<const int64_t>(cu),                                                                        \
         {at<const void>(rewards), static_cast<DType>(rewards_type), rewards_stride},                  \
         {at<const void>(values), static_cast<DType>(values_type), values_stride},                     \
         {at<const void>(log_ratio), static_cast<DType>(ratio_type), ratio_stride},                    \
         {at<const void>(kl), static_cast<DType>(kl_type), kl_stride},                                 \
         {at<const void>(coefficients), static_cast<DType>(coefficients_type), coefficients_stride},   \
         {at<const void>(next_values), static_cast<DType>(next_type), next_stride},                    \
         {at<const uint8_t>(mask), mask_stride},                                                       \
         {at<const uint8_t>(done), done_stride},                                                       \
         {at<const uint8_t>(truncated), truncated_stride},                                             \
         at<const double>(row_rewards),                                                                \
         at<const double>(bootstrap),                                                                  \
         {gamma, at<const double>(gammas), gamma_by_token},                                            \
         {lam, at<const double>(lams), lam_by_token},                                                  \
         {critic_lam, at<const double>(critic_lams), critic_by_token},                                 \
         kl_coef,                                                                                      \
         clip_rho,                                                                                     \
         clip_c,                                                                                       \
         clip_pg,                                                                                      \
         (options & kVtrace) != 0,                                                                     \
         (options & kZero) != 0,                                                                       \
         (options & kReverse) != 0,                                                                    \
         (options & kDecoupled) != 0},                                                                 \
      ScanOut{at<float>(advantages), at<float>(returns)}, Whiten {                                     \
    (whiten & kWhiten) != 0, (whiten & kBessel) != 0, (whiten & kInside) != 0, (whiten & kFloor) != 0, \
        (whiten & kShift) != 0, eps                                                                    \
  }

}  // namespace rlfast
