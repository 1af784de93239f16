// The recurrences of affine_scan, on a group of up to kRows rows, in float64.
#pragma once
#include "scan_tile.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// Tokens [low, high) of a row; `segment` counts from where the recurrence starts, `first` is the valid token that it meets first.
struct Span {
  int64_t row, low, high, segment, first;
};

// G = p·carry + q of a segment; while its outputs are computed, q is the carry.
struct Map {
  double p[2], q[2];
};

enum class Pass { whole, maps, outputs };

// The carry beyond a segment. A product of 0 says that an episode began inside: what was there before is forgotten.
inline double after_segment(double p, double carry, double q) { return p == 0.0 ? q : std::fma(p, carry, q); }

// The state of each row: V', and G' = p·carry + q for one or two λ.
struct State {
  alignas(64) double value[kRows], started[kRows], count[kRows];
  alignas(64) double p[2][kRows], q[2][kRows], carry[2][kRows];
};

// γ, γ(1 − λ) and γλ of each row, for λ of the advantages and of the returns.
struct Rates {
  alignas(64) double gamma[kRows], now[2][kRows], later[2][kRows], row_reward[kRows], start[kRows];
  bool by_token;
};

// The tiles of the inputs that are given.
struct Inputs {
  Tile rewards, values, log_ratio, kl, coefficients, next_values, valid, there, done, truncated;
};

// A group's rows are kParts vectors of doubles.
constexpr int kParts = kRows / kDoubles;
inline D part(const float* x, int h) { return widen_load(x + h * kDoubles); }

// How far ahead of the tile the inputs are fetched: sixteen lines a row (1.4 times as fast as none at [256, 8192]).
constexpr int kAhead = 16 * kSteps;

inline double rate_at(const ScanIn& in, const Rate& r, const Span& s, int64_t t) {
  return !r.data ? r.one : r.data[r.by_token ? in.begin(s.row, in.steps) + t : s.row];
}

inline void set_rates(const ScanIn& in, const Span& s, int64_t t, int lane, Rates* to) {
  const double g = rate_at(in, in.gamma, s, t);
  to->gamma[lane] = g;
  for (int c = 0; c < 2; ++c) {
    const double l = rate_at(in, c && in.decoupled ? in.critic_lam : in.lam, s, t);
    to->now[c][lane] = g * (1.0 - l);
    to->later[c][lane] = g * l;
  }
}

// exp(x) in float64, to 1e-11: a product of unclipped ratios adds up the errors of its factors. 2^n is made in the exponent.
inline D ratio_of(D log_ratio) {
  typedef int64_t I __attribute__((vector_size(sizeof(D))));
  const D most = set1_double(700.0), least = sub(zero_double(), min(most, sub(zero_double(), log_ratio)));
  const D x = min(most, least), magic = set1_double(0x1.8p52), biased = fma(x, set1_double(1.4426950408889634), magic);
  const D n = sub(biased, magic), r = fma(n, set1_double(-0.6931471805599453), x);
  D sum = set1_double(1.0 / 362880.0);
  for (double c : {1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0})
    sum = fma(sum, r, set1_double(c));
  return mul(sum, (D)(((I)biased + 1023) << 52));
}

enum class Kind { gae, vtrace, bare, forward };

