// token_loss on the CPU: one read of the fields, one write of the gradient.
//
// Tokens are walked in tiles that stay in L1; only the surrogate and the KL know a formula. An objective of whole sequences
// walks a sequence up to three times more, in cache: for ρ of the sequence, for its log-ratio, and to pull its gradient back.
// A unit of work is a piece of a row, or some whole rows; what the units have added up is combined in their order, so that
// the bits do not depend on the threads.
#include <memory>
#include <vector>

#include "kernels.h"
#include "loss_stages.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

namespace {

// Tokens of a unit, or more where a sequence is longer and cannot be cut.
constexpr int64_t kUnit = 4096;
// Below so many tokens a second thread costs more than it saves.
constexpr int64_t kSerial = 1 << 13;
// A gradient that is larger is written past the caches: it saves the read before a write.
constexpr int64_t kStreamBytes = 2 << 20;

using SurrogateTile = double (*)(Tile&, const Sequence&, const Objective&, Sums&, float*, bool);
struct SurrogateTiles {
  SurrogateTile token, sequence;
};
using KlTile = void (*)(Tile&, const Sequence&, const Objective&, Sums&);

template <class Stage>
struct Named {
  const char* name;
  Stage stage;
};

// of the token's own r, and of its sequence's
#define RLFAST_SURROGATE(formula, Hyper)                                    \
  {#formula,                                                                \
   {surrogate_tile<false, formulas::Hyper, formulas::formula<formulas::V>>, \
    surrogate_tile<true, formulas::Hyper, formulas::formula<formulas::V>>}},
constexpr Named<SurrogateTiles> kSurrogates[] = {RLFAST_SURROGATE_FORMULAS(RLFAST_SURROGATE)};
#undef RLFAST_SURROGATE

#define RLFAST_ESTIMATOR(formula, Hyper) {#formula, kl_tile<formulas::formula<formulas::V>>},
constexpr Named<KlTile> kEstimators[] = {RLFAST_KL_FORMULAS(RLFAST_ESTIMATOR)};
#undef RLFAST_ESTIMATOR

template <class Stage, size_t kCount>
const Stage* find(const Named<Stage> (&table)[kCount], const char* name) {
  for (const auto& row : table)
    if (!std::strcmp(row.name, name)) return &row.stage;
  return nullptr;
}

// What a unit has added up.
struct Part {
  double policy = 0, kl_part = 0, entropy_part = 0, kl = 0, entropy = 0;
  double x = 0, k3 = 0, ratio = 0, weight = 0, weight_sq = 0, drift = 0;
  float ratio_max = 0, drift_max = 0;
  int64_t tokens = 0, sequences = 0, low = 0, high = 0, used = 0, kept = 0;

