// pair_loss on the CPU: sums of the tokens → scores → links → Σ, and the gradient back, a tile of pairs at a time.
//
// A unit of work is some pairs whose tokens stay in cache between the sums and the gradient; what the units have added up is
// combined in their order, so that the bits do not depend on the threads. Sums that are given are pairs of one token.
#include <memory>
#include <vector>

#include "kernels.h"
#include "preference_tile.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

namespace {

struct PairTile {
  ResponseTile chosen, rejected;
  alignas(64) float margin[kResponses], extra[kResponses], shared[kResponses], weights[kResponses];
  alignas(64) float loss[kResponses];
  int64_t shortest[kResponses] = {};  // the length of the shorter response
};

using LinkStage = void (*)(PairTile&, int64_t padded, float weight, const float* hyper);

// loss += weight·ℓ, gradient += weight·∂ℓ/∂s·∂s/∂S
template <class Hyper, formulas::PairLoss<formulas::V> (*formula)(const formulas::Pair<formulas::V>&, const Hyper&)>
void link_stage(PairTile& t, int64_t padded, float weight, const float* numbers) {
  using formulas::V;
  const Hyper h = hyper_of<Hyper>(numbers);
  const F c = set1(weight);
  ResponseTile &w = t.chosen, &l = t.rejected;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const F s_w = load(w.score + i), s_l = load(l.score + i);
    const auto pair = formula({V(s_w), V(s_l), V(load(w.length + i)), V(load(l.length + i)), V(load(t.margin + i)),
                               V(load(t.extra + i)), V(load(t.shared + i))},
                              h);
    // a formula's minimum and maximum may drop a NaN
    const F value = select(both(equal(s_w, s_w), equal(s_l, s_l)), pair.value.x, add(s_w, s_l));
    store(t.loss + i, add(load(t.loss + i), mul(c, value)));
    const F d_w = mul(load(w.slope + i), pair.d_chosen.x), d_l = mul(load(l.slope + i), pair.d_rejected.x);
    store(w.gradient + i, add(load(w.gradient + i), mul(c, d_w)));
    store(l.gradient + i, add(load(l.gradient + i), mul(c, d_l)));
  }
}

#define RLFAST_LINK(formula, Hyper) {#formula, link_stage<formulas::Hyper, formulas::formula<formulas::V>>},
constexpr NamedStage<LinkStage> kLinks[] = {RLFAST_PAIR_FORMULAS(RLFAST_LINK)};
#undef RLFAST_LINK

enum PairTotal {
  kLoss,
  kChosenReward,
  kRejectedReward,
  kChosenLogp,
  kRejectedLogp,
  kChosenLength,
  kRejectedLength,
  kTotals
};

struct PairPart {
  double of[kTotals] = {};
  int64_t pairs = 0, better = 0;

  void operator+=(const PairPart& b) {
    for (int i = 0; i < kTotals; ++i) of[i] += b.of[i];
    pairs += b.pairs, better += b.better;
  }
};

class PairCall {
public:
  PairCall(const PreferenceCall& call, const PreferenceSide& chosen, const PreferenceSide& rejected,
           const PreferenceRest& rest, int64_t pairs, const PreferenceOut& out)
      : call_(call),
        sides_{&chosen, &rejected},
        rest_(rest),
        out_(out),
        units_(chosen, pairs),
        scale_(call.factor / preference_denominator(call, rest, pairs)),
        parts_(static_cast<size_t>(units_.count)) {
    for (int k = 0; k < call.count; ++k) {
      scores_[k] = stage_of(kScores, call.terms[k].score);
      links_[k] = k ? stage_of(kLinks, call.terms[k].link) : nullptr;
    }
  }

  void run(int threads) {
    if (units_.serial) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      std::unique_ptr<PairTile> tile(new PairTile);
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < units_.count; ++unit) parts_[unit] = of_unit(unit, *tile);
      if (units_.streamed) stream_fence();
    }
    finish();
  }

