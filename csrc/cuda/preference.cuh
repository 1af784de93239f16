// What pair_loss and unpaired_loss share on a GPU, in one launch: sums of the tokens → scores → links → Σ, and the gradient back.
//
// A block has one row of the batch at a time, or 256 whose sums are given, a thread each. A row is a pair, or a single response.
// Its tokens come from memory once; for the gradient only the mask is read again. All threads evaluate the row, since each needs
// ∂ℓ/∂S. What a piece of the batch adds up to goes to `partial`, as in token_loss.cu; which rows a piece has depends on their
// number alone. Bytes: N·Σ sizeof(field) read + 4·N of gradient written. Not yet measured on a GPU.
#pragma once
#include "../rlfast/preference.h"
#include "float_words.cuh"
#include "launch.cuh"
#include "tokens.cuh"

namespace rlfast::cuda {

namespace {

constexpr int64_t kMostPieces = 1024;  // one block adds them up

// A term; its formulas by their places in csrc/rlfast/formulas.gen.h.
struct Term {
  int score, link, mean;
  float weight, score_hyper[2], link_hyper[4];
};

template <int kSides>
struct Preference {
  PreferenceSide sides[kSides];
  LossFlags desirable;  // of single responses
  PreferenceRest rest;
  PreferenceOut out;
  Term terms[kMostTerms];
  int count, sum;  // of PreferenceCall
  float tail, factor;
  int64_t rows, units, pieces;  // a unit is what a block has at a time
  double* partial;              // [slots, pieces]
  unsigned* finished;           // blocks that are done
};

using Response = formulas::Response<float>;
using Score = formulas::Score<float>;

template <int kSides>
struct Row {
  Response response[kSides];
  float margin, extra, shared, weight;
  bool desirable;
  float loss, reward[kSides], d[kSides];  // ℓ, ∂loss/∂S
};

// A link's value and its derivatives by the scores.
template <int kSides>
struct Linked {
  float value, d[kSides];
};

enum ScoreNumber {
#define RLFAST_NUMBER(name, Hyper) kScore_##name,
  RLFAST_SCORE_FORMULAS(RLFAST_NUMBER)
#undef RLFAST_NUMBER
};

// (s, ∂s/∂S) of a response. All of a grid take the same branch.
RLFAST_DEVICE Score scored(const Term& t, Response r) {
  r.length = max(r.length, 1.0f);  // the mean of no tokens is 0
  Score s = {};
  switch (t.score) {
#define RLFAST_CASE(name, Hyper)                                            \
  case kScore_##name:                                                       \
    s = formulas::name<float>(r, hyper_of<formulas::Hyper>(t.score_hyper)); \
    break;
    RLFAST_SCORE_FORMULAS(RLFAST_CASE)
#undef RLFAST_CASE
  }
  return t.mean ? Score{s.value / r.length, s.d_logp / r.length} : s;
}

RLFAST_DEVICE Piece tokens_of(const PreferenceSide& s, int64_t row) {
  if (!s.cu_seqlens) return {row, 0, 0, s.length};
  int64_t first = boundary(s.cu_seqlens, row, s.length);
  return {0, first, 0, boundary(s.cu_seqlens, row + 1, s.length) - first};
}

// Body(t, live) for every four tokens that a thread has: the block's together are next to one another,
template <class Body>
RLFAST_DEVICE void each_group(const Piece& p, Body body) {
  for (int64_t t = p.begin + threadIdx.x * kGroup; t < p.end; t += kLossThreads * kGroup)
    body(t, int(min(p.end - t, int64_t(kGroup))));
}

// or, where a thread must know what comes before it, each thread's are.
template <class Body>
RLFAST_DEVICE void each_own_group(const Piece& p, Body body) {
  constexpr int64_t kTile = kLossThreads * kGroup;
  int64_t each = (p.end - p.begin + kTile - 1) / kTile * kGroup;
  int64_t begin = p.begin + threadIdx.x * each, end = min(begin + each, p.end);
  for (int64_t t = begin; t < end; t += kGroup) body(t, int(min(end - t, int64_t(kGroup))));
}

// Where the tail of each response begins: the tokens that count beyond the number of the shorter one's (LD-DPO).
RLFAST_DEVICE void find_tails(const PreferenceSide (&sides)[2], const Piece (&p)[2], int64_t (&tails)[2]) {
  double count[2] = {}, before[2], begin[2] = {-1.0, -1.0};
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    each_own_group(p[side], [&](int64_t t, int live) {
      unsigned on = load(sides[side].mask, p[side], t, live);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) count[side] += bit(on, j);
    });
    before[side] = threads_before(count[side]);
  }
  block_total(count);
  double shortest = min(count[0], count[1]);
#pragma unroll
  for (int side = 0; side < 2; ++side)
    each_own_group(p[side], [&](int64_t t, int live) {
      unsigned on = load(sides[side].mask, p[side], t, live);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (bit(on, j) && before[side] == shortest) begin[side] = double(t + j);
        before[side] += bit(on, j);
      }
    });
  block_total<2, 0>(begin);
