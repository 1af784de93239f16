// A tile: some tokens of one sequence in float32, whole vectors of them, and what its stages leave for one another in L1.
#pragma once
#include <algorithm>

#include "../rlfast/formula_vec.h"
#include "../rlfast/token_loss.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// What a stage costs before its first token and after its last is a fifth of the time at 256; the buffers of the usual
// objectives are below the 32 KiB of an L1 cache.
constexpr int64_t kTile = 1024;

inline M every() { return equal(set1(0.0f), set1(0.0f)); }
inline M when(bool yes) { return equal(set1(yes ? 1.0f : 0.0f), set1(1.0f)); }
inline int count(M m) { return __builtin_popcount(bits(m)); }

// Values along a tile; walk is 0 where one vector stands for all, else −1.
struct Values {
  const float* at;
  int64_t walk;
  F operator[](int64_t i) const { return load(at + (i & walk)); }
  // Fetches what the next tile has there: for the stage that reads a field first, whose arithmetic then hides the memory.
  void ahead(int64_t i) const { prefetch(at + ((i + kTile) & walk)); }
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

// What a stage reads, by value: a store of a vector may alias anything that is in memory.
struct View {
  int64_t padded;  // tokens, up to whole vectors
  // adv is what the surrogate sees: own_adv, or the sequence's mean
  Values logp, old_logp, ref_logp, rollout_logp, own_adv, adv, entropy, weights, extra;
  Flags mask, keep;
};

struct Tile {
  Span span;
  View view;

  void open(const LossFields& f, const Span& s);

  enum { kFields = 8 };
  alignas(64) float fields[kFields][kTile];
  alignas(64) float multiplier[kTile];  // of the surrogate
  alignas(64) float applied[kTile];     // ρ
  alignas(64) float ratio[kTile];       // r
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
  const int64_t whole = f.step ? view.padded : kLanes;
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
  if (at && span.n == view.padded) return {at, -1};
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
  View& v = view;
  v.padded = (s.n + kLanes - 1) / kLanes * kLanes;
  v.logp = values(f.logp, fields[0]);
  v.old_logp = f.old_logp.data ? values(f.old_logp, fields[1]) : v.logp;
  v.ref_logp = values(f.ref_logp, fields[2]);
  v.rollout_logp = f.rollout_logp.data ? values(f.rollout_logp, fields[3]) : v.old_logp;
  v.adv = v.own_adv = values(f.adv, fields[4]);
  v.entropy = values(f.entropy, fields[5]);
  v.weights = values(f.weights, fields[6]);
  v.extra = values(f.extra, fields[7]);
  v.mask = flags(f.mask, mask_bytes);
  if (f.keep.data) v.keep = flags(f.keep, keep_bytes);
}

// The sums that a thread makes of its tokens, in the order of the tokens.
enum Total { kPolicy, kKl, kEntropy, kKeptEntropy, kX, kK3, kRatio, kWeight, kWeightSq, kDrift, kSums };

// A sum in a loop: the terms of a few vectors are added in float32, then they go to doubles.
class Sum {
public:
  void add(F x) { few_ = rlfast::RLFAST_ISA_NS::add(few_, x); }
  void flush() {
    total_ = accumulate(total_, few_);
    few_ = set1(0.0f);
  }
  D sum() const { return accumulate(total_, few_); }

private:
  F few_ = set1(0.0f);
  D total_ = zero_double();
};

// Whether the sums of a loop are to be flushed after the vector at i.
inline bool due(int64_t i) { return (i / kLanes) % 4 == 3; }

struct Sums {
  D of[kSums];
  F ratio_max, drift_max;
  N low, high, used, kept;  // used if the surrogate has a multiplier

  void clear() {
    for (D& d : of) d = zero_double();
    ratio_max = drift_max = set1(0.0f);
    low = high = used = kept = zero_count();
  }
  void add(Total which, F x) { of[which] = accumulate(of[which], x); }
  void add(Total which, const Sum& x) { of[which] = rlfast::RLFAST_ISA_NS::add(of[which], x.sum()); }
  double total(Total which) const { return reduce_add(of[which]); }
};

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