// Sixteen tokens of what is usual, in few instructions:
//   gae      G = r + γ(1 − λ)·V' + γλ·G', the advantage G − V
//   vtrace   G = V + ρ·δ + γλc·(G' − V'), the advantage ρ'·(δ + γλ(G' − V')), δ = r + γV' − V
//   bare     G = r + a·G'
//   forward  gae from the start of a row to its end, as its derivative goes
template <Kind kKind, bool kMasked>
void plain_steps(const ScanIn& in, const Inputs& x, const Rates& rates, State* s, Tile* advantages, Tile* returns) {
  D v[kParts], g[kParts], gamma[kParts], now[kParts], later[kParts];
  for (int h = 0; h < kParts; ++h) {
    v[h] = load_double(s->value + h * kDoubles), g[h] = load_double(s->q[0] + h * kDoubles);
    gamma[h] = load_double(rates.gamma + h * kDoubles);
    now[h] = load_double(rates.now[0] + h * kDoubles), later[h] = load_double(rates.later[0] + h * kDoubles);
  }
  const D clip_rho = set1_double(in.clip_rho), clip_c = set1_double(in.clip_c), clip_pg = set1_double(in.clip_pg);
  for (int i = 0; i < kSteps; ++i) {
    const int t = kKind == Kind::forward || (kKind == Kind::bare && !in.reverse) ? i : kSteps - 1 - i;
#pragma GCC unroll 2
    for (int h = 0; h < kParts; ++h) {
      const D r = part(x.rewards.x[t], h);
      D value = zero_double(), next, a;
      if constexpr (kKind == Kind::bare) {
        next = a = fma(part(x.coefficients.x[t], h), g[h], r);
      } else {
        value = part(x.values.x[t], h);
        if constexpr (kKind == Kind::vtrace) {
          const D ratio = ratio_of(part(x.log_ratio.x[t], h)), rho = min(clip_rho, ratio), c = min(clip_c, ratio);
          const D delta = sub(fma(gamma[h], v[h], r), value), ahead = sub(g[h], v[h]);
          next = fma(mul(later[h], c), ahead, fma(rho, delta, value));
          a = mul(min(clip_pg, ratio), fma(later[h], ahead, delta));
        } else {
          next = fma(later[h], g[h], fma(now[h], v[h], r));
          a = sub(next, value);
        }
      }
      D back = next;
      if constexpr (kMasked) {
        const DM valid = nonzero(part(x.valid.x[t], h));
        next = select(valid, next, g[h]), v[h] = select(valid, value, v[h]);
        a = select(valid, a, zero_double());
        back = kKind == Kind::bare ? next : select(valid, back, zero_double());
      } else {
        v[h] = value;
      }
      g[h] = next;
      if constexpr (kKind != Kind::bare) narrow_store(advantages->x[t] + h * kDoubles, a);
      narrow_store(returns->x[t] + h * kDoubles, back);
    }
  }
  for (int h = 0; h < kParts; ++h)
    store_double(s->value + h * kDoubles, v[h]), store_double(s->q[0] + h * kDoubles, g[h]);
}

using Stepper = void (*)(const ScanIn&, const Inputs&, const Rates&, State*, Tile*, Tile*);
constexpr Stepper kSteppers[][2] = {
    {plain_steps<Kind::gae, false>, plain_steps<Kind::gae, true>},
    {plain_steps<Kind::vtrace, false>, plain_steps<Kind::vtrace, true>},
    {plain_steps<Kind::bare, false>, plain_steps<Kind::bare, true>},
    {plain_steps<Kind::forward, false>, plain_steps<Kind::forward, true>},
};

// The same with everything that may be asked for: resets, rewards of a whole row, KL in the reward, rates by token, two λ,
// coefficients, segments.
struct GeneralStep {
  const ScanIn& in;
  const Inputs& x;
  const Rates& rates;
  State* s;
  int t, h, chains;
  bool maps;  // leave P and Q of the segment as they are

  D at(const double* row) const { return load_double(row + h * kDoubles); }
  void put(double* row, D value) const { store_double(row + h * kDoubles, value); }
  D token(const Tile& tile) const { return part(tile.x[t], h); }

  // V' = G' = value, and nothing of what came before
  void restart(DM here, D value) const {
    put(s->value, select(here, value, at(s->value)));
    for (int c = 0; c < chains; ++c) {
      put(s->p[c], select(here, zero_double(), at(s->p[c])));
      put(s->q[c], select(here, value, at(s->q[c])));
      put(s->carry[c], select(here, set1_double(-0.0), at(s->carry[c])));
    }
  }

  D reward(DM valid) const {
    D r = in.rewards.data ? token(x.rewards) : zero_double();
    if (in.row_rewards) {
      const D first = select(valid, sub(set1_double(1.0), at(s->started)), zero_double());
      r = add(r, select(nonzero(first), at(rates.row_reward), set1_double(-0.0)));
    }
    if (in.kl.data) r = sub(r, mul(set1_double(in.kl_coef), token(x.kl)));
    return select(valid, r, zero_double());
  }

