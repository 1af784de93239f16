// A tile: some tokens of one sequence in float32, whole vectors of them, and what its stages leave for one another in L1.
#pragma once
#include <algorithm>

#include "../rlfast/formula_vec.h"
#include "../rlfast/token_loss.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// A kilobyte a field: a dozen fields and what is between the stages stay in an L1 cache of 32 KiB. Lanes add up to
// kTile / kLanes numbers in float32 before they go to doubles.
constexpr int64_t kTile = 256;

inline M every() { return equal(set1(0.0f), set1(0.0f)); }
inline M when(bool yes) { return equal(set1(yes ? 1.0f : 0.0f), set1(1.0f)); }
inline int count(M m) { return __builtin_popcount(bits(m)); }

// Values along a tile; walk is 0 where one vector stands for all, else −1.
struct Values {
  const float* at;
  int64_t walk;
  F operator[](int64_t i) const { return load(at + (i & walk)); }
};

struct Flags {
  const uint8_t* at;
  int64_t walk;
  M operator[](int64_t i) const { return load_flags(at + (i & walk)); }
};

// Tokens begin … begin + n of a row; of packed tokens the row is 0.
struct Span {
  int64_t row, begin, n;
};

// The next tile of a span: whole vectors, and then what is left.
inline Span tile_of(const Span& s, int64_t done) {
  const int64_t left = s.n - done;
  const int64_t n = left >= kTile ? kTile : left >= kLanes ? left / kLanes * kLanes : left;
  return {s.row, s.begin + done, n};
}

struct Tile {
  Span span;
  int64_t padded;  // n, up to whole vectors
  // adv is what the surrogate sees: own_adv, or the sequence's mean
  Values logp, old_logp, ref_logp, rollout_logp, own_adv, adv, entropy, weights, extra;
  Flags mask, keep;

  void open(const LossFields& f, const Span& s);

  enum { kFields = 8 };
  alignas(64) float fields[kFields][kTile];
  alignas(64) float multiplier[kTile];  // of the surrogate
  alignas(64) float applied[kTile];     // ρ
  alignas(64) float kl_logp[kTile];     // beta·∂KL by log p, and by the unit's log-ratio
  alignas(64) float kl_ratio[kTile];
  alignas(64) float out[kTile];  // a gradient that is not whole vectors
  alignas(64) uint8_t mask_bytes[kTile], keep_bytes[kTile];

private:
  Values values(const LossField& f, float* buffer);
  Flags flags(const LossFlags& f, uint8_t* buffer);
};

alignas(64) inline constexpr float kZeros[kLanes] = {};

template <class T>
void converted(const T* x, int64_t n, int64_t padded, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
  if (i < padded) store(y + i, load_part(x + i, static_cast<int>(n - i), 0.0f));
}

inline Values Tile::values(const LossField& f, float* buffer) {
  if (!f.data) return {kZeros, 0};
  const int64_t offset = span.row * f.stride + span.begin * f.step, n = f.step ? span.n : 1;
  const int64_t whole = f.step ? padded : kLanes;
  switch (f.dtype) {
    case DType::f32:
      if (n == whole) return {static_cast<const float*>(f.data) + offset, -1};
      converted(static_cast<const float*>(f.data) + offset, n, whole, buffer);
      break;
    case DType::bf16:
      converted(static_cast<const bf16*>(f.data) + offset, n, whole, buffer);
      break;
    case DType::f16:
      converted(static_cast<const f16*>(f.data) + offset, n, whole, buffer);
      break;
  }
  if (f.step) return {buffer, -1};
  std::fill_n(buffer, kLanes, buffer[0]);
  return {buffer, 0};
}

// False beyond the end, whatever the field: the lanes there are masked tokens.
inline Flags Tile::flags(const LossFlags& f, uint8_t* buffer) {
  const uint8_t* at = f.data ? f.data + span.row * f.stride + span.begin : nullptr;
  if (at && span.n == padded) return {at, -1};
  std::fill_n(buffer, kTile, uint8_t{0});
  if (at) {
    std::copy_n(at, span.n, buffer);
  } else {
    std::fill_n(buffer, span.n, uint8_t{1});
  }
  return {buffer, -1};
}

inline void Tile::open(const LossFields& f, const Span& s) {
  span = s;
  padded = (s.n + kLanes - 1) / kLanes * kLanes;
  logp = values(f.logp, fields[0]);
  old_logp = f.old_logp.data ? values(f.old_logp, fields[1]) : logp;
  ref_logp = values(f.ref_logp, fields[2]);
  rollout_logp = values(f.rollout_logp, fields[3]);
  adv = own_adv = values(f.adv, fields[4]);
  entropy = values(f.entropy, fields[5]);
  weights = values(f.weights, fields[6]);
  extra = values(f.extra, fields[7]);
  mask = flags(f.mask, mask_bytes);
  if (f.keep.data) keep = flags(f.keep, keep_bytes);
}

// What a thread adds up of its tokens, in the order of the tokens.
enum Sum { kPolicy, kKl, kEntropy, kKeptEntropy, kX, kK3, kRatio, kWeight, kWeightSq, kDrift, kSums };

struct Sums {
  D of[kSums];
  F ratio_max, drift_max;
  int64_t low, high, used, kept;

  void clear() {
    for (D& d : of) d = zero_double();
    ratio_max = drift_max = set1(0.0f);
    low = high = used = kept = 0;
  }
  void add(Sum which, F x) { of[which] = accumulate(of[which], x); }
  double total(Sum which) const { return reduce_add(of[which]); }
};

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
