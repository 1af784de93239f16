// pair_loss and unpaired_loss on the CPU against their definition in double precision, and the same bits with two threads.
#include "../cpu/kernels.h"
#include "oracle.h"
#include "real.h"
// after the words that they are written with
#include "../rlfast/formulas.gen.h"

namespace rlfast::tests {

namespace {

struct Named {
  const char* name;
  int numbers;  // of its hyper-parameters
};

#define RLFAST_ROW(name, Hyper) {#name, int(sizeof(formulas::Hyper) / sizeof(float))},
constexpr Named kScores[] = {RLFAST_SCORE_FORMULAS(RLFAST_ROW)};
constexpr Named kPairs[] = {RLFAST_PAIR_FORMULAS(RLFAST_ROW)};
constexpr Named kSingles[] = {RLFAST_SINGLE_FORMULAS(RLFAST_ROW)};
#undef RLFAST_ROW

enum Form { kSums, kPadded, kPacked };

// One side: its tokens, or sums, in memory of exactly their size.
struct SideCase {
  Form form;
  DType dtype;
  int64_t rows, length;
  std::vector<int64_t> ends;
  Exact<char> logp, ref;
  Exact<uint8_t> mask;
  Exact<float> lengths, gradient;

  SideCase(Form form, DType dtype, int64_t rows, int64_t length, std::mt19937& rng)
      : form(form),
        dtype(dtype),
        rows(rows),
        length(length),
        ends(make_ends(form, rows, length)),
        logp(ends.back() * width(dtype)),
        ref(ends.back() * width(dtype)),
        mask(form == kSums ? 0 : ends.back()),
        lengths(form == kSums ? rows : 0),
        gradient(ends.back()) {
    std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
    for (int64_t i = 0; i < ends.back(); ++i) {
      const float x = -3.0f * uniform(rng) - 0.05f;
      write(ref.get(), dtype, i, x);
      write(logp.get(), dtype, i, std::min(-1e-3f, x + 0.6f * (uniform(rng) - 0.5f)));
      if (form != kSums) mask[i] = uniform(rng) < 0.8f;
    }
    for (int64_t i = 0; i < lengths.n; ++i) lengths[i] = float(3 + i % 7);
  }

  static std::vector<int64_t> make_ends(Form form, int64_t rows, int64_t length) {
    std::vector<int64_t> ends = {0};
    for (int64_t r = 0; r < rows; ++r)
      ends.push_back(ends.back() + (form == kSums ? 1 : form == kPadded ? length : r * 5 % (length + 1)));
    return ends;
  }

  PreferenceSide record() {
    const bool packed = form == kPacked;
    const int64_t stride = form == kSums ? 1 : packed ? 0 : length;
    PreferenceSide s{};
    s.logp = {logp.get(), dtype, stride, 1}, s.ref_logp = {ref.get(), dtype, stride, 1};
    s.mask = {mask.get(), stride}, s.cu_seqlens = packed ? ends.data() : nullptr;
    s.lengths = lengths.get(), s.length = form == kPadded ? length : ends.back(), s.tokens = form != kSums;
    return s;
  }

