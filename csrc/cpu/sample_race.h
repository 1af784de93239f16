// The race for a token: who has the largest (w − peak)/T + g of what is kept.
//
// Nearly nobody gets a g. A leaf is skipped where its peak with the largest possible g does not reach the leader; the words of a
// draw are compared with the least that could at the peak of their leaf; and logarithms are taken where a column's own word could.
#pragma once
#include <algorithm>

#include "../rlfast/noise.h"
#include "../rlfast/row_stats.h"
#include "sample_cut.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

struct Leader {
  float value;
  int64_t id;  // −1: nobody
  // Of equal ones the lowest id leads, whoever came first.
  bool behind(const Leader& other) const {
    return other.id >= 0 && (other.value > value || (other.value == value && other.id < id));
  }
};

// A vector of a leaf's n columns, −inf beyond them.
inline F part(const float* y, int n, int i) {
  const int left = n - i;
  return left >= kLanes ? load(y + i) : left > 0 ? load_part(y + i, left, -kInf) : set1(-kInf);
}

class Race {
public:
  Race(const Noise& noise, float peak, float temperature, float least)
      : noise_(noise), peak_(peak), temperature_(temperature), least_(least) {}

  // Whether nothing of a leaf reaches the leader.
  bool beyond(const Leader& leader, float leaf_peak) const { return leaf_peak < least_column(leader); }

  // The columns y [n] of ids from `first` on.
  void run(const float* y, int n, int64_t first, float leaf_peak, Leader* leader) const {
    static_assert(kDrawn == 2 * kLanes, "a draw is two vectors of columns");
    Bar at = bar(*leader, leaf_peak);
    for (int i = 0; i < n; i += kCrowd) {
      F x[2 * kDraws], tallest = set1(-kInf);
#pragma GCC unroll 8
      for (int v = 0; v < 2 * kDraws; ++v) tallest = max(x[v] = part(y, n, i + v * kLanes), tallest);
      if (!any(at_least(tallest, set1(at.column)))) continue;
      W words[kDraws][4], largest[kDraws], crowd = set1_word(0);
      noise_.draw(first + i, words);
#pragma GCC unroll 4
      for (int d = 0; d < kDraws; ++d) {
        largest[d] = max_word(max_word(words[d][0], words[d][1]), max_word(words[d][2], words[d][3]));
        crowd = max_word(crowd, largest[d]);
      }
      if (!words_at_least(crowd, at.word)) continue;
      for (int d = 0; d < kDraws; ++d) {
        const int from = i + d * kDrawn;
        if (!words_at_least(largest[d], at.word) || !promising(y + from, n - from, words[d], at, *leader)) continue;
        if (challenge(x + 2 * d, words[d], first + from, leader)) at = bar(*leader, leaf_peak);
      }
    }
  }

private:
  // What a column and a word must reach to take the lead.
  struct Bar {
    float column;
    W word;
  };
  float least_column(const Leader& leader) const {
    if (leader.id < 0) return least_;
    return std::max(least_, float_below(peak_ + static_cast<double>(temperature_) * (leader.value - kMostNoise)));
  }
  Bar bar(const Leader& leader, float leaf_peak) const {
    if (leader.id < 0) return {least_, set1_word(0)};
    return {least_column(leader), set1_word(least_word(leader.value - distance(leaf_peak)))};
  }
  double distance(float x) const { return (static_cast<double>(x) - peak_) / temperature_; }

  // Whether a column of a draw may take the lead. Where few words reach the bar of the leaf, each is held to its own, by
  // −log u ≥ 1 − u: an exponential in place of two logarithms.
  bool promising(const float* y, int n, const W* words, const Bar& at, const Leader& leader) const {
    uint32_t reached[4];
    int count = 0;
    for (int j = 0; j < 4; ++j) count += __builtin_popcount(reached[j] = words_at_least(words[j], at.word));
    if (count > 4) return true;
    alignas(64) uint32_t word[kDoubles];
    for (int j = 0; j < 4; ++j) {
      if (reached[j]) store_words(word, words[j]);
      for (uint32_t found = reached[j]; found; found &= found - 1) {
        const int i = __builtin_ctz(found), column = 4 * i + j;
        if (column >= n || !(y[column] >= at.column)) continue;
        const double rest = (0x1p24 - 0.5 - word[i] / kWordOfNumber) * 0x1p-24;
        if (rest <= 1.0001 * std::exp(distance(y[column]) - leader.value)) return true;
      }
    }
    return false;
  }

  // Whether one of the columns of a draw takes the lead.
  bool challenge(const F* x, const W* words, int64_t first, Leader* leader) const {
    alignas(64) uint32_t number[kDrawn], word[kDoubles];
    for (int j = 0; j < 4; ++j) {
      store_words(word, words[j]);
      for (int i = 0; i < kDoubles; ++i) number[4 * i + j] = word[i] / kWordOfNumber;
    }
    bool changed = false;
    alignas(64) float value[kLanes];
    for (int half = 0; half < 2; ++half) {
      const F g = gumbel(float_of_words(number + half * kLanes));
      const F d = div(sub(x[half], set1(peak_)), set1(temperature_));
      const F perturbed = select(at_least(x[half], set1(least_)), add(d, g), set1(-kInf));
      uint32_t found = bits(both(at_least(perturbed, set1(leader->value)), greater(perturbed, set1(-kInf))));
      if (!found) continue;
      store(value, perturbed);
      for (; found; found &= found - 1) {
        const int lane = __builtin_ctz(found);
        const Leader challenger{value[lane], first + half * kLanes + lane};
        if (!leader->behind(challenger)) continue;
        *leader = challenger, changed = true;
      }
    }
    return changed;
  }

  Noise noise_;
  float peak_, temperature_, least_;
};

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
