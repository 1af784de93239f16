// token_loss by its definition, a token at a time, in double precision.
#include "loss_case.h"

namespace rlfast::tests {

namespace {

struct TokenTruth {
  int64_t row, t;
  bool on, keep, open;
  double logp, old_logp, ref, rollout, adv, entropy, weight, extra;
  double drift, rho, x;  // log ρ, ρ as it is applied, the bounded log-ratio
  bool moves;            // x, with log π
  double d_logp = 0, d_unit = 0, size = 0;
};

using Value = formulas::Surrogate<Real>;

Value evaluated(const LossShape& f, const formulas::Token<Real>& t) {
  int number = 0;
#define RLFAST_TRY(name, Hyper)         \
  if (number++ == f.surrogate) {        \
    formulas::Hyper h;                  \
    std::memcpy(&h, f.hyper, sizeof h); \
    return formulas::name<Real>(t, h);  \
  }
  RLFAST_SURROGATE_FORMULAS(RLFAST_TRY)
#undef RLFAST_TRY
  return {};
}

formulas::Estimate<Real> estimated(const LossShape& f, double d) {
  int number = 0;
  formulas::KlBounds h = {f.kl_hyper[0], f.kl_hyper[1]};
#define RLFAST_TRY(name, Hyper) \
  if (number++ == f.estimator) return formulas::name<Real>(d, h);
  RLFAST_KL_FORMULAS(RLFAST_TRY)
#undef RLFAST_TRY
  return {};
}

bool within(double x, double low, double high) { return x >= low && x <= high; }
double bounded(double x, double low, double high) { return x < low ? low : x > high ? high : x; }
double finite(double x) { return std::isnan(x) ? 0 : bounded(x, -FLT_MAX, FLT_MAX); }
// exp as float32 has it
double grown(double x) {
  double e = std::exp(x);
  return e > FLT_MAX ? kInfinity : e;
}

struct Totals {
  Sum policy, kl_part, entropy_part, kl, entropy, k1, k3, ratio, w, w2, drift;
  double tokens = 0, sequences = 0, kept = 0, low = 0, high = 0, dropped = 0, ratio_max = 0, drift_max = 0;
};

struct LossOracle {
  LossCase& c;
  const LossPlan& plan;
  const LossSettings& s;
  double beta, entropy_coef;
  Totals sums;
  // Of the gradients: a kernel that knows n beforehand may scale them itself, and then leaves a scale of 1.
  double scaled = 1, entropy_scaled = 1;

  explicit LossOracle(LossCase& c)
      : c(c),
        plan(c.s.plan),
        s(c.s.settings),
        beta(double(s.beta) * (c.s.coefs ? c.coefs[0] : 1)),
        entropy_coef(double(s.entropy_coef) * (c.s.coefs ? c.coefs[1] : 1)) {}

  double gated(double drift) const {
    return plan.gate_kind == 1 ? drift : plan.gate_kind == 2 ? drift * drift / 2 : std::expm1(drift) - drift;
  }
  double rho_of(double drift) const { return bounded(grown(drift), s.weight_low, s.weight_high); }

  TokenTruth token(int64_t row, int64_t t) {
    TokenTruth k{};
    k.row = row, k.t = t;
    k.on = c.masked_in(row, t);
    if (!k.on) return k;
    k.keep = !(c.s.given & kKeep) || c.keep[c.flag(row, t)];
    k.logp = c.logp.at(row, t), k.adv = c.adv.at(row, t);
    k.old_logp = c.s.given & kOld ? c.old_logp.at(row, t) : k.logp;
    k.ref = c.ref.at(row, t), k.rollout = c.rollout.at(row, t), k.entropy = c.entropy.at(row, t);
    k.weight = c.s.given & kWeights ? c.weights.at(row, t) : 1;
    k.extra = c.extra.at(row, t);
    k.drift = c.s.given & kRollout ? finite(k.old_logp - k.rollout) : 0;
    return k;
  }

  // ρ, gate, mask and x of the tokens of a sequence.
  void correct(std::vector<TokenTruth>& tokens) const {
    double count = 0, drift = 0, seen = 0;
    for (const TokenTruth& k : tokens)
      if (k.on) count += 1, drift += k.drift, seen += gated(k.drift);
    count = std::max(count, 1.0);
    for (TokenTruth& k : tokens) {
      if (!k.on) continue;
      double at_weight[] = {0, k.drift, drift, drift / count}, at_gate[] = {0, gated(k.drift), seen, seen / count};
      k.rho = plan.weight ? rho_of(at_weight[plan.weight]) : 1;
      k.open = !plan.gate || within(at_gate[plan.gate], s.gate_low, s.gate_high);
      if (plan.gate_masks) k.on = k.open;
      double raw = k.logp - k.old_logp;
      double low = plan.signed_bounds && k.adv > 0 ? -kInfinity : s.inner_low;
      double high = plan.signed_bounds && k.adv < 0 ? kInfinity : s.inner_high;
      k.x = bounded(raw, low, high), k.moves = within(raw, low, high);
    }
  }