  void begin(DM valid) const {
    if (in.next_values.data) {
      const DM first = nonzero(select(valid, sub(set1_double(1.0), at(s->started)), zero_double()));
      restart(first, token(x.next_values));
    }
    if (in.truncated.data) {
      const DM here = nonzero(select(valid, token(x.truncated), zero_double()));
      restart(here, in.next_values.data ? token(x.next_values) : zero_double());
    }
    if (in.done.data) restart(nonzero(select(valid, token(x.done), zero_double())), zero_double());
  }

  // After kScanSegment tokens, what was computed becomes the carry of the next ones.
  void end(DM update, DM valid) const {
    put(s->started, select(valid, set1_double(1.0), at(s->started)));
    const D count = add(at(s->count), select(update, set1_double(1.0), zero_double()));
    put(s->count, count);
    if (maps) return;
    alignas(64) double counts[kDoubles];
    store_double(counts, count);
    for (int l = 0; l < kDoubles; ++l) {
      if (counts[l] < static_cast<double>(kScanSegment)) continue;
      const int lane = h * kDoubles + l;
      s->count[lane] = 0.0;
      for (int c = 0; c < chains; ++c) {
        s->carry[c][lane] = after_segment(s->p[c][lane], s->carry[c][lane], s->q[c][lane]);
        s->p[c][lane] = 1.0, s->q[c][lane] = -0.0;
      }
    }
  }

  void run(D* advantage, D* back) const {
    const DM valid = nonzero(token(x.valid)), update = in.zero ? nonzero(token(x.there)) : valid;
    begin(valid);
    const D v = at(s->value), r = reward(valid), gamma = at(rates.gamma);
    const D value = in.values.data ? select(valid, token(x.values), zero_double()) : zero_double();
    D next[2] = {zero_double(), zero_double()};
    for (int c = 0; c < chains; ++c) {
      D later = at(rates.later[c]), source = fma(at(rates.now[c]), v, r);
      const D p = at(s->p[c]), q = at(s->q[c]), carry = at(s->carry[c]);
      const D g = fma(p, carry, q);
      if (in.vtrace) {
        const D ratio = ratio_of(select(valid, token(x.log_ratio), zero_double()));
        const auto clipped = [&](float clip) { return min(set1_double(clip), ratio); };
        const D delta = sub(fma(gamma, v, r), value);
        *advantage = mul(clipped(in.clip_pg), fma(later, sub(g, v), delta));
        later = mul(later, clipped(in.clip_c));
        // γλc·(G' − V') with G' = P·carry + Q
        source = fma(clipped(in.clip_rho), delta, value);
        put(s->q[c], select(update, fma(later, sub(q, v), source), q));
      } else {
        if (in.coefficients.data) later = token(x.coefficients), source = r;
        put(s->q[c], select(update, fma(later, q, source), q));
      }
      put(s->p[c], select(update, mul(later, p), p));
      next[c] = fma(at(s->p[c]), carry, at(s->q[c]));
    }
    put(s->value, select(update, value, v));
    if (in.coefficients.data) {
      *advantage = *back = next[0];
    } else {
      if (!in.vtrace) *advantage = select(valid, sub(next[0], value), zero_double());
      *advantage = select(valid, *advantage, zero_double());
      *back = select(valid, next[chains - 1], zero_double());
    }
    end(update, valid);
  }
};

// A token's input at the rows of a group, whatever its dtype.
struct Source {
  const TokenInput* x;
  Reader f32;
  Column<const bf16> low;
  Column<const f16> half;

  void place(const ScanIn& in, const TokenInput& input, int lane, int64_t row, int64_t token) {
    x = &input;
    const int64_t at = in.begin(row, input.stride) + token;
    f32.from.from[lane] = static_cast<const float*>(input.data) + at;
    low.from[lane] = static_cast<const bf16*>(input.data) + at;
    half.from[lane] = static_cast<const f16*>(input.data) + at;
  }
  void load(const Window& w, Tile* to) {
    if (!x->data) return;
    if (x->dtype == DType::f32) return f32.load(w, to);
    return x->dtype == DType::bf16 ? load_tile(low, w, to) : load_tile(half, w, to);
  }
};

struct Flags {
  bool given;
  Column<const uint8_t> u8;

  void place(const ScanIn& in, const TokenFlags& input, int lane, int64_t row, int64_t token) {
    given = input.data != nullptr;
    u8.from[lane] = given ? input.data + in.begin(row, input.stride) + token : nullptr;
  }
  void load(const Window& w, Tile* to) const {
    if (given) load_tile(u8, w, to);
  }
};

