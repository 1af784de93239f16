// unpaired_loss on a GPU: preference.cuh over single responses. rlfast/ops/unpaired_loss.py has the equations.
#include "unpaired_loss.h"

#include "preference.cuh"

namespace rlfast::cuda {

namespace {

enum SingleNumber {
#define RLFAST_NUMBER(name, Hyper) kSingle_##name,
  RLFAST_SINGLE_FORMULAS(RLFAST_NUMBER)
#undef RLFAST_NUMBER
};

#define RLFAST_NAME(name, Hyper) #name,
constexpr const char* kSingleNames[] = {RLFAST_SINGLE_FORMULAS(RLFAST_NAME)};
#undef RLFAST_NAME

struct Singles {
  // Means are over the responses that are used; `kGood` of the desirable, then of the others.
  enum { kLoss, kGood, kBad, kGoodReward, kBadReward, kGoodLogp, kBadLogp, kSlots };

  static RLFAST_DEVICE Linked<1> link(const Term& t, const Score (&s)[1], const Row<1>& row) {
    formulas::Single<float> single = {s[0].value, row.desirable ? 1.0f : 0.0f, row.extra, row.shared};
    formulas::SingleLoss<float> found = {};
    switch (t.link) {
#define RLFAST_CASE(name, Hyper)                                                    \
  case kSingle_##name:                                                              \
    found = formulas::name<float>(single, hyper_of<formulas::Hyper>(t.link_hyper)); \
    break;
      RLFAST_SINGLE_FORMULAS(RLFAST_CASE)
#undef RLFAST_CASE
    }
    return {found.value, {found.d_score}};
  }

  static RLFAST_DEVICE void add(const Row<1>& row, double (&sum)[kSlots]) {
    sum[kLoss] += row.loss;
    if (row.desirable)
      sum[kGood] += 1.0, sum[kGoodReward] += row.reward[0], sum[kGoodLogp] += row.response[0].logp;
    else
      sum[kBad] += 1.0, sum[kBadReward] += row.reward[0], sum[kBadLogp] += row.response[0].logp;
  }

  static RLFAST_DEVICE float finish(const double (&sum)[kSlots], double scale, float* metrics) {
    double good = 1.0 / max(sum[kGood], 1.0), bad = 1.0 / max(sum[kBad], 1.0);
    SingleMetrics m;
    m.loss = float(scale * sum[kLoss]);
    m.desirable = float(sum[kGood]), m.undesirable = float(sum[kBad]);
    m.desirable_reward = float(good * sum[kGoodReward]), m.undesirable_reward = float(bad * sum[kBadReward]);
    m.desirable_logp = float(good * sum[kGoodLogp]), m.undesirable_logp = float(bad * sum[kBadLogp]);
    memcpy(metrics, &m, sizeof m);
    return m.loss;
  }
};

__global__ void __launch_bounds__(kLossThreads, 2) unpaired_loss_kernel(const Preference<1> a) { run<Singles>(a); }

}  // namespace

int64_t unpaired_loss_scratch(int64_t rows, bool tokens) { return pieces_of(rows, tokens) * Singles::kSlots; }

void unpaired_loss(const PreferenceCall& call, const PreferenceSide& side, const LossFlags& desirable,
                   const PreferenceRest& rest, int64_t rows, const PreferenceOut& out, double* scratch,
                   unsigned* finished, int device, void* stream) {
  OnDevice guard(device);
  Preference<1> a = preference_of<1>(call, kSingleNames, {side}, rest, rows, out, scratch, finished);
  a.desirable = desirable;
  int grid = int(std::max<int64_t>(a.pieces, 1));
  RLFAST_LAUNCH(unpaired_loss_kernel, grid, kLossThreads, shared_bytes(Singles::kSlots),
                static_cast<cudaStream_t>(stream), a);
  check(cudaGetLastError(), "unpaired_loss");
}

}  // namespace rlfast::cuda
