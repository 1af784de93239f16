// The arguments of the divergence ops as the extensions take them from Python: rlfast/native/divergence.py and
// linear_divergence.py pass them.
#pragma once
#include "bindings.h"
#include "rlfast/divergence.h"

namespace rlfast {

// `aux` [rows of the record, n]: the student's of token_logps, then peak and log_sum of the teacher, and both centres
// (rlfast/ops/divergence_records.py).
inline PairOut pair_out(Address value, Address logp, Address lse, Address entropy, Address ref_lse, Address aux,
                        int64_t candidates, int64_t n) {
  const int bits = (entropy ? kEntropy : 0) | (lse ? kLse : 0);
  float* teacher = at<float>(aux) + (2 + candidates + (entropy ? 1 : 0)) * n;
  return {forward_out(logp, lse, entropy, 0, 0, 0, 0, aux, bits, candidates, n),
          at<float>(value),
          at<float>(ref_lse),
          teacher,
          teacher + n,
          teacher + 2 * n,
          teacher + 4 * n};
}

inline PairIn pair_in(Address aux, Address other_aux, Address centre, Address g_value, Address g_logp, Address g_lse,
                      Address g_entropy, int64_t candidates, int64_t n) {
  return {backward_in(aux, g_logp, g_lse, g_entropy, candidates, n), at<const float>(other_aux),
          at<const float>(other_aux) + n, at<const float>(centre), at<const float>(g_value)};
}

#define RLFAST_PAIR_OPTIONS                                                                                       \
  Address temperatures, Address ref_temperatures, float temperature, float ref_temperature, float softcap,        \
      float ref_softcap, float logit_scale, float ref_logit_scale, Address ids, Address mask, int64_t candidates, \
      int kind, double beta

#define RLFAST_PAIR_OPTION_RECORDS                                                                 \
  Transform{at<const float>(temperatures), temperature, softcap, logit_scale},                     \
      Transform{at<const float>(ref_temperatures), ref_temperature, ref_softcap, ref_logit_scale}, \
      Targets{at<const int64_t>(ids), at<const uint8_t>(mask), candidates}, Measure {              \
    static_cast<Kind>(kind), beta                                                                  \
  }

#define RLFAST_PAIR_ARGS                                                                                            \
  Address logits, Address ref_logits, int dtype, int64_t outer, int64_t inner, int64_t vocab, int64_t stride_outer, \
      int64_t stride_inner, int64_t ref_outer, int64_t ref_inner, RLFAST_PAIR_OPTIONS

#define RLFAST_PAIR_RECORDS                                                                               \
  Logits{at<void>(logits), static_cast<DType>(dtype), outer, inner, vocab, stride_outer, stride_inner},   \
      Logits{at<void>(ref_logits), static_cast<DType>(dtype), outer, inner, vocab, ref_outer, ref_inner}, \
      RLFAST_PAIR_OPTION_RECORDS

#define RLFAST_PAIR_OUT_ARGS Address value, Address logp, Address lse, Address entropy, Address ref_lse, Address aux

#define RLFAST_PAIR_OUT_RECORD(n) pair_out(value, logp, lse, entropy, ref_lse, aux, candidates, n)

#define RLFAST_PAIR_IN_ARGS \
  Address aux, Address other_aux, Address centre, Address g_value, Address g_logp, Address g_lse, Address g_entropy

#define RLFAST_PAIR_IN_RECORD(n) pair_in(aux, other_aux, centre, g_value, g_logp, g_lse, g_entropy, candidates, n)

#define RLFAST_HEADS_ARGS                                                                                            \
  Address hidden, Address weight, Address bias, Address ref_hidden, Address ref_weight, Address ref_bias, int dtype, \
      int64_t rows, int64_t depth, int64_t ref_depth, int64_t vocab, int64_t stride_hidden, int64_t stride_weight,   \
      int64_t ref_stride_hidden, int64_t ref_stride_weight, RLFAST_PAIR_OPTIONS

#define RLFAST_HEADS_RECORDS           \
  Head{at<const void>(hidden),         \
       at<const void>(weight),         \
       at<const void>(bias),           \
       static_cast<DType>(dtype),      \
       rows,                           \
       depth,                          \
       vocab,                          \
       stride_hidden,                  \
       stride_weight},                 \
      Head{at<const void>(ref_hidden), \
           at<const void>(ref_weight), \
           at<const void>(ref_bias),   \
           static_cast<DType>(dtype),  \
           rows,                       \
           ref_depth,                  \
           vocab,                      \
           ref_stride_hidden,          \
           ref_stride_weight},         \
      RLFAST_PAIR_OPTION_RECORDS

}  // namespace rlfast