  void operator+=(const Part& b) {
    policy += b.policy, kl_part += b.kl_part, entropy_part += b.entropy_part, kl += b.kl, entropy += b.entropy;
    x += b.x, k3 += b.k3, ratio += b.ratio, weight += b.weight, weight_sq += b.weight_sq, drift += b.drift;
    ratio_max = std::max(ratio_max, b.ratio_max), drift_max = std::max(drift_max, b.drift_max);
    tokens += b.tokens, sequences += b.sequences, low += b.low, high += b.high, used += b.used, kept += b.kept;
  }
};

Objective resolved(const LossObjective& given, const LossFields& f) {
  const LossPlan& p = given.plan;
  const LossSettings& s = given.settings;
  Objective o{};
  o.plan = p, o.s = s, o.hyper = given.hyper, o.kl_hyper = given.kl_hyper;
  o.beta = s.beta * (f.coefs ? f.coefs[0] : 1.0f);
  o.entropy_coef = s.entropy_coef * (f.coefs ? f.coefs[1] : 1.0f);
  o.rollout = f.rollout_logp.data, o.keep = f.keep.data, o.weights = f.weights.data, o.entropy = f.entropy.data;
  o.kl = *given.estimator;
  o.bounded = s.inner_low > -HUGE_VALF || s.inner_high < HUGE_VALF;
  o.unit_bounded = s.unit_low > -HUGE_VALF || s.unit_high < HUGE_VALF;
  const bool corrected = p.weight || p.gate;
  o.rollout |= corrected;
  o.applied = corrected && !p.weight_in_ratio;
  o.multiplied = corrected || o.keep || o.weights || s.off_policy < HUGE_VALF;
  o.sequence = p.unit != kUnitToken;
  o.pulled_back = p.unit == kUnitSeqMean || p.unit == kUnitSeqSum;
  o.scale = o.entropy_scale = 1.0f;
  return o;
}

// n of the reduction, 1 where it would be 0.
double denominator(const Objective& o, const LossFields& f, int64_t tokens, int64_t sequences) {
  double n = f.num_items                   ? static_cast<double>(*f.num_items)
             : o.plan.reduce == kTokenSum  ? 1.0
             : o.plan.reduce == kTokenMean ? static_cast<double>(tokens)
             : o.plan.count_empty          ? static_cast<double>(f.rows)
                                           : static_cast<double>(sequences);
  if (o.plan.reduce == kSeqSumOverMaxLen) n *= o.s.max_len;
  return n > 0 ? n : 1.0;
}

// One call: what all threads read.
class Call {
public:
  Call(const LossObjective& given, const LossFields& f, const LossOut& out)
      : f_(f),
        out_(out),
        o_(resolved(given, f)),
        surrogate_(o_.sequence ? find(kSurrogates, given.surrogate)->sequence
                               : find(kSurrogates, given.surrogate)->token),
        estimator_(o_.kl ? *find(kEstimators, given.estimator) : nullptr),
        by_row_(row_wise(given.plan, given.settings)),
        streamed_(tokens_in_all() * static_cast<int64_t>(sizeof(float)) > kStreamBytes),
        counts_(static_cast<size_t>(f.rows)) {
    o_.entropy |= out.dentropy != nullptr;
    const int64_t mean = f.rows ? tokens_in_all() / f.rows : 0;
    pieces_ = by_row_ || f.cu_seqlens || mean <= kUnit ? 1 : (mean + kUnit - 1) / kUnit;
    rows_ = std::max<int64_t>(1, mean ? kUnit / mean : kUnit);
    const int64_t units = pieces_ > 1 ? f.rows * pieces_ : (f.rows + rows_ - 1) / rows_;
    parts_.resize(static_cast<size_t>(units));
  }

  void run(int threads) {
    if (tokens_in_all() < kSerial) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < f_.rows; ++row) counts_[row] = counted(span(row));
#pragma omp single
      fold();
      std::unique_ptr<Worker> w(new Worker);
#pragma omp for schedule(dynamic, 2)
      for (int64_t unit = 0; unit < static_cast<int64_t>(parts_.size()); ++unit) parts_[unit] = of_unit(unit, *w);
      if (streamed_) stream_fence();
    }
    finish();
  }