#pragma unroll
  for (int side = 0; side < 2; ++side)
    if (begin[side] >= 0.0) tails[side] = int64_t(begin[side]);
}

// S = Σ c·log π, S − S_ref and n of the responses of a row, c = tail from `tails` on.
template <int kSides>
RLFAST_DEVICE void sum_tokens(const Preference<kSides>& a, const Piece (&p)[kSides], const int64_t (&tails)[kSides],
                              Response (&r)[kSides]) {
  double sum[3 * kSides] = {};
#pragma unroll
  for (int side = 0; side < kSides; ++side)
    each_group(p[side], [&](int64_t t, int live) {
      const PreferenceSide& s = a.sides[side];
      float x[kGroup], y[kGroup] = {};
      unsigned on = load(s.mask, p[side], t, live);
      load(s.logp, p[side], t, live, x);
      if (s.ref_logp.data) load(s.ref_logp, p[side], t, live, y);
      clear(on, x), clear(on, y);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        float c = t + j < tails[side] ? 1.0f : a.tail;
        sum[3 * side] += product(c, x[j]);
        sum[3 * side + 1] += product(c, y[j]);
        sum[3 * side + 2] += bit(on, j);
      }
    });
  block_total(sum);
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    const double* s = sum + 3 * side;
    r[side] = {float(s[0]), float(s[0] - s[1]), float(s[2])};
  }
}

// ∂/∂S to each token that counts, times c, and 0 to the others.
RLFAST_DEVICE void pull_back(const PreferenceSide& s, const Piece& p, int64_t tail_begin, float tail, float d,
                             float* gradient) {
  each_group(p, [&](int64_t t, int live) {
    unsigned on = load(s.mask, p, t, live);
    float g[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) g[j] = !bit(on, j) ? 0.0f : t + j < tail_begin ? d : product(tail, d);
    store(place(gradient, p, s.length, t), live, g);
  });
}

// A field of row i, `missing` if there is none.
RLFAST_DEVICE float number(const LossField& f, int64_t i, float missing) {
  if (!f.data) return missing;
  float x[kGroup];
  load(f, {i, 0, 0, 1}, 0, 1, x);
  return x[0];
}

// Sums that are given.
RLFAST_DEVICE Response given(const PreferenceSide& s, int64_t i) {
  float logp = number(s.logp, i, 0.0f);
  return {logp, logp - number(s.ref_logp, i, 0.0f), s.lengths ? s.lengths[i] : 1.0f};
}

// ℓ = w·Σ weight·link(s), ∂loss/∂S = factor/n·w·Σ weight·∂link/∂s·∂s/∂S, and the rewards: the first term's scores.
template <class Objective, int kSides>
RLFAST_DEVICE void evaluate(const Preference<kSides>& a, float scale, Row<kSides>& row) {
  float loss = 0.0f, d[kSides] = {};
  for (int k = 0; k < a.count; ++k) {
    const Term& term = a.terms[k];
    Score s[kSides];
    float all = 0.0f;
    bool numbers = true;
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      s[side] = scored(term, row.response[side]);
      all += s[side].value;
      numbers = numbers && s[side].value == s[side].value;
    }
    if (k == 0) {
#pragma unroll
      for (int side = 0; side < kSides; ++side) row.reward[side] = product(term.weight, s[side].value);
      continue;
    }
    Linked<kSides> linked = Objective::link(term, s, row);
    // a formula's minimum and maximum may drop a NaN
    loss += product(term.weight, numbers ? linked.value : all);
#pragma unroll
    for (int side = 0; side < kSides; ++side) d[side] += product(term.weight, product(s[side].d_logp, linked.d[side]));
  }
  bool used = row.weight != 0.0f;  // what is left out may be infinite
  row.loss = used ? product(row.weight, loss) : 0.0f;
#pragma unroll
  for (int side = 0; side < kSides; ++side) row.d[side] = used ? product(product(scale, row.weight), d[side]) : 0.0f;
}