// One group of rows, tile after tile. Lanes beyond the last row repeat it, and write nothing that it does not.
class Group {
public:
  Group(const ScanIn& in, const ScanOut& out, const Span* spans, int lanes, Pass pass, bool streamed, const Map* maps)
      : in_(in), out_(out), spans_(spans), lanes_(lanes), pass_(pass), streamed_(streamed) {
    for (int l = 0; l < kRows; ++l) start_lane(l, std::min(l, lanes - 1), maps);
    rates_.by_token = in.gamma.by_token || in.lam.by_token || (in.decoupled && in.critic_lam.by_token);
    special_ = in.kl.data || in.next_values.data || in.done.data || in.truncated.data || in.decoupled || in.zero ||
               rates_.by_token || pass != Pass::whole || longest_ > kScanSegment;
    if (!in.rewards.data) x_.rewards = {};
    if (!in.values.data) x_.values = {};
  }

  void run(Map* maps) {
    const int64_t tiles = (longest_ + kSteps - 1) / kSteps;
    for (int64_t k = 0; k < tiles; ++k) tile(k);
    advantages_out_.flush(streamed_), returns_out_.flush(streamed_);
    if (pass_ != Pass::maps) return;
    for (int l = 0; l < lanes_; ++l)
      for (int c = 0; c < 2; ++c) maps[l].p[c] = s_.p[c][l], maps[l].q[c] = s_.q[c][l];
  }

private:
  const ScanIn& in_;
  const ScanOut& out_;
  const Span* spans_;
  const int lanes_;
  const Pass pass_;
  const bool streamed_;
  bool special_ = false;
  int64_t longest_ = 0, shortest_ = INT64_MAX;
  Source rewards_, values_, log_ratio_, kl_, coefficients_, next_values_;
  Flags mask_, done_, truncated_;
  Writer advantages_out_, returns_out_;
  Window w_;
  State s_;
  Rates rates_;
  Inputs x_;
  Tile advantages_, returns_;

  const Span& span(int l) const { return spans_[std::min(l, lanes_ - 1)]; }

  // What a lane knows before its first token: a bootstrap value, or for a later segment its carry and the value after it.
  void start_lane(int l, int from, const Map* maps) {
    const Span& s = spans_[from];
    longest_ = std::max(longest_, s.high - s.low), shortest_ = std::min(shortest_, s.high - s.low);
    const double boot = in_.bootstrap ? in_.bootstrap[s.row] : 0.0;
    const bool later = s.segment > 0;
    s_.value[l] = later ? value_after(s) : in_.coefficients.data ? 0.0 : boot;
    s_.started[l] = later && (in_.reverse ? s.first >= s.high : s.first < s.low), s_.count[l] = 0.0;
    for (int c = 0; c < 2; ++c) {
      s_.p[c][l] = later ? 1.0 : 0.0;
      s_.q[c][l] = later ? -0.0 : boot;
      s_.carry[c][l] = later && maps ? maps[from].q[c] : -0.0;
    }
    if (s.low < s.high) set_rates(in_, s, s.low, l, &rates_);
    rates_.row_reward[l] = in_.row_rewards ? in_.row_rewards[s.row] : 0.0;
    place_lane(l, s);
  }

  void place_lane(int l, const Span& s) {
    const int64_t token = in_.reverse ? s.high : s.low;
    rewards_.place(in_, in_.rewards, l, s.row, token), values_.place(in_, in_.values, l, s.row, token);
    log_ratio_.place(in_, in_.log_ratio, l, s.row, token), kl_.place(in_, in_.kl, l, s.row, token);
    coefficients_.place(in_, in_.coefficients, l, s.row, token);
    next_values_.place(in_, in_.next_values, l, s.row, token);
    mask_.place(in_, in_.mask, l, s.row, token), done_.place(in_, in_.done, l, s.row, token);
    truncated_.place(in_, in_.truncated, l, s.row, token);
    advantages_out_.place(out_.advantages, l, in_.begin(s.row, in_.steps) + token);
    returns_out_.place(out_.returns, l, in_.begin(s.row, in_.steps) + token);
  }