  void sequence(std::vector<TokenTruth>& tokens) {
    correct(tokens);
    double n = 0, adv = 0, x = 0, x_size = 0, moved = 0;
    for (const TokenTruth& k : tokens) {
      if (!k.on) continue;
      n += 1, adv += k.adv, x += k.x, x_size += std::fabs(k.logp) + std::fabs(k.old_logp);
      if (plan.weight_in_ratio) x += bounded(std::log(k.open ? k.rho : 0), kLogLeast, kLogMost);
      moved += finite((c.s.given & kRollout ? k.rollout : k.old_logp) - k.logp);
    }
    if (n > 0 || plan.count_empty) sums.sequences += 1;
    double count = std::max(n, 1.0), share = plan.reduce == kSeqMeanTokenMean ? 1 / count : 1;
    double unit = plan.unit == kUnitSeqSum ? x : x / count, pulled = 0, pulled_size = 0;
    if (plan.unit != kUnitSeqSum) x_size /= count;
    bool on_policy = moved / count <= s.off_policy;
    for (TokenTruth& k : tokens) {
      if (!k.on) continue;
      double own = plan.unit == kUnitToken ? k.x : unit;
      if (plan.unit == kUnitToken) x_size = std::fabs(k.logp) + std::fabs(k.old_logp);
      parts(k, own, plan.mean_adv ? adv / count : k.adv, share, on_policy, x_size);
      if (within(own, s.unit_low, s.unit_high)) pulled += k.d_unit, pulled_size += std::fabs(k.d_unit);
    }
    for (TokenTruth& k : tokens) {
      if (!k.on) continue;
      double own = plan.unit == kUnitToken ? k.x : unit;
      bool inside = within(own, s.unit_low, s.unit_high);
      if (plan.unit == kUnitToken) k.d_logp += inside && k.moves ? k.d_unit : 0;
      if (plan.unit == kUnitSeqMeanThrough) k.d_logp += inside ? k.d_unit : 0;
      if (plan.unit == kUnitSeqMean && k.moves) k.d_logp += pulled / count, k.size += pulled_size / count;
      if (plan.unit == kUnitSeqSum && k.moves) k.d_logp += pulled, k.size += pulled_size;
    }
  }

  // One token's part of the sums, and its ∂/∂log π and ∂/∂x of the unit.
  void parts(TokenTruth& k, double own, double adv, double share, bool on_policy, double x_size) {
    double unit = bounded(own, s.unit_low, s.unit_high), ratio = grown(unit);
    Value v = evaluated(c.s, {k.logp, k.old_logp, unit, ratio, adv, k.extra});
    double multiplier = plan.weight_in_ratio ? k.weight : k.open ? k.rho * k.weight : 0;
    bool used = k.keep && (adv >= 0 || on_policy) && multiplier != 0;
    if (!used) multiplier = 0, v = {};
    // a formula's minimum and maximum may drop a NaN
    double value = used && std::isnan(unit) ? unit : multiplier * v.value.x, kl = 0, d_kl = 0, d_r = 0;
    if (c.s.estimator >= 0) {
      auto e = estimated(c.s, k.ref - k.logp);
      double r = plan.kl_ratio == 1 ? ratio : plan.kl_ratio == 2 ? grown(k.x) : 1;
      kl = r * e.value.x, d_kl = r * (plan.kl_through ? k.logp - k.ref : e.d_logp.x);
      if (plan.kl_ratio == 1) d_r = kl;
      if (plan.kl_ratio == 2 && k.moves) d_kl += kl;
      if (plan.kl_ratio == 3 && std::fabs(kl) < c.s.kl_hyper[1]) d_kl += kl;
    }
    k.d_unit = share * (multiplier * v.d_log_ratio.x + beta * d_r);
    k.d_logp = share * (multiplier * v.d_logp.x + beta * d_kl);
    k.size = share *
             (std::fabs(multiplier * v.d_log_ratio.x) + std::fabs(multiplier * v.d_logp.x) +
              std::fabs(multiplier * adv) + beta * (std::fabs(d_kl) + std::fabs(d_r))) *
             (1 + x_size * 1e-2);
    double kept = plan.entropy_mean ? k.keep : share;
    double w = std::min(plan.weight_in_ratio ? ratio : ratio * (k.open ? k.rho : 0), double(kLargestWeight));
    if (w < kSmallestWeight) w = 0;
    sums.tokens += 1, sums.kept += k.keep, sums.dropped += !used;
    sums.policy.add(share * value), sums.kl_part.add(share * kl), sums.entropy_part.add(kept * k.entropy);
    sums.kl.add(kl), sums.entropy.add(k.entropy), sums.k1.add(-k.x), sums.k3.add(std::expm1(k.x) - k.x);
    sums.ratio.add(ratio), sums.w.add(w), sums.w2.add(w * w), sums.drift.add(grown(k.drift));
    bool clipped = used && (!k.moves || v.clipped.x != 0);
    sums.low += clipped && ratio < 1, sums.high += clipped && ratio >= 1;
    sums.ratio_max = std::isnan(ratio) ? NAN : std::isnan(sums.ratio_max) ? NAN : std::max(sums.ratio_max, ratio);
    sums.drift_max = std::max(sums.drift_max, grown(k.drift));
  }

