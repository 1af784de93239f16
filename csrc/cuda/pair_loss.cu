// pair_loss on a GPU: preference.cuh over pairs. rlfast/ops/pair_loss.py has the equations.
#include "pair_loss.h"

#include "preference.cuh"

namespace rlfast::cuda {

namespace {

enum PairNumber {
#define RLFAST_NUMBER(name, Hyper) kPair_##name,
  RLFAST_PAIR_FORMULAS(RLFAST_NUMBER)
#undef RLFAST_NUMBER
};

#define RLFAST_NAME(name, Hyper) #name,
constexpr const char* kPairNames[] = {RLFAST_PAIR_FORMULAS(RLFAST_NAME)};
#undef RLFAST_NAME

struct Pairs {
  // Means are over the pairs that are used.
  enum {
    kLoss,
    kUsed,
    kChosenReward,
    kRejectedReward,
    kBetter,
    kChosenLogp,
    kRejectedLogp,
    kChosenLength,
    kRejectedLength,
    kSlots
  };

  // All of a grid take the same branch: a kernel for each formula would be 34 kernels.
  static RLFAST_DEVICE Linked<2> link(const Term& t, const Score (&s)[2], const Row<2>& row) {
    const Response &w = row.response[0], &l = row.response[1];
    formulas::Pair<float> pair = {s[0].value, s[1].value, w.length, l.length, row.margin, row.extra, row.shared};
    formulas::PairLoss<float> found = {};
    switch (t.link) {
#define RLFAST_CASE(name, Hyper)                                                  \
  case kPair_##name:                                                              \
    found = formulas::name<float>(pair, hyper_of<formulas::Hyper>(t.link_hyper)); \
    break;
      RLFAST_PAIR_FORMULAS(RLFAST_CASE)
#undef RLFAST_CASE
    }
    return {found.value, {found.d_chosen, found.d_rejected}};
  }

  static RLFAST_DEVICE void add(const Row<2>& row, double (&sum)[kSlots]) {
    const Response &w = row.response[0], &l = row.response[1];
    sum[kLoss] += row.loss;
    sum[kUsed] += 1.0;
    sum[kChosenReward] += row.reward[0], sum[kRejectedReward] += row.reward[1];
    sum[kBetter] += row.reward[0] > row.reward[1];
    sum[kChosenLogp] += w.logp, sum[kRejectedLogp] += l.logp;
    sum[kChosenLength] += w.length, sum[kRejectedLength] += l.length;
  }

  static RLFAST_DEVICE float finish(const double (&sum)[kSlots], double scale, float* metrics) {
    double each = 1.0 / max(sum[kUsed], 1.0);
    PairMetrics m;
    m.loss = float(scale * sum[kLoss]);
    m.pairs = float(sum[kUsed]);
    m.chosen_reward = float(each * sum[kChosenReward]), m.rejected_reward = float(each * sum[kRejectedReward]);
    m.accuracy = float(each * sum[kBetter]);
    m.reward_margin = float(each * (sum[kChosenReward] - sum[kRejectedReward]));
    m.chosen_logp = float(each * sum[kChosenLogp]), m.rejected_logp = float(each * sum[kRejectedLogp]);
    m.chosen_length = float(each * sum[kChosenLength]), m.rejected_length = float(each * sum[kRejectedLength]);
    memcpy(metrics, &m, sizeof m);
    return m.loss;
  }
};

__global__ void __launch_bounds__(kLossThreads, 2) pair_loss_kernel(const Preference<2> a) { run<Pairs>(a); }

}  // namespace

int64_t pair_loss_scratch(int64_t pairs, bool tokens) { return pieces_of(pairs, tokens) * Pairs::kSlots; }

void pair_loss(const PreferenceCall& call, const PreferenceSide& chosen, const PreferenceSide& rejected,
               const PreferenceRest& rest, int64_t pairs, const PreferenceOut& out, double* scratch, unsigned* finished,
               int device, void* stream) {
  OnDevice guard(device);
  Preference<2> a = preference_of<2>(call, kPairNames, {chosen, rejected}, rest, pairs, out, scratch, finished);
  int grid = int(std::max<int64_t>(a.pieces, 1));
  RLFAST_LAUNCH(pair_loss_kernel, grid, kLossThreads, shared_bytes(Pairs::kSlots), static_cast<cudaStream_t>(stream),
                a);
  check(cudaGetLastError(), "pair_loss");
}

}  // namespace rlfast::cuda
