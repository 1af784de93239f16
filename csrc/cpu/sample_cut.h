// Where the numbers of a row are cut: the largest t such that the weight of those ≥ t reaches a given one. Weights of 1 give the
// k-th largest, probabilities the nucleus of top-p. A radix search over the bits of the floats: exact, three passes, no sort.
#pragma once
#include <algorithm>
#include <vector>

#include "../rlfast/row_stats.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// Floats as integers of the same order.
inline uint32_t key_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
inline float float_of_key(uint32_t key) {
  const uint32_t u = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// The largest float that is not above x.
inline float float_below(double x) {
  const float y = static_cast<float>(x);
  return static_cast<double>(y) > x ? std::nextafter(y, -kInf) : y;
}

// The least float that is not below x.
inline float float_above(double x) { return -float_below(-x); }

// Numbers that may be kept; weights are there if a mass is asked for.
struct Candidates {
  std::vector<uint32_t> keys;
  std::vector<float> weights;

  void clear() { keys.clear(), weights.clear(); }
  double mass() const {
    double sum = 0.0;
    for (float w : weights) sum += w;
    return sum;
  }
  void drop_below(float least) {
    size_t kept = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      if (!(float_of_key(keys[i]) >= least)) continue;
      keys[kept] = keys[i], weights[kept++] = weights[i];
    }
    keys.resize(kept), weights.resize(kept);
  }
};

class Cut {
public:
  // −inf if all of them do not reach `wanted`.
  float kth(const Candidates& c, int64_t k) {
    return search<false>(c.keys.data(), nullptr, c.keys.size(), static_cast<double>(k));
  }
  float nucleus(const Candidates& c, double wanted) {
    return search<true>(c.keys.data(), c.weights.data(), c.keys.size(), wanted);
  }

private:
  static constexpr uint32_t kBuckets = 2048;

  template <bool kWeighed>
  float search(const uint32_t* key, const float* weight, size_t n, double wanted) {
    rest_.keys.resize(n), rest_.weights.resize(kWeighed ? n : 0);
    double above = 0.0;
    uint32_t found = 0;
    for (const int shift : {21, 10, 0}) {
      const uint32_t last = shift ? kBuckets - 1 : kBuckets / 2 - 1;
      std::fill(weight_, weight_ + kBuckets, 0.0);
      for (size_t i = 0; i < n; ++i) weight_[(key[i] >> shift) & last] += kWeighed ? weight[i] : 1.0;
      int64_t bucket = last, least = -1;
      for (; bucket >= 0; --bucket) {
        if (weight_[bucket] == 0.0) continue;
        if (above + weight_[bucket] >= wanted) break;
        above += weight_[bucket], least = bucket;
      }
      if (bucket < 0) {
        if (shift == 21) return -kInf;
        bucket = least,
        above -= weight_[bucket];  // sums in another order: the bucket reached it, its parts fall short by an ulp
      }
      found |= static_cast<uint32_t>(bucket) << shift;
      size_t kept = 0;
      for (size_t i = 0; i < n; ++i) {
        if (((key[i] >> shift) & last) != static_cast<uint32_t>(bucket)) continue;
        if constexpr (kWeighed) rest_.weights[kept] = weight[i];
        rest_.keys[kept++] = key[i];
      }
      key = rest_.keys.data(), weight = rest_.weights.data(), n = kept;
    }
    return float_of_key(found);
  }

  double weight_[kBuckets];
  Candidates rest_;
};

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
