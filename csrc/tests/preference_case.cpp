#include "preference_case.h"

#include "real.h"
// after the words that they are written with
#include "../rlfast/formulas.h"

#include "../rlfast/formulas.gen.h"

namespace rlfast::tests {

namespace {

#define RLFAST_NAME(name, Hyper) #name,
constexpr const char* kScores[] = {RLFAST_SCORE_FORMULAS(RLFAST_NAME)};
constexpr const char* kPairs[] = {RLFAST_PAIR_FORMULAS(RLFAST_NAME)};
constexpr const char* kSingles[] = {RLFAST_SINGLE_FORMULAS(RLFAST_NAME)};
#undef RLFAST_NAME

enum Form { kSums, kPadded, kPacked };

struct PreferenceShape {
  Form form = kSums;
  DType dtype = DType::f32;
  int64_t rows = 5, length = 37;
  int link = 0, score = 0;
  bool mean = false;
  float tail = 1.0f;
  int64_t pad = 0;       // elements between rows
  bool bare = false;     // no field that may be missing
  bool garbage = false;  // NaN and −inf under the mask, NaN where the weight is 0
  bool two = false;      // terms
};

// A weight of 0 among them.
float weight_of(int64_t row) { return row % 6 == 1 ? 0.0f : 1.5f; }

// One side: its tokens, or sums, in memory of exactly their size.
struct SideCase {
  PreferenceShape s;
  int64_t stride;
  std::vector<int64_t> ends;  // of the responses, without gaps
  Exact<char> logp, ref;
  Exact<uint8_t> mask;
  Exact<float> lengths, gradient, again;

  SideCase(const PreferenceShape& shape, int64_t more, std::mt19937& rng)
      : s(longer(shape, more)),
        stride(s.form == kSums     ? 1 + s.pad
               : s.form == kPadded ? s.length + s.pad
                                   : 0),
        ends(make_ends(s, more > 0)),
        logp(elements() * width(s.dtype)),
        ref(elements() * width(s.dtype)),
        mask(s.form == kSums ? 0 : elements()),
        lengths(s.form == kSums ? s.rows : 0),
        gradient(ends.back()),
        again(ends.back()) {
    std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t i = ends[row]; i < ends[row + 1]; ++i) {
        float x = -3.0f * uniform(rng) - 0.05f, y = std::min(-1e-3f, x + 0.6f * (uniform(rng) - 0.5f));
        if (mask.n) mask[at(row, i)] = uniform(rng) < 0.8f;
        if (s.garbage && !counts(row, i)) x = i % 2 ? kNaN : -INFINITY, y = kNaN;
        if (s.garbage && weight_of(row) == 0.0f) y = kNaN;
        write(ref.get(), s.dtype, at(row, i), x), write(logp.get(), s.dtype, at(row, i), y);
      }
    for (int64_t i = 0; i < lengths.n; ++i) lengths[i] = float(3 + i % 7);
  }

  static PreferenceShape longer(PreferenceShape s, int64_t more) { return s.length += more, s; }

  // Packed: the chosen response of the first pair is empty, and the longer one later.
  static std::vector<int64_t> make_ends(const PreferenceShape& s, bool rejected) {
    std::vector<int64_t> ends = {0};
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t packed = (rejected ? 6 + 2 * r : 5 * r) * std::max<int64_t>(s.length / 37, 1) % (s.length + 1);
      ends.push_back(ends.back() + (s.form == kSums ? 1 : s.form == kPadded ? s.length : packed));
    }
    return ends;
  }

  int64_t elements() const {
    return s.form == kPacked ? ends.back() : s.rows ? (s.rows - 1) * stride + ends.back() / s.rows : 0;
  }
  // Where token i, counted without gaps, lies.
  int64_t at(int64_t row, int64_t i) const { return s.form == kPacked ? i : row * stride + i - ends[row]; }

  PreferenceSide record() {
    PreferenceSide r{};
    r.logp = {logp.get(), s.dtype, stride, 1};
    if (!s.bare) r.ref_logp = {ref.get(), s.dtype, stride, 1}, r.mask = {mask.get(), stride}, r.lengths = lengths.get();
    r.cu_seqlens = s.form == kPacked ? ends.data() : nullptr;
    r.length = s.form == kPadded ? s.length : ends.back(), r.tokens = s.form != kSums;
    return r;
  }

