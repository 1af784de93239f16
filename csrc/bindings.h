// The arguments of token_logps as both extensions take them from Python: integers, floats and addresses in one positional
// call, which costs about a microsecond. rlfast/native/token_logps.py passes them.
#pragma once
#include <cstdint>

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

}  // namespace rlfast
