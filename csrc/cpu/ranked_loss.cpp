// ranked_loss on the CPU: as many groups as a vector has lanes, their candidates in order → the form → Σ, and the gradient
// back to where each candidate came from.
//
// A unit of work is some groups; what the units have added up is combined in their order, and no group's arithmetic sees
// another's, so that the bits do not depend on the threads.
#include "../rlfast/ranked_loss.h"

#include "kernels.h"
#include "ranked_forms.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

namespace {

constexpr int64_t kUnitGroups = 256;
// Below so many candidates a second thread costs more than it saves.
constexpr int64_t kSerialCandidates = 1 << 12;
// Up to so many candidates a sort by insertion is the fastest.
constexpr int64_t kFew = 32;

float number_at(const LossField& f, int64_t i) {
  switch (f.dtype) {
    case DType::f32:
      return static_cast<const float*>(f.data)[i];
    case DType::bf16:
      return to_float(static_cast<const bf16*>(f.data)[i]);
    default:
      return to_float(static_cast<const f16*>(f.data)[i]);
  }
}

// Where a group is: element i of a field is at row·stride + (begin + i)·step, and of the gradient at `out` + i.
struct Place {
  int64_t row, begin, n, out;
  float of(const LossField& f, int64_t i, float missing) const {
    return f.data ? number_at(f, row * f.stride + (begin + i) * f.step) : missing;
  }
};

struct Candidate {
  float reward;
  int64_t at;
};

// The best first, equal ones as they came; a reward that is not a number comes last.
void sort_best_first(std::vector<Candidate>& c) {
  const auto key = [](const Candidate& a) {
    return a.reward == a.reward ? a.reward : -std::numeric_limits<float>::infinity();
  };
  const int64_t n = static_cast<int64_t>(c.size());
  if (n > kFew) {
    std::stable_sort(c.begin(), c.end(), [&](const Candidate& a, const Candidate& b) { return key(a) > key(b); });
    return;
  }
  for (int64_t i = 1; i < n; ++i) {
    const Candidate a = c[i];
    int64_t j = i;
    for (; j > 0 && key(a) > key(c[j - 1]); --j) c[j] = c[j - 1];
    c[j] = a;
  }
}

// As many groups as there are lanes; candidate i of lane l is at [i·kLanes + l].
struct GroupTile {
  Place places[kLanes];
  int64_t counts[kLanes], most;
  alignas(64) float count[kLanes], weights[kLanes], nll[kLanes];
  std::vector<float> score, x, slope, reward, d, scratch;
  std::vector<int64_t> at;
  std::vector<Candidate> candidates[kLanes];

  void resize(int64_t n) {
    most = n;
    for (auto* v : {&score, &x, &slope, &reward, &d}) v->assign(static_cast<size_t>(n * kLanes), 0.0f);
    scratch.resize(static_cast<size_t>(Ranked::kScratch * n * kLanes));
    at.assign(static_cast<size_t>(n * kLanes), 0);
  }
};

struct GroupPart {
  double loss = 0, best_reward = 0, best_score = 0;
  int64_t groups = 0, candidates = 0, pairs = 0, right = 0;

  void operator+=(const GroupPart& b) {
    loss += b.loss, best_reward += b.best_reward, best_score += b.best_score;
    groups += b.groups, candidates += b.candidates, pairs += b.pairs, right += b.right;
  }
};

class RankedRun {
public:
  RankedRun(const RankedCall& call, const RankedGroups& groups, const RankedOut& out)
      : call_(call), g_(groups), out_(out), form_(stage_of(kForms, call.form)) {
    const double n = g_.num_items ? static_cast<double>(*g_.num_items) : call.sum ? 1.0 : static_cast<double>(g_.rows);
    scale_ = call.factor / (n > 0 ? n : 1.0);
    parts_.resize(static_cast<size_t>((g_.rows + kUnitGroups - 1) / kUnitGroups));
  }

  void run(int threads) {
    const int64_t candidates = g_.cu_seqlens ? g_.cu_seqlens[g_.rows] - g_.cu_seqlens[0] : g_.rows * g_.size;
    if (candidates < kSerialCandidates) threads = 1;
    const int64_t units = static_cast<int64_t>(parts_.size());
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      GroupTile tile;
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t end = std::min(g_.rows, (unit + 1) * kUnitGroups);
        for (int64_t i = unit * kUnitGroups; i < end; i += kLanes)
          parts_[unit] += of_lanes(i, std::min<int64_t>(kLanes, end - i), tile);
      }
    }
    finish();
  }