  bool counts(int64_t row, int64_t i) { return s.bare || !mask.n || mask[at(row, i)]; }
  int64_t count(int64_t row) {
    int64_t n = 0;
    for (int64_t i = ends[row]; i < ends[row + 1]; ++i) n += counts(row, i);
    return n;
  }

  // S, S − S_ref and n of a row, the tokens after the first `shortest` weighed by `tail`.
  formulas::Response<Real> sums(int64_t row, int64_t shortest) {
    double s_row = 0, ref_row = 0, n = 0;
    for (int64_t i = ends[row]; i < ends[row + 1]; ++i) {
      if (!counts(row, i)) continue;
      n += 1;
      const double c = s.form != kSums && n > double(shortest) ? s.tail : 1.0;
      s_row += c * read(logp.get(), s.dtype, at(row, i));
      if (!s.bare) ref_row += c * read(ref.get(), s.dtype, at(row, i));
    }
    if (s.form == kSums) n = s.bare ? 1 : lengths[row];
    return {Real(s_row), Real(s_row - ref_row), Real(n)};
  }

  // ∂/∂S of a row as its tokens have it, and the same bits the second time.
  void check(Report& r, int64_t row, int64_t shortest, double d, double bound) {
    double n = 0;
    for (int64_t i = ends[row]; i < ends[row + 1]; ++i) {
      n += counts(row, i);
      const double c = !counts(row, i) ? 0.0 : s.form != kSums && n > double(shortest) ? s.tail : 1.0;
      r.near("gradient", gradient[i], c * d, bound * std::max(1.0, std::fabs(c * d)));
      r.same("gradient the second time", again[i], gradient[i]);
    }
  }
};

// Formula `which` of a table.
#define RLFAST_TRY(name, Hyper)           \
  if (number++ == which) {                \
    formulas::Hyper h;                    \
    std::memcpy(&h, hyper, sizeof h);     \
    return formulas::name<Real>(seen, h); \
  }
formulas::Score<Real> evaluated(int which, const float* hyper, const formulas::Response<Real>& seen) {
  int number = 0;
  RLFAST_SCORE_FORMULAS(RLFAST_TRY)
  return {};
}
formulas::PairLoss<Real> evaluated(int which, const float* hyper, const formulas::Pair<Real>& seen) {
  int number = 0;
  RLFAST_PAIR_FORMULAS(RLFAST_TRY)
  return {};
}
formulas::SingleLoss<Real> evaluated(int which, const float* hyper, const formulas::Single<Real>& seen) {
  int number = 0;
  RLFAST_SINGLE_FORMULAS(RLFAST_TRY)
  return {};
}
#undef RLFAST_TRY

// Hyper-parameters within the range of every formula.
constexpr float kLinkHyper[4] = {0.13f, 0.12f, 0.3f, 0.01f}, kScoreHyper[2] = {0.4f, 0.0f};
constexpr float kReward = 0.5f, kFactor = 2.0f;
constexpr int kTotalScore = 1, kHinge = 2;  // whose maximum drops a NaN
// ℓ itself is of the size of 1 to 100 here, and its gradient below 10.
constexpr double kBound = 3e-4;

// A call of one or two terms.
struct Terms {
  PreferenceCall call{};
  int score[3] = {}, link[3] = {};

  Terms(const PreferenceShape& s, const char* const* links, bool sum) {
    call.tail = s.tail, call.factor = kFactor, call.sum = sum;
    add(0, "", 0, false, kReward), add(s.score, links[s.link], s.link, s.mean, 0.7f);
    if (s.two) add(kTotalScore, links[0], 0, s.form != kPacked, 0.3f);  // an empty response has no mean
  }
  void add(int which, const char* name, int number, bool mean, float weight) {
    PreferenceTerm& t = call.terms[call.count];
    t = {kScores[which], name, mean, weight, {}, {}};
    std::copy_n(kScoreHyper, 2, t.score_hyper), std::copy_n(kLinkHyper, 4, t.link_hyper);
    score[call.count] = which, link[call.count++] = number;
  }
  // (s, ∂s/∂S) of a term.
  formulas::Score<Real> scored(int k, formulas::Response<Real> r) const {
    if (r.length.x < 1) r.length = Real(1);  // the mean of no tokens is 0
    const auto s = evaluated(score[k], kScoreHyper, r);
    return call.terms[k].mean ? formulas::Score<Real>{s.value / r.length, s.d_logp / r.length} : s;
  }
  double n(const PreferenceRest& rest, int64_t rows) const {
    return rest.num_items ? *rest.num_items : call.sum ? 1.0 : std::max<double>(double(rows), 1.0);
  }
};

