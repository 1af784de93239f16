// The noise of a sampled token: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011) and the Gumbel numbers of its words.
//
//   word of token v    word v % 4 of philox(key: the seed, counter: the position's two halves, v / 4, 0)
//   g = −log(−log u)   u = (n + ½)·2⁻²⁴, n the word's upper 24 bits
#pragma once
#include "formula_vec.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

constexpr int kRounds = 10;
constexpr int kDrawn = 4 * kDoubles;          // tokens of a draw
constexpr int kDraws = kLanes >= 16 ? 4 : 2;  // as many as there are registers for
constexpr int kCrowd = kDraws * kDrawn;
constexpr float kMostNoise = 17.34f;     // −log(−log u) of the largest u is 17.3287
constexpr uint32_t kWordOfNumber = 256;  // n is word / 256

// The words of one row: a seed and a position.
class Noise {
public:
  Noise(int64_t seed, int64_t position)
      : position_{set1_word(static_cast<uint32_t>(position)), set1_word(high_half(position))} {
    uint32_t low = static_cast<uint32_t>(seed), high = high_half(seed);
    for (int r = 0; r < kRounds; ++r) {
      key_[r][0] = set1_word(low), key_[r][1] = set1_word(high);
      low += 0x9E3779B9u, high += 0xBB67AE85u;
    }
  }
  // Word i of out[d][j] is that of token first + kDrawn·d + 4·i + j; first is a multiple of 4. The rounds of a draw wait for one
  // another: several draws go side by side.
  void draw(int64_t first, W (*out)[4]) const {
    const W m0 = set1_word(0xD2511F53u), m1 = set1_word(0xCD9E8D57u);
    W c[kDraws][4];
#pragma GCC unroll 4
    for (int d = 0; d < kDraws; ++d) {
      c[d][0] = position_[0], c[d][1] = position_[1];
      c[d][2] = words_from(static_cast<uint32_t>(first / 4) + d * kDoubles), c[d][3] = set1_word(0);
    }
#pragma GCC unroll 10
    for (int r = 0; r < kRounds; ++r) {
#pragma GCC unroll 4
      for (int d = 0; d < kDraws; ++d) {
        const W a = product(c[d][0], m0), b = product(c[d][2], m1);
        c[d][0] = exclusive_or(high_word(b), c[d][1], key_[r][0]);
        c[d][2] = exclusive_or(high_word(a), c[d][3], key_[r][1]);
        c[d][1] = b, c[d][3] = a;
      }
    }
    std::memcpy(out, c, sizeof c);
  }

private:
  static uint32_t high_half(int64_t x) { return static_cast<uint32_t>(static_cast<uint64_t>(x) >> 32); }
  W position_[2];
  W key_[kRounds][2];
};

// −log(−log u) of integers n < 2^24, within 2 ulps or 2^-23. Of u and 1 − u the one at most ½ is a float32: below 2^23 u is, and
// log u is taken; above it log(1 − v) is log y + (1 − y − v)/y with y = 1 − v as it is rounded.
inline F gumbel(F n) {
  const F one = set1(1.0f), half = set1(0.5f), unit = set1(0x1p-24f);
  const M low = greater(set1(0x1p23f), n);
  const F u = mul(add(n, half), unit), v = mul(sub(sub(set1(0x1p24f), n), half), unit);
  const F y = select(low, u, sub(one, v));
  const F lost = select(low, set1(0.0f), sub(sub(one, y), v));
  const F exponential = negative(add(log_of(y), div(lost, y)));
  return negative(log_of(exponential));
}

// The least word whose Gumbel number may reach t; a hundredth of a promille and two numbers below, for what is rounded on the way.
inline uint32_t least_word(double t) {
  const double n = std::exp(-std::exp(-(t - 1e-5 * (1.0 + std::fabs(t))))) * 0x1p24 - 2.5;
  return n > 0.0 ? static_cast<uint32_t>(n < 0x1p24 ? n : 0x1p24 - 1.0) * kWordOfNumber : 0;
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