// One row: `sum` gets what the thread that answers for it adds.
template <class Objective, int kSides>
RLFAST_DEVICE void take_row(const Preference<kSides>& a, float scale, int64_t i, bool tokens,
                            double (&sum)[Objective::kSlots]) {
  Row<kSides> row = {};
  Piece p[kSides] = {};
  int64_t tails[kSides];
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    tails[side] = INT64_MAX;
    if (tokens)
      p[side] = tokens_of(a.sides[side], i);
    else
      row.response[side] = given(a.sides[side], i);
  }
  if constexpr (kSides == 2)
    if (tokens && a.tail != 1.0f) find_tails(a.sides, p, tails);
  if (tokens) sum_tokens(a, p, tails, row.response);
  row.margin = number(a.rest.margin, i, 0.0f), row.extra = number(a.rest.extra, i, 0.0f);
  row.shared = number(a.rest.shared, i, 0.0f), row.weight = number(a.rest.weights, i, 1.0f);
  row.desirable = a.desirable.data && a.desirable.data[i * a.desirable.stride];
  evaluate<Objective>(a, scale, row);
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    float* gradient = a.out.d_logp[side];
    if (gradient && tokens) pull_back(a.sides[side], p[side], tails[side], a.tail, row.d[side], gradient);
    if (gradient && !tokens) gradient[i] = row.d[side];
  }
  if (tokens && threadIdx.x != 0) return;
  if (a.out.losses) a.out.losses[i] = row.loss;
#pragma unroll
  for (int side = 0; side < kSides; ++side)
    if (a.out.rewards[side]) a.out.rewards[side][i] = row.reward[side];
  if (row.weight != 0.0f) Objective::add(row, sum);
}

// Everything; what a kernel is. Grid: at most a.pieces.
template <class Objective, int kSides>
RLFAST_DEVICE void run(const Preference<kSides>& a) {
  static_assert(3 * kSides <= Objective::kSlots, "sum_tokens takes no more shared memory than the slots");
  double n = a.rest.num_items ? double(*a.rest.num_items) : a.sum ? 1.0 : double(a.rows);
  double scale = a.factor / (n > 0.0 ? n : 1.0);
  bool tokens = a.sides[0].tokens;
  for (int64_t piece = blockIdx.x; piece < a.pieces; piece += gridDim.x) {
    double sum[Objective::kSlots] = {};
    for (int64_t unit = piece; unit < a.units; unit += a.pieces) {
      int64_t i = tokens ? unit : unit * kLossThreads + threadIdx.x;
      if (i < a.rows) take_row<Objective>(a, float(scale), i, tokens, sum);
    }
    block_total(sum);
    give_partial(a.partial, a.pieces, piece, sum);
  }
  if (!last_block(a.finished)) return;
  double total[Objective::kSlots] = {};
  take_partial(a.partial, a.pieces, total);
  block_total(total);
  if (threadIdx.x == 0) *a.out.loss = Objective::finish(total, scale, a.out.metrics);
}

int64_t units_of(int64_t rows, bool tokens) { return tokens ? rows : ceil_div(rows, kLossThreads); }
int64_t pieces_of(int64_t rows, bool tokens) { return std::min(units_of(rows, tokens), kMostPieces); }

// The place of a formula among those that are compiled in.
template <size_t kCount>
int number_of(const char* const (&names)[kCount], const char* name) {
  for (size_t i = 0; i < kCount; ++i)
    if (!std::strcmp(names[i], name)) return int(i);
  throw std::invalid_argument(std::string("formula: not compiled in: ") + name);
}

#define RLFAST_NAME(name, Hyper) #name,
constexpr const char* kScoreNames[] = {RLFAST_SCORE_FORMULAS(RLFAST_NAME)};
#undef RLFAST_NAME

// The call as a kernel takes it, with its terms; the sides are still to come.
template <int kSides, size_t kCount>
Preference<kSides> preference_of(const PreferenceCall& call, const char* const (&links)[kCount],
                                 const PreferenceSide (&sides)[kSides], const PreferenceRest& rest, int64_t rows,
                                 const PreferenceOut& out, double* scratch, unsigned* finished) {
  Preference<kSides> a = {};
  std::copy_n(sides, kSides, a.sides);
  a.rest = rest, a.out = out, a.count = call.count, a.sum = call.sum, a.tail = call.tail, a.factor = call.factor;
  for (int k = 0; k < call.count; ++k) {
    const PreferenceTerm& from = call.terms[k];
    Term& to = a.terms[k];
    to.score = number_of(kScoreNames, from.score), to.link = k ? number_of(links, from.link) : -1;
    to.mean = from.mean, to.weight = from.weight;
    std::copy_n(from.score_hyper, 2, to.score_hyper), std::copy_n(from.link_hyper, 4, to.link_hyper);
  }
  a.rows = rows, a.units = units_of(rows, sides[0].tokens), a.pieces = pieces_of(rows, sides[0].tokens);
  a.partial = scratch, a.finished = finished;
  return a;
}

}  // namespace

}  // namespace rlfast::cuda
