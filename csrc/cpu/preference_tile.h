// Up to a tile of responses, by their sums: the fields that formulas see, and what the terms of a loss add up to.
#pragma once
#include <cstring>

#include "../rlfast/formula_vec.h"
#include "sequence_sums.h"
// after the words that it is written with
#include "../rlfast/formulas.gen.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// Tokens of a side in a unit, or more where a response is longer.
constexpr int64_t kUnitTokens = 1 << 14;
// Below so many tokens, or sums, a second thread costs more than it saves.
constexpr int64_t kSerialTokens = 1 << 13;
// Responses of a tile: a dozen arrays of them stay in an L1 cache of 32 KiB.
constexpr int64_t kResponses = 512;

struct ResponseTile {
  alignas(64) float logp[kResponses];       // S
  alignas(64) float log_ratio[kResponses];  // S − S_ref
  alignas(64) float length[kResponses];
  alignas(64) float score[kResponses], slope[kResponses];  // of the term at hand
  alignas(64) float gradient[kResponses];                  // ∂ℓ/∂S, over all terms
};

using ScoreStage = void (*)(ResponseTile&, int64_t padded, bool mean, const float* hyper);

template <class Hyper>
Hyper hyper_of(const float* numbers) {
  Hyper h;
  std::memcpy(&h, numbers, sizeof h);
  return h;
}

template <class Hyper, formulas::Score<formulas::V> (*formula)(const formulas::Response<formulas::V>&, const Hyper&)>
void score_stage(ResponseTile& t, int64_t padded, bool mean, const float* numbers) {
  using formulas::V;
  const Hyper h = hyper_of<Hyper>(numbers);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const F n = max(load(t.length + i), set1(1.0f));  // the mean of no tokens is 0
    auto s = formula({V(load(t.logp + i)), V(load(t.log_ratio + i)), V(n)}, h);
    store(t.score + i, mean ? div(s.value.x, n) : s.value.x);
    store(t.slope + i, mean ? div(s.d_logp.x, n) : s.d_logp.x);
  }
}

template <class Stage>
struct NamedStage {
  const char* name;
  Stage stage;
};

#define RLFAST_SCORE(formula, Hyper) {#formula, score_stage<formulas::Hyper, formulas::formula<formulas::V>>},
constexpr NamedStage<ScoreStage> kScores[] = {RLFAST_SCORE_FORMULAS(RLFAST_SCORE)};
#undef RLFAST_SCORE

template <class Stage, size_t kCount>
Stage stage_of(const NamedStage<Stage> (&table)[kCount], const char* name) {
  for (const auto& row : table)
    if (!std::strcmp(row.name, name)) return row.stage;
  return nullptr;
}

// A field of the pairs, as float32; `fill` where there is none.
inline void load_field(const LossField& f, int64_t begin, int64_t n, int64_t padded, float fill, float* to) {
  if (!f.data || !n) {
    std::fill_n(to, padded, fill);
    return;
  }
  const auto copy = [&](auto* x) {
    x += begin * f.stride;
    if (f.stride == 1) return converted(x, n, padded, to);
    for (int64_t i = 0; i < n; ++i) to[i] = to_float(x[i * f.stride]);
    std::fill(to + n, to + padded, fill);
  };
  switch (f.dtype) {
    case DType::f32:
      return copy(static_cast<const float*>(f.data));
    case DType::bf16:
      return copy(static_cast<const bf16*>(f.data));
    case DType::f16:
      return copy(static_cast<const f16*>(f.data));
  }
}

// The responses begin … begin + n of a side; `shortest` has for each the tokens before its tail.
inline void load_side(const PreferenceSide& s, int64_t begin, int64_t n, int64_t padded, const int64_t* shortest,
                      float tail, ResponseTile& t) {
  if (s.tokens) {
    for (int64_t i = 0; i < n; ++i) {
      const Reduced sums = reduced(s, begin + i, shortest[i], tail);
      t.logp[i] = static_cast<float>(sums.logp), t.log_ratio[i] = static_cast<float>(sums.logp - sums.ref_logp);
      t.length[i] = static_cast<float>(counted(s, begin + i));
    }
    for (float* x : {t.logp, t.log_ratio, t.length}) std::fill(x + n, x + padded, 0.0f);
    return;
  }
  load_field(s.logp, begin, n, padded, 0.0f, t.logp), load_field(s.ref_logp, begin, n, padded, 0.0f, t.log_ratio);
  for (int64_t i = 0; i < padded; i += kLanes) store(t.log_ratio + i, sub(load(t.logp + i), load(t.log_ratio + i)));
  std::fill_n(t.length, padded, 1.0f);
  if (s.lengths) std::copy_n(s.lengths + begin, n, t.length);
}

// Their gradients, where they are wanted.
inline void store_side(const PreferenceSide& s, int64_t begin, int64_t n, const float* gradient,
                       const int64_t* shortest, float tail, bool streamed, float* out) {
  if (!out) return;
  if (!s.tokens) {
    std::copy_n(gradient, n, out + begin);
    return;
  }
  for (int64_t i = 0; i < n; ++i) pull_back(s, begin + i, gradient[i], shortest[i], tail, streamed, out);
}

// ℓ·w, its sum, and gradient·w·scale of the responses beside it; a weight of 0 takes out what may be infinite.
template <int kSides>
double weigh(int64_t padded, const float* weights, float scale, float* losses, ResponseTile* const (&sides)[kSides]) {
  const F by = set1(scale);
  D total = zero_double();
  for (int64_t i = 0; i < padded; i += kLanes) {
    const F weight = load(weights + i);
    const M m = unequal(weight, set1(0.0f));
    const F loss = only(m, mul(weight, load(losses + i)));
    store(losses + i, loss), total = accumulate(total, loss);
    for (ResponseTile* r : sides) store(r->gradient + i, only(m, mul(mul(by, weight), load(r->gradient + i))));
  }
  return reduce_add(total);
}

// How a batch is cut into units: some responses of one side, whose tokens stay in cache between the sums and the gradient.
struct Units {
  int64_t rows, each, count;
  bool serial, streamed;

  Units(const PreferenceSide& s, int64_t n) : rows(n) {
    const int64_t tokens = !s.tokens ? n : s.cu_seqlens ? s.cu_seqlens[n] - s.cu_seqlens[0] : n * s.length;
    const int64_t mean = std::max<int64_t>(n ? tokens / n : 1, 1);
    each = s.tokens ? std::min(kResponses, std::max<int64_t>(kUnitTokens / mean, 1)) : kResponses;
    count = (n + each - 1) / each;
    serial = tokens < kSerialTokens;
    streamed = s.tokens && tokens * static_cast<int64_t>(sizeof(float)) > kPastCacheBytes;
  }
  int64_t size(int64_t unit) const { return std::min(each, rows - unit * each); }
};

// What divides the sum of the losses.
inline double preference_denominator(const PreferenceCall& call, const PreferenceRest& rest, int64_t rows) {
  const double n = rest.num_items ? static_cast<double>(*rest.num_items) : call.sum ? 1.0 : static_cast<double>(rows);
  return n > 0 ? n : 1.0;
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