  bool counts(int64_t i) { return form == kSums || mask[i]; }
  int64_t count(int64_t row) {
    int64_t n = 0;
    for (int64_t i = ends[row]; i < ends[row + 1]; ++i) n += counts(i);
    return n;
  }
  // S, S_ref and n of a row, the tokens after the first `shortest` weighed by `tail`.
  void sums(int64_t row, int64_t shortest, double tail, double& s, double& r, double& n) {
    s = r = n = 0;
    for (int64_t i = ends[row]; i < ends[row + 1]; ++i) {
      if (!counts(i)) continue;
      n += 1;
      const double c = form != kSums && n > double(shortest) ? tail : 1.0;
      s += c * read(logp.get(), dtype, i), r += c * read(ref.get(), dtype, i);
    }
    if (form == kSums) n = lengths[row];
  }
};

formulas::Score<Real> scored(int which, const float* hyper, double s, double r, double n) {
  int number = 0;
#define RLFAST_TRY(name, Hyper)                                      \
  if (number++ == which) {                                           \
    formulas::Hyper h;                                               \
    std::memcpy(&h, hyper, sizeof h);                                \
    return formulas::name<Real>({Real(s), Real(s - r), Real(n)}, h); \
  }
  RLFAST_SCORE_FORMULAS(RLFAST_TRY)
#undef RLFAST_TRY
  return {};
}

template <class Seen>
formulas::PairLoss<Real> linked(int which, const float* hyper, const Seen& seen) {
  int number = 0;
#define RLFAST_TRY(name, Hyper)           \
  if (number++ == which) {                \
    formulas::Hyper h;                    \
    std::memcpy(&h, hyper, sizeof h);     \
    return formulas::name<Real>(seen, h); \
  }
  RLFAST_PAIR_FORMULAS(RLFAST_TRY)
#undef RLFAST_TRY
  return {};
}

formulas::SingleLoss<Real> linked_single(int which, const float* hyper, const formulas::Single<Real>& seen) {
  int number = 0;
#define RLFAST_TRY(name, Hyper)           \
  if (number++ == which) {                \
    formulas::Hyper h;                    \
    std::memcpy(&h, hyper, sizeof h);     \
    return formulas::name<Real>(seen, h); \
  }
  RLFAST_SINGLE_FORMULAS(RLFAST_TRY)
#undef RLFAST_TRY
  return {};
}

// Hyper-parameters within the range of every formula.
constexpr float kLinkHyper[4] = {0.13f, 0.2f, 0.3f, 0.01f}, kScoreHyper[2] = {0.4f, 0.0f};
// ℓ itself is of the size of 1 to 100 here, and its gradient below 10.
constexpr double kBound = 3e-4;

PreferenceCall call_of(int score, const char* link, bool mean, float tail, bool sum) {
  PreferenceCall call{};
  call.count = 2, call.tail = tail, call.factor = 2.0f, call.sum = sum;
  call.terms[0] = {"log_ratio", "", 0, 0.5f, {}, {}};
  call.terms[1] = {kScores[score].name, link, mean, 0.7f, {}, {}};
  std::copy_n(kScoreHyper, 2, call.terms[1].score_hyper), std::copy_n(kLinkHyper, 4, call.terms[1].link_hyper);
  return call;
}

// What belongs to the pairs: margin and extra of one type, a shared number, weights with a 0 among them.
struct RestCase {
  Exact<float> margin, extra, weights;
  float shared = 0.4f, num_items = 7.0f;

