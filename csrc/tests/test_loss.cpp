// token_loss against the same definition in double precision, a token at a time: every formula, every unit and level, odd and
// strided sizes, packed sequences of length 0, and masked tokens that hold NaN.
#include "../cpu/kernels.h"
#include "oracle.h"

namespace rlfast::formulas {

// A formula's V in double precision; hyper-parameters are floats.
struct Real {
  double x;
  Real() = default;
  Real(double x) : x(x) {}
};
inline Real operator+(Real a, Real b) { return a.x + b.x; }
inline Real operator-(Real a, Real b) { return a.x - b.x; }
inline Real operator*(Real a, Real b) { return a.x * b.x; }
inline Real operator/(Real a, Real b) { return a.x / b.x; }
inline Real operator-(Real a) { return -a.x; }
inline bool operator<(Real a, Real b) { return a.x < b.x; }
inline bool operator>(Real a, Real b) { return a.x > b.x; }
inline bool operator<=(Real a, Real b) { return a.x <= b.x; }
inline bool operator>=(Real a, Real b) { return a.x >= b.x; }
inline bool operator==(Real a, Real b) { return a.x == b.x; }
inline bool operator!=(Real a, Real b) { return a.x != b.x; }
inline Real choose(bool mask, Real yes, Real no) { return mask ? yes : no; }
inline Real minimum(Real a, Real b) { return std::fmin(a.x, b.x); }
inline Real maximum(Real a, Real b) { return std::fmax(a.x, b.x); }
inline Real absolute_value(Real a) { return std::fabs(a.x); }
inline Real exp(Real a) { return std::exp(a.x); }
inline Real log(Real a) { return std::log(a.x); }
inline Real expm1(Real a) { return std::expm1(a.x); }
inline Real sigmoid(Real a) { return 1 / (1 + std::exp(-a.x)); }

}  // namespace rlfast::formulas

#include "../rlfast/formulas.gen.h"