  double value_after(const Span& s) const {
    if (!in_.values.data) return 0.0;
    const uint8_t* mask = in_.mask.data ? in_.mask.data + in_.begin(s.row, in_.mask.stride) : nullptr;
    int64_t t = s.high;
    while (mask && !in_.zero && !mask[t]) ++t;
    if (mask && !mask[t]) return 0.0;
    const int64_t at = in_.begin(s.row, in_.values.stride) + t;
    switch (in_.values.dtype) {
      case DType::f32:
        return static_cast<const float*>(in_.values.data)[at];
      case DType::bf16:
        return to_float(static_cast<const bf16*>(in_.values.data)[at]);
      case DType::f16:
        return to_float(static_cast<const f16*>(in_.values.data)[at]);
    }
    return 0.0;
  }

  void place(int64_t k) {
    w_.at = in_.reverse ? -kSteps * (k + 1) : kSteps * k;
    w_.ahead = in_.reverse ? -kAhead : kAhead;
    w_.whole = k < shortest_ / kSteps;
    w_.left = streamed_ ? 0 : shortest_ / kSteps - k;
    for (int l = 0; !w_.whole && l < kRows; ++l) {
      const int there = static_cast<int>(std::clamp<int64_t>(span(l).high - span(l).low - kSteps * k, 0, kSteps));
      w_.first[l] = in_.reverse ? kSteps - there : 0;
      w_.last[l] = in_.reverse ? kSteps : there;
    }
  }

  void load_inputs(bool plain) {
    rewards_.load(w_, &x_.rewards), values_.load(w_, &x_.values), coefficients_.load(w_, &x_.coefficients);
    log_ratio_.load(w_, &x_.log_ratio);
    if (plain) return;
    for (int t = 0; t < kSteps; ++t)
      for (int l = 0; l < kRows; ++l) x_.there.x[t][l] = w_.whole || (t >= w_.first[l] && t < w_.last[l]);
    if (!mask_.given) x_.valid = x_.there;
    mask_.load(w_, &x_.valid);
    if (!special_) return;
    kl_.load(w_, &x_.kl), next_values_.load(w_, &x_.next_values);
    done_.load(w_, &x_.done), truncated_.load(w_, &x_.truncated);
  }

  // Whether a reward of a whole row has not been given yet.
  bool unpaid() const {
    return in_.row_rewards && !std::all_of(s_.started, s_.started + kRows, [](double x) { return x != 0.0; });
  }

  void tile(int64_t k) {
    place(k);
    const bool general = special_ || unpaid();
    const bool full = w_.whole && (!mask_.given || all_set(mask_.u8, w_));
    load_inputs(full && !general);
    if (general) {
      general_steps();
    } else {
      const Kind kind = in_.coefficients.data ? Kind::bare
                        : in_.vtrace          ? Kind::vtrace
                        : in_.reverse         ? Kind::gae
                                              : Kind::forward;
      kSteppers[static_cast<int>(kind)][!full](in_, x_, rates_, &s_, &advantages_, &returns_);
    }
    if (pass_ == Pass::maps) return;
    if (advantages_out_.wanted()) advantages_out_.write(advantages_, w_, streamed_);
    if (returns_out_.wanted()) returns_out_.write(returns_, w_, streamed_);
  }

  void general_steps() {
    const int chains = in_.decoupled ? 2 : 1;
    for (int i = 0; i < kSteps; ++i) {
      const int t = in_.reverse ? kSteps - 1 - i : i;
      for (int l = 0; rates_.by_token && l < kRows; ++l) {
        const int64_t token = (in_.reverse ? span(l).high : span(l).low) + w_.at + t;
        if (x_.there.x[t][l] != 0.0f) set_rates(in_, span(l), token, l, &rates_);
      }
      for (int h = 0; h < kParts; ++h) {
        D advantage, back;
        GeneralStep{in_, x_, rates_, &s_, t, h, chains, pass_ != Pass::whole}.run(&advantage, &back);
        narrow_store(advantages_.x[t] + h * kDoubles, advantage);
        narrow_store(returns_.x[t] + h * kDoubles, back);
      }
    }
  }
};

inline void scan_group(const ScanIn& in, const ScanOut& out, const Span* spans, int lanes, Pass pass, bool streamed,
                       Map* maps) {
  Group(in, out, spans, lanes, pass, streamed, maps).run(maps);
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