  explicit RestCase(int64_t n) : margin(n), extra(n), weights(n) {
    for (int64_t i = 0; i < n; ++i)
      margin[i] = 0.1f * float(i % 5) - 0.2f, extra[i] = 0.25f * float(i % 4), weights[i] = i % 6 == 1 ? 0.0f : 1.5f;
  }
  PreferenceRest record(bool counted) {
    return {{margin.get(), DType::f32, 1, 0},
            {extra.get(), DType::f32, 1, 0},
            {&shared, DType::f32, 0, 0},
            {weights.get(), DType::f32, 1, 0},
            counted ? &num_items : nullptr};
  }
};

void check_gradient(Report& r, SideCase& side, int64_t row, int64_t shortest, double tail, double d) {
  double n = 0;
  for (int64_t i = side.ends[row]; i < side.ends[row + 1]; ++i) {
    n += side.counts(i);
    const double c = !side.counts(i) ? 0.0 : side.form != kSums && n > double(shortest) ? tail : 1.0;
    r.near("gradient", side.gradient[i], c * d, kBound * std::max(1.0, std::fabs(c * d)));
  }
}

void test_pairs(const Kernels& k, Report r, Form form, DType dtype, int64_t pairs, int64_t length, int score, int link,
                bool mean, float tail) {
  std::mt19937 rng(17);
  SideCase w(form, dtype, pairs, length, rng), l(form, dtype, pairs, length + (form == kSums ? 0 : 2), rng);
  RestCase rest(pairs);
  const bool counted = link % 2;
  const PreferenceCall call = call_of(score, kPairs[link].name, mean, tail, link % 3 == 1);
  const PreferenceSide sides[2] = {w.record(), l.record()};
  const PreferenceRest fields = rest.record(counted);
  Exact<float> loss(1), metrics(10), losses(pairs), r_w(pairs), r_l(pairs), again(w.gradient.n);
  PreferenceOut out = {
      loss.get(), metrics.get(), {w.gradient.get(), l.gradient.get()}, losses.get(), {r_w.get(), r_l.get()}};
  k.pair_loss(call, sides[0], sides[1], fields, pairs, out, 1);
  const double n = counted ? 7.0 : call.sum ? 1.0 : std::max<double>(double(pairs), 1.0);
  double total = 0, used = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t shortest = std::min(w.count(i), l.count(i));
    double s_w, ref_w, n_w, s_l, ref_l, n_l;
    w.sums(i, shortest, tail, s_w, ref_w, n_w), l.sums(i, shortest, tail, s_l, ref_l, n_l);
    const auto a = scored(score, kScoreHyper, s_w, ref_w, n_w), b = scored(score, kScoreHyper, s_l, ref_l, n_l);
    const double by_w = mean ? n_w : 1.0, by_l = mean ? n_l : 1.0;
    const formulas::Pair<Real> seen = {a.value.x / by_w,     b.value.x / by_l,    Real(n_w),        Real(n_l),
                                       Real(rest.margin[i]), Real(rest.extra[i]), Real(rest.shared)};
    const auto pair = linked(link, kLinkHyper, seen);
    const double weight = rest.weights[i], value = weight ? weight * 0.7f * pair.value.x : 0.0;
    const double scale = 2.0 / n * weight * 0.7f;
    r.near("loss of a pair", losses[i], value, kBound * std::max(1.0, std::fabs(value)));
    r.near("reward", r_w[i], 0.5 * (s_w - ref_w), kBound);
    check_gradient(r, w, i, shortest, tail, weight ? scale * pair.d_chosen.x * a.d_logp.x / by_w : 0.0);
    check_gradient(r, l, i, shortest, tail, weight ? scale * pair.d_rejected.x * b.d_logp.x / by_l : 0.0);
    total += value, used += weight != 0;
  }
  r.near("loss", loss[0], 2.0 / n * total, kBound * std::max(1.0, std::fabs(2.0 / n * total)));
  r.same("pairs", metrics[1], used);
  out.d_logp[0] = again.get();
  const float first = loss[0];
  k.pair_loss(call, sides[0], sides[1], fields, pairs, out, 2);
  r.same("loss with two threads", loss[0], first);
  for (int64_t i = 0; i < again.n; ++i) r.same("gradient with two threads", again[i], w.gradient[i]);
}

void test_singles(const Kernels& k, Report r, Form form, DType dtype, int64_t rows, int64_t length, int link) {
  std::mt19937 rng(18);
  SideCase side(form, dtype, rows, length, rng);
  RestCase rest(rows);
  Exact<uint8_t> desirable(rows);
  for (int64_t i = 0; i < rows; ++i) desirable[i] = i % 3 != 0;
  const PreferenceCall call = call_of(0, kSingles[link].name, false, 1.0f, false);
  const PreferenceSide record = side.record();
  const PreferenceRest fields = rest.record(false);
  Exact<float> loss(1), metrics(7), losses(rows), rewards(rows);
  const PreferenceOut out = {
      loss.get(), metrics.get(), {side.gradient.get(), nullptr}, losses.get(), {rewards.get(), nullptr}};
  k.unpaired_loss(call, record, {desirable.get(), 1}, fields, rows, out, 2);
  double total = 0, good = 0;
  for (int64_t i = 0; i < rows; ++i) {
    double s, ref, n;
    side.sums(i, 0, 1.0, s, ref, n);
    const auto single = linked_single(
        link, kLinkHyper, {Real(s - ref), Real(double(desirable[i])), Real(rest.extra[i]), Real(rest.shared)});
    const double weight = rest.weights[i], value = weight ? weight * 0.7f * single.value.x : 0.0;
    r.near("loss of a response", losses[i], value, kBound * std::max(1.0, std::fabs(value)));
    check_gradient(r, side, i, 0, 1.0, weight ? 2.0 / double(rows) * weight * 0.7f * single.d_score.x : 0.0);
    total += value, good += weight != 0 && desirable[i];
  }
  const double wanted = 2.0 * total / std::max<double>(double(rows), 1.0);
  r.near("loss", loss[0], wanted, kBound * std::max(1.0, std::fabs(wanted)));
  r.same("desirable", metrics[1], good);
}

bool wants_negative(const char* link) { return !std::strcmp(link, "odds_ratio"); }

}  // namespace

void test_preference(const Kernels& k, const std::string& isa) {
  const auto report = [&](const char* op, const char* link, Form form, DType dtype, int64_t n) {
    return Report{isa + ", " + op + ", " + link + ", form " + std::to_string(form) + ", dtype " +
                  std::to_string(int(dtype)) + ", " + std::to_string(n)};
  };
  for (Form form : {kSums, kPadded, kPacked})
    for (DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (int64_t n : {0, 1, 5, 33, 600}) {
        if (n > 100 && dtype != DType::f32) continue;
        for (int link = 0; link < int(std::size(kPairs)); ++link) {
          const char* name = kPairs[link].name;
          const bool mean = wants_negative(name) || (form == kSums && link % 2);
          const int score = wants_negative(name) ? 1 : form == kSums ? link % int(std::size(kScores)) : 0;
          const float tail = form == kSums || link % 2 ? 1.0f : 0.3f;
          if (wants_negative(name) && form == kPacked) continue;  // an empty response has no odds
          test_pairs(k, report("pair_loss", name, form, dtype, n), form, dtype, n, 37, score, link, mean, tail);
        }
        for (int link = 0; link < int(std::size(kSingles)); ++link)
          test_singles(k, report("unpaired_loss", kSingles[link].name, form, dtype, n), form, dtype, n, 37, link);
      }
}

}  // namespace rlfast::tests
