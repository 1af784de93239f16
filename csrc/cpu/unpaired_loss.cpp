// unpaired_loss on the CPU: sums of the tokens → scores → links → Σ, and the gradient back, a tile of responses at a time;
// csrc/cpu/pair_loss.cpp says how the work is shared out.
#include <memory>
#include <vector>

#include "kernels.h"
#include "preference_tile.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

namespace {

struct SingleTile {
  ResponseTile responses;
  alignas(64) float desirable[kResponses], extra[kResponses], shared[kResponses], weights[kResponses];
  alignas(64) float loss[kResponses];
  int64_t shortest[kResponses] = {};  // no response has a tail
};

using LinkStage = void (*)(SingleTile&, int64_t padded, float weight, const float* hyper);

// loss += weight·ℓ, gradient += weight·∂ℓ/∂s·∂s/∂S
template <class Hyper, formulas::SingleLoss<formulas::V> (*formula)(const formulas::Single<formulas::V>&, const Hyper&)>
void single_stage(SingleTile& t, int64_t padded, float weight, const float* numbers) {
  using formulas::V;
  const Hyper h = hyper_of<Hyper>(numbers);
  const F c = set1(weight);
  ResponseTile& r = t.responses;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const F s = load(r.score + i);
    const auto single = formula({V(s), V(load(t.desirable + i)), V(load(t.extra + i)), V(load(t.shared + i))}, h);
    store(t.loss + i, add(load(t.loss + i), mul(c, select(equal(s, s), single.value.x, s))));
    store(r.gradient + i, add(load(r.gradient + i), mul(c, mul(load(r.slope + i), single.d_score.x))));
  }
}

#define RLFAST_LINK(formula, Hyper) {#formula, single_stage<formulas::Hyper, formulas::formula<formulas::V>>},
constexpr NamedStage<LinkStage> kSingles[] = {RLFAST_SINGLE_FORMULAS(RLFAST_LINK)};
#undef RLFAST_LINK

// Of the desirable and of the others.
struct SinglePart {
  double loss = 0, reward[2] = {}, logp[2] = {};
  int64_t count[2] = {};

  void operator+=(const SinglePart& b) {
    loss += b.loss;
    for (int i = 0; i < 2; ++i) reward[i] += b.reward[i], logp[i] += b.logp[i], count[i] += b.count[i];
  }
};

class SingleCall {
public:
  SingleCall(const PreferenceCall& call, const PreferenceSide& side, const LossFlags& desirable,
             const PreferenceRest& rest, int64_t rows, const PreferenceOut& out)
      : call_(call),
        side_(side),
        desirable_(desirable),
        rest_(rest),
        out_(out),
        units_(side, rows),
        scale_(call.factor / preference_denominator(call, rest, rows)),
        parts_(static_cast<size_t>(units_.count)) {
    for (int k = 0; k < call.count; ++k) {
      scores_[k] = stage_of(kScores, call.terms[k].score);
      links_[k] = k ? stage_of(kSingles, call.terms[k].link) : nullptr;
    }
  }

  void run(int threads) {
    if (units_.serial) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      std::unique_ptr<SingleTile> tile(new SingleTile);
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < units_.count; ++unit) parts_[unit] = of_unit(unit, *tile);
      if (units_.streamed) stream_fence();
    }
    finish();
  }

private:
  SinglePart of_unit(int64_t unit, SingleTile& t) const {
    const int64_t begin = unit * units_.each, n = units_.size(unit);
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    load_field(rest_.extra, begin, n, padded, 0.0f, t.extra);
    load_field(rest_.shared, begin, n, padded, 0.0f, t.shared);
    load_field(rest_.weights, begin, n, n, 1.0f, t.weights);
    std::fill(t.weights + n, t.weights + padded, 0.0f);  // what is beyond the end does not count
    std::fill_n(t.desirable, padded, 0.0f);
    for (int64_t i = 0; i < n; ++i) t.desirable[i] = desirable_.data[(begin + i) * desirable_.stride] ? 1.0f : 0.0f;
    load_side(side_, begin, n, padded, t.shortest, 1.0f, t.responses);
    SinglePart part = rewarded(begin, n, padded, t);
    std::fill_n(t.loss, padded, 0.0f), std::fill_n(t.responses.gradient, padded, 0.0f);
    for (int k = 1; k < call_.count; ++k) {
      scores_[k](t.responses, padded, call_.terms[k].mean, call_.terms[k].score_hyper);
      links_[k](t, padded, call_.terms[k].weight, call_.terms[k].link_hyper);
    }
    part.loss = weigh(padded, t.weights, static_cast<float>(scale_), t.loss, {&t.responses});
    if (out_.losses) std::copy_n(t.loss, n, out_.losses + begin);
    store_side(side_, begin, n, t.responses.gradient, t.shortest, 1.0f, units_.streamed, out_.d_logp[0]);
    return part;
  }

  // The first term: the rewards, and the sums of the metrics.
  SinglePart rewarded(int64_t begin, int64_t n, int64_t padded, SingleTile& t) const {
    ResponseTile& r = t.responses;
    scores_[0](r, padded, call_.terms[0].mean, call_.terms[0].score_hyper);
    const F scale = set1(call_.terms[0].weight), zero = set1(0.0f);
    SinglePart part;
    D reward[2] = {zero_double(), zero_double()}, logp[2] = {zero_double(), zero_double()};
    N counts[2] = {zero_count(), zero_count()};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const M m = unequal(load(t.weights + i), zero), good = unequal(load(t.desirable + i), zero);
      const M kinds[2] = {both(m, good), except(m, good)};
      const F x = mul(scale, load(r.score + i));
      for (int kind = 0; kind < 2; ++kind) {
        reward[kind] = accumulate(reward[kind], only(kinds[kind], x));
        logp[kind] = accumulate(logp[kind], only(kinds[kind], load(r.logp + i)));
        counts[kind] = tally(counts[kind], kinds[kind]);
      }
      store(r.score + i, x);
    }
    for (int kind = 0; kind < 2; ++kind) {
      part.reward[kind] = reduce_add(reward[kind]), part.logp[kind] = reduce_add(logp[kind]);
      part.count[kind] = reduce_add(counts[kind]);
    }
    if (out_.rewards[0]) std::copy_n(r.score, n, out_.rewards[0] + begin);
    return part;
  }

  void finish() const {
    SinglePart all;
    for (const SinglePart& part : parts_) all += part;
    const auto mean = [&](const double (&sum)[2], int kind) {
      return static_cast<float>(sum[kind] / static_cast<double>(std::max<int64_t>(all.count[kind], 1)));
    };
    const SingleMetrics m = {static_cast<float>(all.loss * scale_),
                             static_cast<float>(all.count[0]),
                             static_cast<float>(all.count[1]),
                             mean(all.reward, 0),
                             mean(all.reward, 1),
                             mean(all.logp, 0),
                             mean(all.logp, 1)};
    std::memcpy(out_.metrics, &m, sizeof m);
    *out_.loss = m.loss;
  }

  const PreferenceCall& call_;
  const PreferenceSide& side_;
  const LossFlags& desirable_;
  const PreferenceRest& rest_;
  const PreferenceOut& out_;
  Units units_;
  double scale_;
  ScoreStage scores_[kMostTerms];
  LinkStage links_[kMostTerms];
  std::vector<SinglePart> parts_;
};

}  // namespace

void unpaired_loss(const PreferenceCall& call, const PreferenceSide& side, const LossFlags& desirable,
                   const PreferenceRest& rest, int64_t rows, const PreferenceOut& out, int threads) {
  SingleCall(call, side, desirable, rest, rows, out).run(threads);
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