// What belongs to the rows.
struct RestCase {
  PreferenceShape s;
  Exact<float> margin, extra, weights;
  float shared = 0.4f, num_items = 7.0f;

  explicit RestCase(const PreferenceShape& s) : s(s), margin(s.rows), extra(s.rows), weights(s.rows) {
    for (int64_t i = 0; i < s.rows; ++i) {
      margin[i] = s.bare ? 0.0f : 0.1f * float(i % 5) - 0.2f, extra[i] = s.bare ? 0.0f : 0.25f * float(i % 4);
      weights[i] = s.bare ? 1.0f : weight_of(i);
    }
    if (s.bare) shared = 0.0f;
  }
  PreferenceRest record(bool counted) {
    if (s.bare) return {};
    return {{margin.get(), DType::f32, 1, 0},
            {extra.get(), DType::f32, 1, 0},
            {&shared, DType::f32, 0, 0},
            {weights.get(), DType::f32, 1, 0},
            counted ? &num_items : nullptr};
  }
};

// What a call writes, twice.
struct Written {
  Exact<float> loss, metrics, losses, rewards[2];
  Written(int64_t rows, int64_t metrics)
      : loss(1), metrics(metrics), losses(rows), rewards{Exact<float>(rows), Exact<float>(rows)} {}
  PreferenceOut record(float* first, float* second) {
    return {loss.get(), metrics.get(), {first, second}, losses.get(), {rewards[0].get(), rewards[1].get()}};
  }
  void same_as(Report& r, Written& b) {
    for (int64_t i = 0; i < metrics.n; ++i) r.same("metrics the second time", metrics[i], b.metrics[i]);
    for (int64_t i = 0; i < losses.n; ++i) r.same("losses the second time", losses[i], b.losses[i]);
  }
};

double bound(double wanted) { return kBound * std::max(1.0, std::fabs(wanted)); }

void test_pairs(PreferenceKernels& kernels, Report r, const PreferenceShape& shape) {
  std::mt19937 rng(17);
  SideCase w(shape, 0, rng), l(shape, shape.form == kSums ? 0 : 2, rng);
  RestCase rest(shape);
  const Terms terms(shape, kPairs, shape.link % 3 == 1);
  const PreferenceSide sides[2] = {w.record(), l.record()};
  const PreferenceRest fields = rest.record(shape.link % 2);
  Written out(shape.rows, 10), again(shape.rows, 10);
  kernels.pairs(terms.call, sides, fields, shape.rows, out.record(w.gradient.get(), l.gradient.get()), false);
  kernels.pairs(terms.call, sides, fields, shape.rows, again.record(w.again.get(), l.again.get()), true);
  again.same_as(r, out);
  const double n = terms.n(fields, shape.rows);
  double sum[10] = {};
  for (int64_t i = 0; i < shape.rows; ++i) {
    const int64_t shortest = std::min(w.count(i), l.count(i));
    const auto of_w = w.sums(i, shortest), of_l = l.sums(i, shortest);
    const double weight = rest.weights[i];
    double value = 0, d_w = 0, d_l = 0;
    for (int k = 1; weight && k < terms.call.count; ++k) {
      const auto a = terms.scored(k, of_w), b = terms.scored(k, of_l);
      const auto pair = evaluated(terms.link[k], kLinkHyper,
                                  formulas::Pair<Real>{a.value, b.value, of_w.length, of_l.length, Real(rest.margin[i]),
                                                       Real(rest.extra[i]), Real(rest.shared)});
      const double c = weight * terms.call.terms[k].weight;
      value += c * pair.value.x;
      d_w += c * pair.d_chosen.x * a.d_logp.x, d_l += c * pair.d_rejected.x * b.d_logp.x;
    }
    const double reward[2] = {kReward * of_w.log_ratio.x, kReward * of_l.log_ratio.x};
    r.near("loss of a pair", out.losses[i], value, bound(value));
    for (int side = 0; side < 2; ++side)
      r.near("reward", out.rewards[side][i], reward[side], kBound * std::max(1.0, std::fabs(reward[side]) * 1e-2));
    w.check(r, i, shortest, kFactor / n * d_w, kBound), l.check(r, i, shortest, kFactor / n * d_l, kBound);
    if (!weight) continue;
    const double of[10] = {value,
                           1.0,
                           reward[0],
                           reward[1],
                           double(out.rewards[0][i] > out.rewards[1][i]),
                           reward[0] - reward[1],
                           of_w.logp.x,
                           of_l.logp.x,
                           of_w.length.x,
                           of_l.length.x};
    for (int k = 0; k < 10; ++k) sum[k] += of[k];
  }
  for (int k = 2; k < 10; ++k) {
    const double mean = sum[k] / std::max(sum[1], 1.0);
    r.near("metric " + std::to_string(k), out.metrics[k], mean, bound(mean));
  }
  const double loss = kFactor / n * sum[0];
  r.near("loss", out.loss[0], loss, bound(loss));
  r.same("loss in the metrics", out.metrics[0], out.loss[0]);
  r.same("pairs", out.metrics[1], sum[1]);
}

