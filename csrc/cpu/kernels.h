// The entry points of the CPU kernels, callable from plain C++: one set per instruction set, and a dispatch between them.
//
// The build defines RLFAST_ISAS(X) as X(baseline) X(avx2) …: the instruction sets that were compiled, slowest first.
#pragma once
#include <cstddef>

#include "../rlfast/affine_scan.h"
#include "../rlfast/divergence.h"
#include "../rlfast/group_advantage.h"
#include "../rlfast/linear.h"
#include "../rlfast/paged_attention.h"
#include "../rlfast/preference.h"
#include "../rlfast/ranked_loss.h"
#include "../rlfast/sample.h"

#ifndef RLFAST_ISAS
#define RLFAST_ISAS(X) X(baseline)
#endif

namespace rlfast {

#define RLFAST_DECLARE(isa)                                                                                              \
  namespace isa {                                                                                                        \
  /* logits → every output whose pointer is not null */                                                                  \
  void token_logps_forward(const Logits&, const Transform&, const Targets&, const ForwardOut&, int threads);             \
  /* ∂L/∂logits into `out` [outer, inner, vocab] of logits' dtype, with its own strides; it may be the logits */         \
  void token_logps_backward(const Logits&, const Transform&, const Targets&, const BackwardIn&, const Logits& out,       \
                            int threads);                                                                                \
  /* hidden·weightᵀ + bias → the same outputs; the float32 logits of the rows that count to `kept` if it is not null */  \
  void linear_token_logps_forward(const Head&, const Transform&, const Targets&, const ForwardOut&, float* kept,         \
                                  int threads);                                                                          \
  /* the gradients whose pointers are not null; `kept` as the forward left it, or null: the logits are made again */     \
  void linear_token_logps_backward(const Head&, const Transform&, const Targets&, const BackwardIn&,                     \
                                   const float* kept, const HeadGradients&, int threads);                                \
  /* two logits → their divergence, and the student's outputs as in token_logps */                                       \
  void divergence_forward(const Logits&, const Logits& other, const Transform&, const Transform& of_other,               \
                          const Targets&, const Measure&, const PairOut&, int threads);                                  \
  /* ∂L/∂logits of the first side into `out` [outer, inner, vocab] of its dtype */                                       \
  void divergence_backward(const Logits&, const Logits& other, const Transform&, const Transform& of_other,              \
                           const Targets&, const Measure&, const PairIn&, const Logits& out, int threads);               \
  /* two heads → the same; the float32 logits of the rows that count to `kept` and `other_kept` if those are not null */ \
  void linear_divergence_forward(const Head&, const Head& other, const Transform&, const Transform& of_other,            \
                                 const Targets&, const Measure&, const PairOut&, float* kept, float* other_kept,         \
                                 int threads);                                                                           \
  /* the gradients of the first head whose pointers are not null */                                                      \
  void linear_divergence_backward(const Head&, const Head& other, const Transform&, const Transform& of_other,           \
                                  const Targets&, const Measure&, const PairIn&, const float* kept,                      \
                                  const float* other_kept, const HeadGradients&, int threads);                           \
  /* fields → the loss, its metrics and its gradients, in one pass; the surrogate and the estimator are known */         \
  void token_loss(const LossObjective&, const LossFields&, const LossOut&, int threads);                                 \
  /* the responses of each pair → the loss, its metrics and its gradients; the names of the terms are known */           \
  void pair_loss(const PreferenceCall&, const PreferenceSide& chosen, const PreferenceSide& rejected,                    \
                 const PreferenceRest&, int64_t pairs, const PreferenceOut&, int threads);                               \
  /* the same of single responses, each desirable or not */                                                              \
  void unpaired_loss(const PreferenceCall&, const PreferenceSide&, const LossFlags& desirable, const PreferenceRest&,    \
                     int64_t rows, const PreferenceOut&, int threads);                                                   \
  /* groups of candidates in an order → the loss, its metrics and its gradient; the form is known */                     \
  void ranked_loss(const RankedCall&, const RankedGroups&, const RankedOut&, int threads);                               \
  /* the recurrence of each row into the outputs whose pointers are not null; the advantages whitened if asked for */    \
  void affine_scan(const ScanIn&, const ScanOut&, const Whiten&, int threads);                                           \
  /* the advantage of each sample over its group, and what the groups are like */                                        \
  void group_advantage(const GroupIn&, const GroupOptions&, const GroupOut&, int threads);                               \
  /* x·weightᵀ + bias; a row of it has the same bits whatever the other rows and the threads */                          \
  void linear(const LinearIn&, const LinearOut&, int threads);                                                           \
  /* packed queries over keys and values in pages → out [tokens, heads, v.width] of their dtype, contiguous */           \
  void paged_attention(const AttentionIn&, void* out, int threads);                                                      \
  /* logits and options → a token a row, its log-probs, the kept mass and the entropy */                                 \
  void sample(const Logits&, const SampleOptions&, const SampleEdits&, const SampleOut&, int threads);                   \
  /* a sum over every byte as float32 vectors: what one read costs */                                                    \
  double read_sum(const void* data, size_t bytes, int threads);                                                          \
  }
RLFAST_ISAS(RLFAST_DECLARE)
#undef RLFAST_DECLARE

enum class Isa : int {
#define RLFAST_NAME(isa) isa,
  RLFAST_ISAS(RLFAST_NAME)
#undef RLFAST_NAME
};

int isa_count();
const char* isa_name(Isa isa);

// Whether this processor runs it.
bool isa_usable(Isa isa);

// The one of that name; false if it was not compiled or this processor does not run it.
bool isa_from_name(const char* name, Isa* isa);

// The kernels of one instruction set.
struct Kernels {
  decltype(&baseline::token_logps_forward) token_logps_forward;
  decltype(&baseline::token_logps_backward) token_logps_backward;
  decltype(&baseline::linear_token_logps_forward) linear_token_logps_forward;
  decltype(&baseline::linear_token_logps_backward) linear_token_logps_backward;
  decltype(&baseline::divergence_forward) divergence_forward;
  decltype(&baseline::divergence_backward) divergence_backward;
  decltype(&baseline::linear_divergence_forward) linear_divergence_forward;
  decltype(&baseline::linear_divergence_backward) linear_divergence_backward;
  decltype(&baseline::token_loss) token_loss;
  decltype(&baseline::pair_loss) pair_loss;
  decltype(&baseline::unpaired_loss) unpaired_loss;
  decltype(&baseline::ranked_loss) ranked_loss;
  decltype(&baseline::affine_scan) affine_scan;
  decltype(&baseline::group_advantage) group_advantage;
  decltype(&baseline::linear) linear;
  decltype(&baseline::paged_attention) paged_attention;
  decltype(&baseline::sample) sample;
  decltype(&baseline::read_sum) read_sum;
};

const Kernels& kernels(Isa isa);

}  // namespace rlfast