private:
  PairPart of_unit(int64_t unit, PairTile& t) const {
    const int64_t begin = unit * units_.each, n = units_.size(unit);
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    open(begin, n, padded, t);
    PairPart part = rewarded(begin, n, padded, t);
    std::fill_n(t.loss, padded, 0.0f);
    std::fill_n(t.chosen.gradient, padded, 0.0f), std::fill_n(t.rejected.gradient, padded, 0.0f);
    for (int k = 1; k < call_.count; ++k) {
      score(k, padded, t);
      links_[k](t, padded, call_.terms[k].weight, call_.terms[k].link_hyper);
    }
    part.of[kLoss] = weigh(padded, t.weights, static_cast<float>(scale_), t.loss, {&t.chosen, &t.rejected});
    if (out_.losses) std::copy_n(t.loss, n, out_.losses + begin);
    const bool streamed = units_.streamed;
    store_side(*sides_[0], begin, n, t.chosen.gradient, t.shortest, call_.tail, streamed, out_.d_logp[0]);
    store_side(*sides_[1], begin, n, t.rejected.gradient, t.shortest, call_.tail, streamed, out_.d_logp[1]);
    return part;
  }

  void score(int k, int64_t padded, PairTile& t) const {
    const PreferenceTerm& term = call_.terms[k];
    scores_[k](t.chosen, padded, term.mean, term.score_hyper);
    scores_[k](t.rejected, padded, term.mean, term.score_hyper);
  }

  void open(int64_t begin, int64_t n, int64_t padded, PairTile& t) const {
    load_field(rest_.margin, begin, n, padded, 0.0f, t.margin);
    load_field(rest_.extra, begin, n, padded, 0.0f, t.extra);
    load_field(rest_.shared, begin, n, padded, 0.0f, t.shared);
    load_field(rest_.weights, begin, n, n, 1.0f, t.weights);
    std::fill(t.weights + n, t.weights + padded, 0.0f);  // what is beyond the end does not count
    const bool tail = call_.tail != 1.0f && sides_[0]->tokens;
    for (int64_t i = 0; tail && i < n; ++i)
      t.shortest[i] = std::min(counted(*sides_[0], begin + i), counted(*sides_[1], begin + i));
    load_side(*sides_[0], begin, n, padded, t.shortest, call_.tail, t.chosen);
    load_side(*sides_[1], begin, n, padded, t.shortest, call_.tail, t.rejected);
  }

  // The first term: the rewards, and the sums of the metrics.
  PairPart rewarded(int64_t begin, int64_t n, int64_t padded, PairTile& t) const {
    score(0, padded, t);
    const F scale = set1(call_.terms[0].weight);
    PairPart part;
    D of[kTotals];
    for (D& d : of) d = zero_double();
    N pairs = zero_count(), better = zero_count();
    const auto take = [&](PairTotal which, M m, F x) { of[which] = accumulate(of[which], only(m, x)); };
    for (int64_t i = 0; i < padded; i += kLanes) {
      const M m = unequal(load(t.weights + i), set1(0.0f));
      const F w = mul(scale, load(t.chosen.score + i)), l = mul(scale, load(t.rejected.score + i));
      take(kChosenReward, m, w), take(kRejectedReward, m, l);
      take(kChosenLogp, m, load(t.chosen.logp + i)), take(kRejectedLogp, m, load(t.rejected.logp + i));
      take(kChosenLength, m, load(t.chosen.length + i)), take(kRejectedLength, m, load(t.rejected.length + i));
      pairs = tally(pairs, m), better = tally(better, both(m, greater(w, l)));
      store(t.chosen.score + i, w), store(t.rejected.score + i, l);
    }
    for (int k = 0; k < kTotals; ++k) part.of[k] = reduce_add(of[k]);
    part.pairs = reduce_add(pairs), part.better = reduce_add(better);
    if (out_.rewards[0]) {
      std::copy_n(t.chosen.score, n, out_.rewards[0] + begin),
          std::copy_n(t.rejected.score, n, out_.rewards[1] + begin);
    }
    return part;
  }

  void finish() const {
    PairPart all;
    for (const PairPart& part : parts_) all += part;
    const double n = static_cast<double>(std::max<int64_t>(all.pairs, 1));
    const auto mean = [&](PairTotal which) { return static_cast<float>(all.of[which] / n); };
    const float loss = static_cast<float>(all.of[kLoss] * scale_);
    const PairMetrics m = {loss,
                           static_cast<float>(all.pairs),
                           mean(kChosenReward),
                           mean(kRejectedReward),
                           static_cast<float>(static_cast<double>(all.better) / n),
                           static_cast<float>((all.of[kChosenReward] - all.of[kRejectedReward]) / n),
                           mean(kChosenLogp),
                           mean(kRejectedLogp),
                           mean(kChosenLength),
                           mean(kRejectedLength)};
    std::memcpy(out_.metrics, &m, sizeof m);
    *out_.loss = loss;
  }

  const PreferenceCall& call_;
  const PreferenceSide* sides_[2];
  const PreferenceRest& rest_;
  const PreferenceOut& out_;
  Units units_;
  double scale_;
  ScoreStage scores_[kMostTerms];
  LinkStage links_[kMostTerms];
  std::vector<PairPart> parts_;
};

}  // namespace

void pair_loss(const PreferenceCall& call, const PreferenceSide& chosen, const PreferenceSide& rejected,
               const PreferenceRest& rest, int64_t pairs, const PreferenceOut& out, int threads) {
  PairCall(call, chosen, rejected, rest, pairs, out).run(threads);
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