namespace rlfast::tests {

namespace {

using formulas::Real;

enum Given : unsigned {
  kOld = 1,
  kRollout = 2,
  kEntropyField = 4,
  kWeightsField = 8,
  kExtra = 16,
  kMask = 32,
  kKeep = 64
};

struct LossShape {
  std::string surrogate, estimator;
  LossPlan plan = {};
  int64_t rows = 3, length = 37;
  unsigned given = kOld | kMask;
  DType dtype = DType::f32;
  bool row_adv = false, packed = false, bounded = false;
  int64_t pad = 0;
  int threads = 1;
};

formulas::Surrogate<Real> surrogate_of(const std::string& name, const formulas::Token<Real>& t, const float* hyper) {
#define RLFAST_ONE(formula, Hyper)                        \
  if (name == #formula) {                                 \
    formulas::Hyper h;                                    \
    std::memcpy(static_cast<void*>(&h), hyper, sizeof h); \
    return formulas::formula<Real>(t, h);                 \
  }
  RLFAST_SURROGATE_FORMULAS(RLFAST_ONE)
  return {};
}

formulas::Estimate<Real> estimate_of(const std::string& name, Real d, const float* hyper) {
#undef RLFAST_ONE
#define RLFAST_ONE(formula, Hyper) \
  if (name == #formula) return formulas::formula<Real>(d, formulas::Hyper{hyper[0], hyper[1]});
  RLFAST_KL_FORMULAS(RLFAST_ONE)
#undef RLFAST_ONE
  return {};
}

class LossCase {
public:
  explicit LossCase(const LossShape& shape) : s(shape), random(unsigned(s.rows * 31 + s.length)) {
    const float inf = HUGE_VALF;
    settings = {0.3f, 0.02f, -inf, inf, -inf, inf, 0.5f, 1.2f, -0.3f, 0.25f, inf, 50.0f, 2.0f, 0.5f};
    if (s.bounded) settings.inner_low = settings.unit_low = -0.3f, settings.inner_high = settings.unit_high = 0.2f;
    if (s.plan.mean_adv) settings.off_policy = 0.0f;
    ends.push_back(0);
    for (int64_t row = 0; row < s.rows; ++row)
      ends.push_back(ends.back() + (s.packed ? (row % 3 == 1 ? 0 : 1 + s.length * row / s.rows) : s.length));
    const int64_t n = s.packed ? ends.back() : s.rows * (s.length + s.pad) - (s.rows ? s.pad : 0);
    for (auto* field : {&lp, &old, &ref, &rollout, &adv, &entropy, &weights, &extra})
      make(*field, std::max<int64_t>(n, 0));
    mask.reset(new Exact<uint8_t>(std::max<int64_t>(n, 0))), keep.reset(new Exact<uint8_t>(std::max<int64_t>(n, 0)));
    total = s.packed ? ends.back() : s.rows * s.length;
    dlogp.reset(new Exact<float>(total)), dentropy.reset(new Exact<float>(total));
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t t = 0; t < length(row); ++t) draw(row, t);
    for (int64_t row = 0; row < s.rows && s.row_adv; ++row) write(adv->get(), s.dtype, row, row % 2 ? -0.7f : 1.3f);
  }

  void run(const Kernels& k, Report& r) {
    const float hyper[4] = {0.2f, 0.3f, 3.0f, 2.0f}, bounds[2] = {s.bounded ? 0.5f : HUGE_VALF, 10.0f};
    const auto field = [&](std::unique_ptr<Exact<char>>& x, bool there = true) {
      return there ? LossField{x->get() ? x->get() : static_cast<void*>(&random), s.dtype, row_stride(), 1}
                   : LossField{};
    };
    LossFields f{};
    f.logp = field(lp), f.old_logp = field(old, has(kOld)), f.ref_logp = field(ref, !s.estimator.empty());
    f.rollout_logp = field(rollout, has(kRollout)), f.adv = field(adv), f.entropy = field(entropy, has(kEntropyField));
    f.weights = field(weights, has(kWeightsField)), f.extra = field(extra, has(kExtra));
    if (s.row_adv) f.adv.stride = 1, f.adv.step = 0;
    if (has(kMask)) f.mask = {mask->get(), row_stride()};
    if (has(kKeep)) f.keep = {keep->get(), row_stride()};
    f.cu_seqlens = s.packed ? ends.data() : nullptr;
    f.rows = s.rows, f.length = s.packed ? ends.back() : s.length;
    LossMetrics m;
    float loss = NAN;
    LossObjective o{s.plan, settings, s.surrogate.c_str(), s.estimator.c_str(), hyper, bounds};
    k.token_loss(o, f, {&loss, &m, dlogp->get(), has(kEntropyField) ? dentropy->get() : nullptr}, s.threads);
    r.same("loss and its metric", loss, m.loss);
    check(r, m, hyper, bounds);
  }

private:
  struct Seen {
    double lp, old, ref, rollout, adv, entropy, weights, extra;
    bool keep;
    int64_t at;  // in the gradients
    double rho, drift;
    bool open;
  };
  struct Wanted {
    double policy = 0, kl_part = 0, bonus = 0, kl = 0, entropy = 0, k1 = 0, k3 = 0, low = 0, high = 0, ratio = 0;
    double ratio_max = 0, w = 0, w2 = 0, dropped = 0, drift = 0, drift_max = 0, tokens = 0, sequences = 0, kept = 0;
    std::vector<double> by_logp, by_entropy;
  };

  bool has(unsigned what) const { return s.given & what; }
  int64_t row_stride() const { return s.packed ? 0 : s.length + s.pad; }
  int64_t length(int64_t row) const { return ends[row + 1] - ends[row]; }
  int64_t place(int64_t row, int64_t t) const { return s.packed ? ends[row] + t : row * row_stride() + t; }
  void make(std::unique_ptr<Exact<char>>& x, int64_t n) { x.reset(new Exact<char>(n * width(s.dtype))); }
  float value(std::unique_ptr<Exact<char>>& x, int64_t i) { return read(x->get(), s.dtype, i); }

  void draw(int64_t row, int64_t t) {
    std::normal_distribution<float> normal;
    const int64_t i = place(row, t);
    const bool counts = row != 2 && (t + row) % 5 != 4;
    (*mask)[i] = counts, (*keep)[i] = (t + 2 * row) % 7 != 3;
    const float base = -0.1f - std::fabs(normal(random));
    const float values[] = {base, base + 0.2f * normal(random), base + 0.3f * normal(random)};
    // what is masked holds NaN, as the buffers do from the start
    if (!counts && has(kMask)) return;
    write(lp->get(), s.dtype, i, values[0]), write(old->get(), s.dtype, i, values[1]);
    write(ref->get(), s.dtype, i, values[2]);
    const bool lost = t % 11 == 6;
    write(rollout->get(), s.dtype, i, lost ? kNaN : values[1] + 0.2f * normal(random));
    if (!s.row_adv) write(adv->get(), s.dtype, i, normal(random));
    write(entropy->get(), s.dtype, i, std::fabs(normal(random)));
    write(weights->get(), s.dtype, i, std::fabs(normal(random))), write(extra->get(), s.dtype, i, float(t % 2));
  }

  std::vector<Seen> tokens_of(int64_t row) {
    std::vector<Seen> seen;
    for (int64_t t = 0; t < length(row); ++t) {
      const int64_t i = place(row, t);
      if (has(kMask) && !(*mask)[i]) continue;
      const auto or_else = [&](auto& x, unsigned what, double other) {
        return has(what) ? double(value(x, i)) : other;
      };
      Seen z{};
      z.lp = value(lp, i), z.old = or_else(old, kOld, z.lp), z.ref = value(ref, i);
      z.rollout = or_else(rollout, kRollout, z.old), z.adv = value(adv, s.row_adv ? row : i);
      z.entropy = or_else(entropy, kEntropyField, 0), z.weights = or_else(weights, kWeightsField, 1);
      z.extra = or_else(extra, kExtra, 0), z.keep = !has(kKeep) || (*keep)[i], z.at = ends[row] + t;
      z.drift = std::isnan(z.rollout) ? 0 : z.old - z.rollout, z.rho = 1, z.open = true;
      seen.push_back(z);
    }
    correct(seen);
    return seen;
  }

  // ρ and its gate, of the token or of its sequence
  void correct(std::vector<Seen>& seen) {
    const auto looked = [&](double d) {
      return s.plan.gate_kind == 1 ? d : s.plan.gate_kind == 2 ? d * d / 2 : std::expm1(d) - d;
    };
    const auto at_level = [&](int level, double own, auto of) {
      double sum = 0;
      for (const Seen& z : seen) sum += of(z.drift);
      return level == kAtToken ? own : level == kAtSeqSum ? sum : sum / double(seen.size());
    };
    for (Seen& z : seen) {
      if (s.plan.weight) {
        const double y = at_level(s.plan.weight, z.drift, [](double d) { return d; });
        z.rho = std::min<double>(settings.weight_high, std::max<double>(settings.weight_low, std::exp(y)));
      }
      if (!s.plan.gate) continue;
      const double y = at_level(s.plan.gate, looked(z.drift), looked);
      z.open = y >= settings.gate_low && y <= settings.gate_high;
    }
    if (!s.plan.gate_masks) return;
    seen.erase(std::remove_if(seen.begin(), seen.end(), [](const Seen& z) { return !z.open; }), seen.end());
  }

  static double clamp(double x, double low, double high) { return std::min(high, std::max(low, x)); }

  void add_row(Wanted& w, std::vector<Seen> seen, const float* hyper, const float* bounds) {
    const LossPlan& p = s.plan;
    const double n = double(seen.size()), c = p.reduce == kSeqMeanTokenMean ? 1 / n : 1;
    w.tokens += n, w.sequences += n > 0;
    double unit_sum = 0, moved = 0, adv_sum = 0, pull = 0;
    std::vector<double> x, inside;
    for (const Seen& z : seen) {
      double low = settings.inner_low, high = settings.inner_high, raw = z.lp - z.old;
      if (p.signed_bounds && z.adv > 0) low = -HUGE_VAL;
      if (p.signed_bounds && z.adv < 0) high = HUGE_VAL;
      x.push_back(clamp(raw, low, high)), inside.push_back(raw >= low && raw <= high);
      unit_sum += x.back() + (p.weight_in_ratio ? clamp(std::log(z.open ? z.rho : 0), kLogLeast, kLogMost) : 0);
      const double gone = (has(kRollout) ? z.rollout : z.old) - z.lp;
      moved += std::isnan(gone) ? 0 : gone / n, adv_sum += z.adv / n;
    }
    for (size_t i = 0; i < seen.size(); ++i) {
      const Seen& z = seen[i];
      double u = p.unit == kUnitToken ? x[i] : p.unit == kUnitSeqSum ? unit_sum : unit_sum / n;
      const bool unit_inside = u >= settings.unit_low && u <= settings.unit_high;
      u = clamp(u, settings.unit_low, settings.unit_high);
      const double r = std::exp(u), adv_seen = p.mean_adv ? adv_sum : z.adv;
      const auto f = surrogate_of(s.surrogate, {z.lp, z.old, u, r, adv_seen, z.extra}, hyper);
      double k = z.keep && z.open ? (p.weight_in_ratio ? 1 : z.rho) * z.weights : 0;
      if (settings.off_policy < HUGE_VALF && adv_seen < 0 && moved > settings.off_policy) k = 0;
      double by_x = 0, by_logp = 0, kl = 0;
      if (k != 0) {
        w.policy += c * k * f.value.x, by_x = k * f.d_log_ratio.x, by_logp = k * f.d_logp.x;
        (r < 1 ? w.low : w.high) += f.clipped.x != 0 || !inside[i];
      }
      w.dropped += k == 0;
      if (!s.estimator.empty()) {
        const auto e = estimate_of(s.estimator, z.ref - z.lp, bounds);
        const double by_d = p.kl_through ? z.lp - z.ref : e.d_logp.x, rk = p.kl_ratio == 1 ? r : std::exp(x[i]);
        kl = (p.kl_ratio ? rk : 1) * e.value.x;
        by_logp += settings.beta * ((p.kl_ratio ? rk : 1) * by_d + (p.kl_ratio == 2 ? kl * inside[i] : 0));
        by_x += p.kl_ratio == 1 ? settings.beta * kl : 0;
      }
      const double through = p.unit == kUnitToken ? by_x * inside[i] * unit_inside : by_x * unit_inside;
      const bool pulled = p.unit == kUnitSeqMean || p.unit == kUnitSeqSum;
      w.by_logp[z.at] = c * (by_logp + (pulled ? 0 : through));
      pull += c * by_x * unit_inside / (p.unit == kUnitSeqMean ? n : 1);
      const double kept = p.entropy_mean ? z.keep : c, ew = r * (p.weight_in_ratio ? 1 : z.open ? z.rho : 0);
      w.bonus += kept * z.entropy, w.by_entropy[z.at] = -settings.entropy_coef * kept, w.kept += z.keep;
      w.kl_part += c * kl, w.kl += kl, w.entropy += z.entropy, w.k1 -= x[i], w.k3 += std::expm1(x[i]) - x[i];
      w.ratio += r, w.ratio_max = std::max(w.ratio_max, r), w.w += ew, w.w2 += ew * ew;
      w.drift += std::exp(z.drift), w.drift_max = std::max(w.drift_max, std::exp(z.drift));
    }
    if (p.unit == kUnitSeqMean || p.unit == kUnitSeqSum)
      for (size_t i = 0; i < seen.size(); ++i) w.by_logp[seen[i].at] += pull * inside[i];
  }

  void check(Report& r, const LossMetrics& m, const float* hyper, const float* bounds) {
    Wanted w;
    w.by_logp.resize(total), w.by_entropy.resize(total);
    for (int64_t row = 0; row < s.rows; ++row) add_row(w, tokens_of(row), hyper, bounds);
    const double sequences = s.plan.count_empty ? double(s.rows) : w.sequences;
    double n = s.plan.reduce == kTokenMean ? w.tokens : s.plan.reduce == kTokenSum ? 1 : sequences;
    n = std::max(1.0, n) * (s.plan.reduce == kSeqSumOverMaxLen ? settings.max_len : 1);
    const double scale = settings.factor / n, tokens = std::max(1.0, w.tokens);
    const double bonus = s.plan.entropy_mean ? settings.entropy_factor / std::max(1.0, w.kept) : scale;
    const double coef = has(kEntropyField) ? settings.entropy_coef : 0;
    double largest = 0;
    for (double g : w.by_logp) largest = std::max(largest, std::fabs(g) * scale);
    const auto near = [&](const char* what, double got, double wanted) {
      r.near(what, got, wanted, 2e-5 * std::fabs(wanted) + 2e-6);
    };
    near("loss", m.loss, scale * (w.policy + settings.beta * w.kl_part) - coef * bonus * w.bonus);
    near("policy", m.policy_loss, scale * w.policy), near("kl", m.kl, w.kl / tokens);
    r.same("tokens", m.tokens, w.tokens), r.same("sequences", m.sequences, sequences);
    near("entropy", m.entropy, w.entropy / tokens), near("k1", m.approx_kl_k1, w.k1 / tokens);
    near("k3", m.approx_kl_k3, w.k3 / tokens), near("ratio", m.ratio_mean, w.ratio / tokens);
    near("ratio_max", m.ratio_max, w.ratio_max), near("ess", m.ess, w.w2 > 0 ? w.w * w.w / (tokens * w.w2) : 0);
    near("dropped", m.dropped, w.dropped / tokens), near("rollout_ratio", m.rollout_ratio_mean, w.drift / tokens);
    near("rollout_ratio_max", m.rollout_ratio_max, w.drift_max);
    near("clip_low", m.clip_low, w.low / tokens), near("clip_high", m.clip_high, w.high / tokens);
    for (int64_t i = 0; i < total; ++i) {
      r.near("dlogp", (*dlogp)[i] * m.scale, w.by_logp[i] * scale, 2e-5 * largest + 1e-12);
      if (has(kEntropyField)) near("dentropy", (*dentropy)[i] * m.entropy_scale, w.by_entropy[i] * bonus);
    }
  }

  LossShape s;
  LossSettings settings;
  std::mt19937 random;
  std::vector<int64_t> ends;
  int64_t total = 0;
  std::unique_ptr<Exact<char>> lp, old, ref, rollout, adv, entropy, weights, extra;
  std::unique_ptr<Exact<uint8_t>> mask, keep;
  std::unique_ptr<Exact<float>> dlogp, dentropy;
};

std::vector<LossShape> loss_shapes() {
  std::vector<LossShape> all;
  const auto add = [&](const char* surrogate, const char* estimator, auto change) {
    LossShape s;
    s.surrogate = surrogate, s.estimator = estimator, s.plan.gate_kind = 1;
    change(s);
    all.push_back(s);
  };
  constexpr unsigned kAll = kOld | kRollout | kEntropyField | kWeightsField | kExtra | kMask | kKeep;
#define RLFAST_ONE(formula, Hyper) \
  for (int unit = 0; unit < 4; ++unit) add(#formula, "", [&](LossShape& s) { s.plan.unit = unit, s.given |= kExtra; });
  RLFAST_SURROGATE_FORMULAS(RLFAST_ONE)
#undef RLFAST_ONE
#define RLFAST_ONE(formula, Hyper)                                                                 \
  for (int i = 0; i < 12; ++i)                                                                     \
    add("ppo_clip", #formula, [&](LossShape& s) {                                                  \
      s.plan.kl_ratio = i % 3, s.plan.unit = i / 3, s.plan.kl_through = i == 4, s.bounded = i % 2; \
    });
  RLFAST_KL_FORMULAS(RLFAST_ONE)
#undef RLFAST_ONE
  for (int64_t length : {0, 1, 3, 15, 16, 17, 64, 1023, 1025, 4100, 9000})
    for (int i = 0; i < 6; ++i)
      add("ppo_clip", "k3", [&](LossShape& s) {
        s.length = length, s.plan.reduce = i % 5, s.plan.unit = i == 3 ? kUnitSeqMean : kUnitToken, s.packed = i == 4;
        s.dtype = DType(i % 3), s.pad = i % 2 * 3, s.row_adv = i % 3 == 1 && !s.packed, s.threads = 1 + i % 2;
        s.given = i == 5 ? 0 : kOld | kMask | kEntropyField;
      });
  for (int weight = 0; weight < 4; ++weight)
    for (int gate = 0; gate < 4; ++gate)
      for (int kind = 1; kind < 4; ++kind)
        add("cispo", "k1", [&](LossShape& s) {
          s.plan.weight = weight, s.plan.gate = gate, s.plan.gate_kind = kind, s.plan.gate_masks = kind == 2;
          s.plan.unit = (weight + kind) % 4, s.plan.weight_in_ratio = kind == 3, s.plan.mean_adv = gate == 1;
          s.plan.signed_bounds = gate == 2, s.bounded = kind != 1, s.given = kAll, s.plan.count_empty = gate == 3;
          s.plan.entropy_mean = weight % 2, s.plan.reduce = (gate + kind) % 5, s.pad = weight, s.rows = 5;
        });
  add("reinforce", "", [](LossShape& s) { s.rows = 0; });
  return all;
}

}  // namespace

void test_loss(const Kernels& k, const std::string& isa) {
  for (const LossShape& s : loss_shapes()) {
    Report r{isa + ", token_loss, " + s.surrogate + " " + s.estimator + ", unit " + std::to_string(s.plan.unit) + ", " +
             std::to_string(s.rows) + "x" + std::to_string(s.length) + ", dtype " + std::to_string(int(s.dtype)) +
             ", reduce " + std::to_string(s.plan.reduce) + ", weight " + std::to_string(s.plan.weight) + ", gate " +
             std::to_string(s.plan.gate) + " of k" + std::to_string(s.plan.gate_kind)};
    LossCase(s).run(k, r);
  }
}

}  // namespace rlfast::tests