private:
  Place place_of(int64_t group) const {
    if (!g_.cu_seqlens) return {group, 0, g_.size, group * g_.size};
    const int64_t begin = g_.cu_seqlens[group];
    return {0, begin, g_.cu_seqlens[group + 1] - begin, begin};
  }

  // The groups first … first + n, sorted; the lanes beyond them are empty.
  void open(int64_t first, int64_t n, GroupTile& t) const {
    int64_t most = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      auto& found = t.candidates[lane];
      found.clear();
      t.weights[lane] = 0.0f;
      if (lane < n) {
        const Place& p = t.places[lane] = place_of(first + lane);
        const uint8_t* flags = g_.mask.data ? g_.mask.data + p.row * g_.mask.stride + p.begin : nullptr;
        for (int64_t i = 0; i < p.n; ++i)
          if (!flags || flags[i]) found.push_back({p.of(g_.rewards, i, static_cast<float>(-i)), i});
        if (g_.rewards.data) sort_best_first(found);
        t.weights[lane] = g_.weights.data ? number_at(g_.weights, (first + lane) * g_.weights.stride) : 1.0f;
      }
      t.counts[lane] = static_cast<int64_t>(found.size()), t.count[lane] = static_cast<float>(found.size());
      if (t.counts[lane] < 2) t.weights[lane] = 0.0f;  // what has no order has no loss
      most = std::max(most, t.counts[lane]);
      const float others = t.count[lane] - 1.0f;
      t.nll[lane] = call_.nll_by_size != 0.0f ? call_.nll * (others * others) : call_.nll;
    }
    t.resize(most);
    for (int64_t lane = 0; lane < n; ++lane) {
      const Place& p = t.places[lane];
      for (int64_t k = 0; k < t.counts[lane]; ++k) {
        const int64_t i = t.candidates[lane][k].at, to = k * kLanes + lane;
        const float by = p.of(g_.divisor, i, 1.0f);
        t.at[to] = i, t.reward[to] = t.candidates[lane][k].reward, t.score[to] = p.of(g_.scores, i, 0.0f);
        t.slope[to] = call_.beta / by;
        t.x[to] = call_.beta * (t.score[to] - p.of(g_.ref_scores, i, 0.0f)) / by;
      }
    }
  }

  GroupPart of_lanes(int64_t first, int64_t n, GroupTile& t) const {
    open(first, n, t);
    if (!t.most) {
      close(first, n, t, set1(0.0f));
      return {};
    }
    const Ranked g = {t.most,     load(t.count),    t.x.data(), t.reward.data(),
                      t.d.data(), t.scratch.data(), call_.tau,  call_.top};
    alignas(64) float values[kLanes];
    form_(g, values);
    F value = load(values);
    if (call_.nll != 0.0f) value = sub(value, mul(load(t.nll), load(t.score.data())));
    const F weights = load(t.weights);
    F bad = set1(0.0f);  // a comparison may drop a NaN
    for (int64_t i = 0; i < t.most; ++i)
      for (const F y : {g.x_of(i), g.reward_of(i)}) bad = add(bad, only(unequal(y, y), y));
    const M used = unequal(weights, set1(0.0f));
    const F loss = only(used, mul(weights, add(value, bad)));  // not a product: what is left out may be infinite
    for (int64_t i = 0; i < t.most; ++i) {
      F d = mul(load(t.slope.data() + i * kLanes), load(t.d.data() + i * kLanes));
      if (i == 0 && call_.nll != 0.0f) d = sub(d, load(t.nll));
      const F by = mul(set1(static_cast<float>(scale_)), weights);
      store(t.d.data() + i * kLanes, only(used, mul(by, add(d, bad))));
    }
    close(first, n, t, loss);
    return measured(g, used, loss, t);
  }

  // The losses and the gradients of the groups.
  void close(int64_t first, int64_t n, const GroupTile& t, F loss) const {
    alignas(64) float losses[kLanes];
    store(losses, loss);
    for (int64_t lane = 0; lane < n; ++lane) {
      if (out_.losses) out_.losses[first + lane] = losses[lane];
      if (!out_.d_scores) continue;
      float* to = out_.d_scores + t.places[lane].out;
      std::fill_n(to, t.places[lane].n, 0.0f);
      for (int64_t k = 0; k < t.counts[lane]; ++k) to[t.at[k * kLanes + lane]] = t.d[k * kLanes + lane];
    }
  }

  GroupPart measured(const Ranked& g, M used, F loss, const GroupTile& t) const {
    N pairs = zero_count(), right = zero_count();
    for (int64_t i = 0; i < g.most; ++i) {
      for (int64_t j = i + 1; j < g.most; ++j) {
        const M better = both(both(used, g.valid(j)), greater(g.reward_of(i), g.reward_of(j)));
        pairs = tally(pairs, better), right = tally(right, both(better, greater(g.x_of(i), g.x_of(j))));
      }
    }
    GroupPart part;
    part.loss = reduce_add(loss), part.pairs = reduce_add(pairs), part.right = reduce_add(right);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (t.weights[lane] == 0.0f) continue;
      ++part.groups, part.candidates += t.counts[lane];
      part.best_score += t.x[lane], part.best_reward += g_.rewards.data ? t.reward[lane] : 0.0f;
    }
    return part;
  }

  void finish() const {
    GroupPart all;
    for (const GroupPart& part : parts_) all += part;
    const double n = static_cast<double>(std::max<int64_t>(all.groups, 1));
    const double pairs = static_cast<double>(std::max<int64_t>(all.pairs, 1));
    *out_.loss = static_cast<float>(all.loss * scale_);
    *out_.metrics = {*out_.loss,
                     static_cast<float>(all.groups),
                     static_cast<float>(all.candidates),
                     static_cast<float>(static_cast<double>(all.right) / pairs),
                     static_cast<float>(all.best_reward / n),
                     static_cast<float>(all.best_score / n)};
  }

  const RankedCall& call_;
  const RankedGroups& g_;
  const RankedOut& out_;
  FormStage form_;
  double scale_;
  std::vector<GroupPart> parts_;
};

}  // namespace

void ranked_loss(const RankedCall& call, const RankedGroups& groups, const RankedOut& out, int threads) {
  RankedRun(call, groups, out).run(threads);
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