private:
  // What one thread needs beside the fields.
  struct Worker {
    Tile tile;
    Sums sums;
    std::vector<float> part;  // the gradient of a sequence before it is pulled back
  };

  int64_t tokens_in_all() const { return f_.cu_seqlens ? f_.length : f_.rows * f_.length; }

  Span span(int64_t row) const {
    if (!f_.cu_seqlens) return {row, 0, f_.length};
    return {0, f_.cu_seqlens[row], f_.cu_seqlens[row + 1] - f_.cu_seqlens[row]};
  }

  int64_t counted(const Span& s) const {
    if (!f_.mask.data) return s.n;
    const uint8_t* at = f_.mask.data + s.row * f_.mask.stride + s.begin;
    int64_t n = 0, i = 0;
    for (; i + kLanes <= s.n; i += kLanes) n += count(load_flags(at + i));
    for (; i < s.n; ++i) n += at[i] != 0;
    return n;
  }

  // Where n is known before the tokens are seen, the gradients come out scaled.
  void fold() {
    int64_t tokens = 0, sequences = 0;
    for (int64_t n : counts_) tokens += n, sequences += n > 0;
    folded_ = !o_.plan.gate_masks;
    entropy_folded_ = folded_ && !(o_.plan.entropy_mean && o_.keep);
    const double scale = o_.s.factor / denominator(o_, f_, tokens, sequences);
    if (folded_) o_.scale = static_cast<float>(scale);
    if (entropy_folded_) {
      const double mean = o_.s.entropy_factor / static_cast<double>(std::max<int64_t>(tokens, 1));
      o_.entropy_scale = static_cast<float>(o_.plan.entropy_mean ? mean : scale);
    }
  }

  Part of_unit(int64_t unit, Worker& w) {
    Part part;
    w.sums.clear();
    if (pieces_ > 1) {
      const int64_t row = unit / pieces_, begin = unit % pieces_ * kUnit;
      Sequence q;
      tokens({row, begin, std::min(kUnit, f_.length - begin)}, q, w, part);
      if (!begin) part.sequences += counts_[row] > 0, part.tokens += counts_[row];
    } else {
      for (int64_t row = unit * rows_; row < std::min(f_.rows, (unit + 1) * rows_); ++row) {
        const Sequence q = sequence(row, w);
        tokens(span(row), q, w, part);
        part.tokens += q.count, part.sequences += q.count > 0;
      }
    }
    const Sums& s = w.sums;
    part.x = s.total(kX), part.k3 = s.total(kK3), part.ratio += s.total(kRatio), part.drift = s.total(kDrift);
    part.weight += s.total(kWeight), part.weight_sq += s.total(kWeightSq);
    part.ratio_max = std::max(part.ratio_max, reduce_max(s.ratio_max)), part.drift_max = reduce_max(s.drift_max);
    part.low = reduce_add(s.low), part.high = reduce_add(s.high);
    part.used = o_.multiplied ? reduce_add(s.used) : part.tokens, part.kept = reduce_add(s.kept);
    return part;
  }

  void open(Tile& t, const Span& s, const Sequence& q) const {
    t.open(f_, s);
    if (o_.plan.gate_masks) mask_by_gate(t, q, o_);
    if (o_.plan.mean_adv) t.view.adv = {q.mean_adv, 0};
  }

  template <class Do>
  void each_tile(const Span& s, const Sequence& q, Tile& t, Do what) const {
    for (int64_t done = 0; done < s.n; done += t.span.n) {
      open(t, tile_of(s, done), q);
      what();
    }
  }

  // Everything that a token sees of its sequence.
  Sequence sequence(int64_t row, Worker& w) const {
    Sequence q;
    q.count = counts_[row];
    if (!by_row_) return q;
    Tile& t = w.tile;
    const LossPlan& p = o_.plan;
    if (o_.rollout && std::max(p.weight, p.gate) > kAtToken) {
      Looked looked;
      for (int64_t done = 0; done < span(row).n; done += t.span.n) {
        t.open(f_, tile_of(span(row), done));
        looked.add(t, o_);
      }
      const double n = static_cast<double>(std::max<int64_t>(q.count, 1));
      const auto at_level = [&](D x, int level) { return reduce_add(x) / (level == kAtSeqMean ? n : 1.0); };
      if (p.weight > kAtToken) {
        const double rho = std::exp(at_level(looked.drift, p.weight));
        q.weight = static_cast<float>(std::min<double>(o_.s.weight_high, std::max<double>(o_.s.weight_low, rho)));
      }
      if (p.gate > kAtToken) {
        const double y = at_level(looked.looked, p.gate);
        q.open = y >= o_.s.gate_low && y <= o_.s.gate_high;
      }
    }
    if (o_.sequence || p.mean_adv || p.gate_masks || o_.s.off_policy < HUGE_VALF) measure(row, q, w);
    if (p.reduce == kSeqMeanTokenMean) q.c = 1.0f / static_cast<float>(std::max<int64_t>(q.count, 1));
    return q;
  }

  void measure(int64_t row, Sequence& q, Worker& w) const {
    Measured sums;
    each_tile(span(row), q, w.tile, [&] { sums.add(w.tile, q, o_, w.sums); });
    q.count = reduce_add(sums.count);
    const double n = static_cast<double>(std::max<int64_t>(q.count, 1));
    std::fill_n(q.mean_adv, kLanes, static_cast<float>(reduce_add(sums.adv) / n));
    q.strayed = !(reduce_add(sums.moved) / n <= o_.s.off_policy);
    if (!o_.sequence) return;
    double unit = reduce_add(sums.x) + reduce_add(sums.log_weight);
    if (o_.plan.unit != kUnitSeqSum) unit /= n;
    q.inside = unit >= o_.s.unit_low && unit <= o_.s.unit_high;
    unit = unit < o_.s.unit_low ? o_.s.unit_low : unit > o_.s.unit_high ? o_.s.unit_high : unit;
    q.unit = static_cast<float>(unit), q.ratio = static_cast<float>(std::exp(unit));
  }

  bool streams(const float* g, const Tile& t) const {
    return streamed_ && t.span.n == t.view.padded && reinterpret_cast<uintptr_t>(g) % (kLanes * sizeof(float)) == 0;
  }

  // The gradients and the sums of some tokens of one sequence.
  void tokens(const Span& s, const Sequence& q, Worker& w, Part& part) {
    Tile& t = w.tile;
    Sums& sums = w.sums;
    const int64_t at = s.row * f_.length + s.begin;
    if (o_.pulled_back) w.part.resize(static_cast<size_t>(s.n + kLanes));
    double pull = 0;
    int64_t done = 0;
    each_tile(s, q, t, [&] {
      const bool whole = t.span.n == t.view.padded;
      if (o_.rollout || o_.multiplied) multipliers(t, q, o_, sums);
      if (!o_.sequence) ratio_tile(t, q, o_, sums);
      if (o_.sequence && o_.applied) weight_tile(t, q, o_, sums);
      if (estimator_) estimator_(t, q, o_, sums);
      float* to = out_.dlogp ? out_.dlogp + at + done : nullptr;
      float* g = !to ? nullptr : o_.pulled_back ? w.part.data() + done : whole ? to : t.out;
      pull += surrogate_(t, q, o_, sums, g, g == to && streams(to, t));
      if (g == t.out && to) std::copy_n(g, t.span.n, to);
      if (o_.entropy) {
        const float scale = o_.entropy_scale * (o_.plan.entropy_mean ? 1.0f : q.c);
        float* bonus = out_.dentropy ? out_.dentropy + at + done : nullptr;
        entropy_tile(t, o_, scale, sums, bonus && !whole ? t.out : bonus);
        if (bonus && !whole) std::copy_n(t.out, t.span.n, bonus);
      }
      done += t.span.n;
    });
    if (o_.pulled_back && out_.dlogp && q.inside) {
      pulled(s, q, pull, w);
    } else if (o_.pulled_back && out_.dlogp) {
      std::copy_n(w.part.data(), s.n, out_.dlogp + at);
    }
    weigh(q, sums, part);
  }

  void pulled(const Span& s, const Sequence& q, double pull, Worker& w) {
    Tile& t = w.tile;
    const double n = o_.plan.unit == kUnitSeqMean ? static_cast<double>(std::max<int64_t>(q.count, 1)) : 1.0;
    const float each = static_cast<float>(pull * q.c * o_.scale / n);
    float* to = out_.dlogp + s.row * f_.length + s.begin;
    int64_t done = 0;
    each_tile(s, q, t, [&] {
      const bool whole = t.span.n == t.view.padded;
      float* g = whole ? to + done : t.out;
      pull_back(t, o_, each, w.part.data() + done, g, streams(g, t));
      if (!whole) std::copy_n(g, t.span.n, to + done);
      done += t.span.n;
    });
  }

  // The sums in which a token has its sequence's weight c.
  void weigh(const Sequence& q, Sums& sums, Part& part) const {
    if (o_.sequence && q.count) {
      const double r = q.ratio, n = static_cast<double>(q.count),
                   x = r < kSmallestWeight ? 0.0 : std::min<double>(r, kLargestWeight);
      part.ratio += r * n, part.ratio_max = std::max(part.ratio_max, q.ratio);
      if (!o_.applied) part.weight += x * n, part.weight_sq += x * x * n;
    }
    const auto taken = [&](Total which) {
      const double x = sums.total(which);
      sums.of[which] = zero_double();
      return x;
    };
    part.policy += q.c * taken(kPolicy);
    if (estimator_) {
      const double kl = taken(kKl);
      part.kl += kl, part.kl_part += q.c * kl;
    }
    if (o_.entropy) {
      part.entropy += taken(kEntropy);
      part.entropy_part += (o_.plan.entropy_mean ? 1.0f : q.c) * taken(kKeptEntropy);
    }
  }

  void finish() {
    Part all;
    for (const Part& part : parts_) all += part;
    const double scale = o_.s.factor / denominator(o_, f_, all.tokens, all.sequences);
    const int64_t kept = o_.keep && o_.entropy ? all.kept : all.tokens;
    const double mean = o_.s.entropy_factor / static_cast<double>(std::max<int64_t>(kept, 1));
    const double entropy_scale = o_.plan.entropy_mean ? mean : scale;
    const double policy = scale * all.policy, n = static_cast<double>(std::max<int64_t>(all.tokens, 1));
    LossMetrics& m = *out_.metrics;
    const auto put = [](float& to, double x) { to = static_cast<float>(x); };
    put(m.loss, policy + o_.beta * (scale * all.kl_part) - o_.entropy_coef * (entropy_scale * all.entropy_part));
    put(m.scale, folded_ ? 1.0 : scale), put(m.entropy_scale, entropy_folded_ ? 1.0 : entropy_scale);
    put(m.tokens, static_cast<double>(all.tokens));
    put(m.sequences, static_cast<double>(o_.plan.count_empty ? f_.rows : all.sequences));
    put(m.policy_loss, policy), put(m.kl, all.kl / n), put(m.entropy, all.entropy / n);
    put(m.approx_kl_k1, -all.x / n), put(m.approx_kl_k3, all.k3 / n);
    put(m.clip_low, static_cast<double>(all.low) / n), put(m.clip_high, static_cast<double>(all.high) / n);
    put(m.ratio_mean, all.ratio / n), put(m.ratio_max, std::isnan(all.ratio) ? all.ratio : all.ratio_max);
    put(m.ess, all.weight_sq != 0 ? all.weight * all.weight / (n * all.weight_sq) : 0.0);
    put(m.dropped, static_cast<double>(all.tokens - all.used) / n);
    const bool any = all.tokens > 0;
    put(m.rollout_ratio_mean, o_.rollout ? all.drift / n : any),
        put(m.rollout_ratio_max, o_.rollout ? all.drift_max : any);
    *out_.loss = m.loss;
  }

  const LossFields& f_;
  const LossOut& out_;
  Objective o_;
  SurrogateTile surrogate_;
  KlTile estimator_;
  bool by_row_, streamed_, folded_ = false, entropy_folded_ = false;
  int64_t pieces_ = 1, rows_ = 1;  // pieces of a row, or rows of a unit
  std::vector<int64_t> counts_;
  std::vector<Part> parts_;
};

}  // namespace

void token_loss(const LossObjective& objective, const LossFields& fields, const LossOut& out, int threads) {
  Call(objective, fields, out).run(threads);
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