  void check_metrics(Report& r) {
    const Totals& t = sums;
    double n = plan.reduce == kTokenMean ? t.tokens : plan.reduce == kTokenSum ? 1 : t.sequences;
    if (c.s.num_items) n = c.num_items[0];
    if (plan.reduce == kSeqSumOverMaxLen) n *= s.max_len;
    double scale = s.factor / (n > 0 ? n : 1), each = 1 / std::max(t.tokens, 1.0);
    double entropy_scale = plan.entropy_mean ? s.entropy_factor / std::max(t.kept, 1.0) : scale;
    double policy = scale * t.policy.value;
    double loss = policy + beta * scale * t.kl_part.value - entropy_coef * entropy_scale * t.entropy_part.value;
    double size = scale * (t.policy.size + std::fabs(beta) * t.kl_part.size) +
                  std::fabs(entropy_coef) * entropy_scale * t.entropy_part.size;
    const LossMetrics& m = c.metrics[0];
    const double e = 1e-5;
    const auto mean = [&](const char* name, double got, const Sum& sum, double floor = 0) {
      r.near(name, got, sum.value * each, e * sum.size * each + floor);
    };
    r.near("loss", m.loss, loss, e * size), r.near("loss output", c.loss[0], loss, e * size);
    r.near("policy loss", m.policy_loss, policy, e * scale * t.policy.size);
    scaled = m.scale == 1 ? scale : 1, entropy_scaled = m.entropy_scale == 1 ? entropy_scale : 1;
    r.near("scale", m.scale * scaled, scale, e * scale);
    r.near("entropy scale", m.entropy_scale * entropy_scaled, entropy_scale, e * entropy_scale);
    r.same("tokens", m.tokens, t.tokens), r.same("sequences", m.sequences, t.sequences);
    mean("kl", m.kl, t.kl, 1e-6), mean("entropy", m.entropy, t.entropy), mean("k1", m.approx_kl_k1, t.k1, 1e-7);
    mean("k3", m.approx_kl_k3, t.k3, 1e-7 * t.k1.size * each);
    r.near("clip low", m.clip_low, t.low * each, 1e-7), r.near("clip high", m.clip_high, t.high * each, 1e-7);
    r.near("dropped", m.dropped, t.dropped * each, 1e-7);
    mean("ratio", m.ratio_mean, t.ratio), mean("rollout ratio", m.rollout_ratio_mean, t.drift);
    r.near("ratio max", m.ratio_max, t.ratio_max, e * t.ratio_max);
    r.near("rollout ratio max", m.rollout_ratio_max, t.drift_max, e * t.drift_max);
    double w = t.w.value, w2 = t.w2.value, ess = w2 != 0 ? w * w * each / w2 : 0;
    r.near("ess", m.ess, ess, e * 4 * ess);
  }

  void check_gradients(Report& r, const std::vector<TokenTruth>& tokens) const {
    for (const TokenTruth& k : tokens) {
      if (c.s.no_gradients) return;
      std::string at = " of token " + std::to_string(k.row) + ", " + std::to_string(k.t);
      int64_t i = k.row * c.length + k.t;
      double kept = plan.entropy_mean ? k.keep : plan.reduce == kSeqMeanTokenMean ? 1 / count_of(tokens) : 1;
      r.near("dlogp" + at, c.dlogp[i], k.on ? k.d_logp * scaled : 0, k.on ? 1e-5 * k.size * scaled : 0);
      r.near("dentropy" + at, c.dentropy[i], k.on ? -entropy_coef * kept * entropy_scaled : 0,
             1e-6 * std::fabs(entropy_coef) * entropy_scaled);
    }
  }
  static double count_of(const std::vector<TokenTruth>& tokens) {
    double n = 0;
    for (const TokenTruth& k : tokens) n += k.on;
    return n;
  }
};

}  // namespace

void LossCase::check(Report& r) {
  LossOracle oracle(*this);
  std::vector<std::vector<TokenTruth>> all(sequences);
  int64_t first = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    std::vector<TokenTruth>& tokens = all[i];
    int64_t n = s.is_packed ? s.packed[i] : length;
    for (int64_t t = 0; t < n; ++t) tokens.push_back(oracle.token(s.is_packed ? 0 : i, first + t));
    first += s.is_packed ? n : 0;
    oracle.sequence(tokens);
  }
  oracle.check_metrics(r);
  for (const std::vector<TokenTruth>& tokens : all) oracle.check_gradients(r, tokens);
}

}  // namespace rlfast::tests
