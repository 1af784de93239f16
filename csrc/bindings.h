// The arguments of token_logps as both extensions take them from Python: integers, floats and addresses in one positional
// call, which costs about a microsecond. rlfast/native/token_logps.py passes them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "rlfast/linear_token_logps.h"
#include "rlfast/token_loss.h"

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

// token_loss: rlfast/native/token_loss.py passes them. `fields` holds sequences and length; address, dtype and strides of the
// eight fields of floats; address and stride of mask and keep; the addresses of cu_seqlens, num_items and coefs.
#define RLFAST_LOSS_ARGS                                                                                               \
  const std::vector<int64_t>&fields, const std::vector<int>&plan, const std::vector<float>&settings, int surrogate,    \
      const std::vector<float>&hyper, int estimator, const std::vector<float>&kl_hyper, Address loss, Address metrics, \
      Address dlogp, Address dentropy

#define RLFAST_LOSS_RECORD \
  loss_call(fields, plan, settings, surrogate, hyper, estimator, kl_hyper, loss, metrics, dlogp, dentropy)

inline LossCall loss_call(RLFAST_LOSS_ARGS) {
  const int64_t* next = fields.data();
  const auto field = [&] {
    Field f = {at<const void>(Address(next[0])), static_cast<DType>(next[1]), next[2], next[3]};
    return next += 4, f;
  };
  const auto flags = [&] {
    Flags f = {at<const uint8_t>(Address(next[0])), next[1]};
    return next += 2, f;
  };
  LossCall call{};
  LossFields& f = call.fields;
  f.sequences = *next++;
  f.length = *next++;
  for (Field* x : {&f.logp, &f.old_logp, &f.ref_logp, &f.rollout_logp, &f.adv, &f.entropy, &f.weights, &f.extra})
    *x = field();
  f.mask = flags();
  f.keep = flags();
  f.cu_seqlens = at<const int64_t>(Address(*next++));
  f.num_items = at<const float>(Address(*next++));
  f.coefs = at<const float>(Address(*next++));
  const int* p = plan.data();
  call.plan = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12]};
  const float* s = settings.data();
  call.settings = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13]};
  call.formulas.surrogate = surrogate;
  call.formulas.estimator = estimator;
  std::copy(hyper.begin(), hyper.end(), call.formulas.hyper);
  std::copy(kl_hyper.begin(), kl_hyper.end(), call.formulas.kl_hyper);
  call.out = {at<float>(loss), at<LossMetrics>(metrics), at<float>(dlogp), at<float>(dentropy)};
  return call;
}

}  // namespace rlfast