void test_singles(PreferenceKernels& kernels, Report r, const PreferenceShape& shape) {
  std::mt19937 rng(18);
  SideCase side(shape, 0, rng);
  RestCase rest(shape);
  Exact<uint8_t> desirable(2 * shape.rows);
  for (int64_t i = 0; i < shape.rows; ++i) desirable[2 * i] = i % 3 != 0, desirable[2 * i + 1] = i % 3 == 0;
  const Terms terms(shape, kSingles, shape.link % 3 == 1);
  const PreferenceRest fields = rest.record(shape.link % 2);
  Written out(shape.rows, 7), again(shape.rows, 7);
  kernels.singles(terms.call, side.record(), {desirable.get(), 2}, fields, shape.rows,
                  out.record(side.gradient.get(), nullptr), false);
  kernels.singles(terms.call, side.record(), {desirable.get(), 2}, fields, shape.rows,
                  again.record(side.again.get(), nullptr), true);
  again.same_as(r, out);
  const double n = terms.n(fields, shape.rows);
  double total = 0, count[2] = {}, reward[2] = {}, logp[2] = {};
  for (int64_t i = 0; i < shape.rows; ++i) {
    const auto of = side.sums(i, side.count(i));
    const double weight = rest.weights[i];
    double value = 0, d = 0;
    for (int k = 1; weight && k < terms.call.count; ++k) {
      const auto s = terms.scored(k, of);
      const auto single = evaluated(
          terms.link[k], kLinkHyper,
          formulas::Single<Real>{s.value, Real(double(desirable[2 * i])), Real(rest.extra[i]), Real(rest.shared)});
      const double c = weight * terms.call.terms[k].weight;
      value += c * single.value.x, d += c * single.d_score.x * s.d_logp.x;
    }
    const double rewarded = kReward * of.log_ratio.x;
    r.near("loss of a response", out.losses[i], value, bound(value));
    r.near("reward", out.rewards[0][i], rewarded, kBound * std::max(1.0, std::fabs(rewarded) * 1e-2));
    side.check(r, i, side.count(i), kFactor / n * d, kBound);
    if (!weight) continue;
    const int kind = desirable[2 * i] ? 0 : 1;
    total += value, count[kind] += 1, reward[kind] += rewarded, logp[kind] += of.logp.x;
  }
  const double loss = kFactor / n * total;
  r.near("loss", out.loss[0], loss, bound(loss));
  r.same("loss in the metrics", out.metrics[0], out.loss[0]);
  for (int kind = 0; kind < 2; ++kind) {
    const double each = 1.0 / std::max(count[kind], 1.0);
    r.same("count", out.metrics[1 + kind], count[kind]);
    r.near("mean reward", out.metrics[3 + kind], each * reward[kind], bound(each * reward[kind]));
    r.near("mean log p", out.metrics[5 + kind], each * logp[kind], bound(each * logp[kind]));
  }
}

