// Σ over the tokens of a response, in doubles and in the order of the tokens, and the gradient's way back to them.
#pragma once
#include "../rlfast/preference.h"
#include "loss_tile.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// A gradient that is larger than a last-level cache is written past it.
constexpr int64_t kPastCacheBytes = 2 << 20;
constexpr int64_t kAhead = 512;  // tokens: what is read so much later is fetched

struct Tokens {
  int64_t at, n;  // the first token in the side's memory but for the row, and how many
  int64_t row;    // 0 of packed tokens
  int64_t out;    // the first token in a contiguous gradient
};

inline Tokens tokens_of(const PreferenceSide& s, int64_t row) {
  if (s.cu_seqlens) return {s.cu_seqlens[row], s.cu_seqlens[row + 1] - s.cu_seqlens[row], 0, s.cu_seqlens[row]};
  return {0, s.length, row, row * s.length};
}

inline const uint8_t* flags_at(const PreferenceSide& s, const Tokens& t) {
  return s.mask.data ? s.mask.data + t.row * s.mask.stride + t.at : nullptr;
}

// The mask of some lanes from token i on, false beyond the end.
inline M lanes_of(const uint8_t* flags, int64_t i, int64_t n) {
  alignas(64) uint8_t part[kLanes];
  if (flags && i + kLanes <= n) return load_flags(flags + i);
  for (int lane = 0; lane < kLanes; ++lane) part[lane] = i + lane < n && (!flags || flags[i + lane]);
  return load_flags(part);
}

inline int64_t counted(const PreferenceSide& s, int64_t row) {
  const Tokens t = tokens_of(s, row);
  const uint8_t* flags = flags_at(s, t);
  if (!flags) return t.n;
  int64_t n = 0;
  for (int64_t i = 0; i < t.n; i += kLanes) n += count(lanes_of(flags, i, t.n));
  return n;
}

// `tail` in the lanes that come after the first `shared` tokens that count, of which `before` came already; else 1.
inline F tail_weights(M m, int64_t before, int64_t shared, float tail) {
  alignas(64) float w[kLanes];
  const uint32_t set = bits(m);
  for (int lane = 0; lane < kLanes; ++lane) {
    before += (set >> lane) & 1;
    w[lane] = before > shared ? tail : 1.0f;
  }
  return load(w);
}

struct Reduced {
  double logp = 0, ref_logp = 0;
};

template <class T>
double sum_of(const LossField& f, const Tokens& t, const uint8_t* flags, int64_t shared, float tail) {
  const T* x = static_cast<const T*>(f.data) + t.row * f.stride + t.at;
  D total = zero_double(), odd = zero_double();
  int64_t before = 0;
  for (int64_t i = 0; i < t.n; i += kLanes) {
    prefetch(x + i + kAhead);
    const M m = lanes_of(flags, i, t.n);
    F y = i + kLanes <= t.n ? load(x + i) : load_part(x + i, static_cast<int>(t.n - i), 0.0f);
    y = only(m, y);
    if (tail != 1.0f) y = mul(y, tail_weights(m, before, shared, tail)), before += count(m);
    D& into = (i / kLanes) % 2 ? odd : total;  // two chains of sums
    into = accumulate(into, y);
  }
  return reduce_add(add(total, odd));
}

inline double sum_of(const LossField& f, const Tokens& t, const uint8_t* flags, int64_t shared, float tail) {
  if (!f.data) return 0.0;
  switch (f.dtype) {
    case DType::f32:
      return sum_of<float>(f, t, flags, shared, tail);
    case DType::bf16:
      return sum_of<bf16>(f, t, flags, shared, tail);
    default:
      return sum_of<f16>(f, t, flags, shared, tail);
  }
}

inline Reduced reduced(const PreferenceSide& s, int64_t row, int64_t shared, float tail) {
  const Tokens t = tokens_of(s, row);
  const uint8_t* flags = flags_at(s, t);
  return {sum_of(s.logp, t, flags, shared, tail), sum_of(s.ref_logp, t, flags, shared, tail)};
}

// ∂/∂S to each token that counts, 0 to the others.
inline void pull_back(const PreferenceSide& s, int64_t row, float d, int64_t shared, float tail, bool streamed,
                      float* out) {
  const Tokens t = tokens_of(s, row);
  const uint8_t* flags = flags_at(s, t);
  float* g = out + t.out;
  const bool past = streamed && reinterpret_cast<uintptr_t>(g) % (kLanes * sizeof(float)) == 0;
  const F each = set1(d);
  int64_t before = 0;
  for (int64_t i = 0; i < t.n; i += kLanes) {
    const M m = lanes_of(flags, i, t.n);
    F y = only(m, each);
    if (tail != 1.0f) y = mul(y, tail_weights(m, before, shared, tail)), before += count(m);
    if (i + kLanes > t.n) {
      store_part(g + i, y, static_cast<int>(t.n - i));
    } else if (past) {
      stream(g + i, y);
    } else {
      store(g + i, y);
    }
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