// An output that nobody asked for is not written, and no NaN of one row is in another's.
void test_what_is_asked(PreferenceKernels& kernels, Report r) {
  PreferenceShape shape;
  shape.form = kPadded, shape.link = kHinge;
  std::mt19937 rng(19);
  SideCase w(shape, 0, rng), l(shape, 2, rng);
  write(l.logp.get(), shape.dtype, l.at(3, l.ends[3]), kNaN), l.mask[l.at(3, l.ends[3])] = 1;
  const Terms terms(shape, kPairs, false);
  const PreferenceSide sides[2] = {w.record(), l.record()};
  Exact<float> loss(1), metrics(10), losses(shape.rows);
  kernels.pairs(terms.call, sides, {}, shape.rows,
                {loss.get(), metrics.get(), {nullptr, l.gradient.get()}, losses.get(), {}}, false);
  kernels.pairs(terms.call, sides, {}, shape.rows,
                {loss.get(), metrics.get(), {w.gradient.get(), nullptr}, nullptr, {}}, false);
  r.same("loss", loss[0], kNaN);
  for (int64_t i = 0; i < shape.rows; ++i) {
    r.same("a NaN of a pair", std::isnan(losses[i]), i == 3);
    for (int64_t t = w.ends[i]; i != 3 && t < w.ends[i + 1]; ++t)
      r.same("a NaN of a gradient", std::isnan(w.gradient[t]), false);
  }
}

bool wants_negative(const char* link) { return !std::strcmp(link, "odds_ratio"); }

}  // namespace

void check_preference(PreferenceKernels& kernels, const std::string& who, bool lean) {
  const auto report = [&](const char* op, const char* link, const PreferenceShape& s) {
    return Report{who + ", " + op + ", " + link + ", form " + std::to_string(s.form) + ", dtype " +
                  std::to_string(int(s.dtype)) + ", " + std::to_string(s.rows) + " of " + std::to_string(s.length)};
  };
  const auto both = [&](PreferenceShape s) {
    test_pairs(kernels, report("pair_loss", kPairs[s.link], s), s);
    s.tail = 1.0f;
    if (s.link < int(std::size(kSingles))) test_singles(kernels, report("unpaired_loss", kSingles[s.link], s), s);
  };
  for (Form form : {kSums, kPadded, kPacked})
    for (int kind = 0; kind < 5; ++kind) {
      PreferenceShape s;
      s.form = form, s.rows = 7, s.length = kind == 4 ? 2500 : 37;
      s.pad = form != kPacked && kind > 1 ? 3 : 0;
      s.bare = kind == 0 || kind == 2, s.garbage = kind == 1 || kind == 3, s.two = kind >= 3;
      s.tail = kind % 2 || form == kSums ? 1.0f : 0.3f;
      s.dtype = kind == 3 ? DType::bf16 : DType::f32;
      both(s);
    }
  test_what_is_asked(kernels, report("pair_loss", "what is asked", {}));
  const std::vector<int64_t> sizes = lean ? std::vector<int64_t>{0, 3} : std::vector<int64_t>{0, 1, 5, 33, 600};
  for (Form form : {kSums, kPadded, kPacked})
    for (DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (int64_t n : sizes)
        for (int link = 0; link < int(std::size(kPairs)); ++link) {
          if ((n > 100 && dtype != DType::f32) || (lean && n == 0 && link > 1)) continue;
          if (lean && form != kSums && link % 3 != int(dtype) && link > 3) continue;
          const bool negative = wants_negative(kPairs[link]);
          if (negative && form == kPacked) continue;  // an empty response has no odds
          PreferenceShape s;
          s.form = form, s.dtype = dtype, s.rows = n, s.link = link;
          s.mean = negative || (form == kSums && link % 2);
          s.score = negative ? kTotalScore : form == kSums ? link % int(std::size(kScores)) : 0;
          s.tail = form == kSums || link % 2 ? 1.0f : 0.3f;
          both(s);
        }
  PreferenceShape many;
  many.rows = 265'000;  // more than 1024 blocks of 256
  both(many);
  many.form = kPacked, many.rows = 1030, many.length = 6;
  both(many);
}

}  // namespace rlfast::tests
