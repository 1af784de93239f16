// A leaf of the vocabulary in the registers of one warp, and its sums.
#pragma once
#include "row_math.cuh"

namespace rlfast::cuda {

namespace {

constexpr int kPerLane = kLeaf / kWarp;  // columns of a leaf in one lane

template <class T>
RLFAST_DEVICE typename T::Bits* row_of(const Logits& logits, int64_t row) {
  return static_cast<typename T::Bits*>(logits.data) + logits.offset(row);
}

RLFAST_DEVICE int misalignment(const void* p) { return int(reinterpret_cast<uintptr_t>(p) & 15); }

// What a warp holds of a leaf: lane l, vector i, element j is column begin + (32·i + l)·width + j.
template <class T>
struct LeafTile {
  static constexpr int kWidth = T::kWidth, kVectors = kPerLane / kWidth;
  Vector raw[kVectors];

  // A lane's columns begin at first(lane); a slot's place beyond that is a constant.
  static RLFAST_DEVICE int first(int lane) { return lane * kWidth; }
  static RLFAST_DEVICE constexpr int beyond(int slot) { return slot / kWidth * kWarp * kWidth + slot % kWidth; }
  static RLFAST_DEVICE int column(int slot, int lane) { return first(lane) + beyond(slot); }
  static RLFAST_DEVICE int lane_of(int column) { return column / kWidth % kWarp; }
  static RLFAST_DEVICE int slot_of(int column) { return column / kWidth / kWarp * kWidth + column % kWidth; }

  // A leaf that is whole and aligned.
  RLFAST_DEVICE void load_whole(const void* row, int64_t begin, int lane) {
    const typename T::Bits* p = static_cast<const typename T::Bits*>(row) + begin + lane * kWidth;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) raw[i] = load16<true>(p + i * kWarp * kWidth);
  }

  RLFAST_DEVICE void load(const void* row, int64_t begin, int64_t vocab, int shift, int lane) {
    if (shift == 0 && begin + kLeaf <= vocab) return load_whole(row, begin, lane);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      raw[i] = load_columns<T, true>(row, begin + (i * kWarp + lane) * kWidth, vocab, shift);
  }

  // z of every column, −inf beyond the vocabulary's end.
  RLFAST_DEVICE void values(float (&z)[kPerLane], const RowTransform& t, int64_t left, int lane) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) unpack<T>(raw[i], z + i * kWidth);
    if (t.plain) return;
#pragma unroll
    for (int s = 0; s < kPerLane; ++s) z[s] = t(z[s]);
    if (left >= kLeaf) return;
    int mine = int(left) - first(lane);
#pragma unroll
    for (int s = 0; s < kPerLane; ++s) z[s] = beyond(s) < mine ? z[s] : -INFINITY;
  }
};

RLFAST_DEVICE float lane_max(const float (&z)[kPerLane]) {
  float m = z[0];
#pragma unroll
  for (int s = 1; s < kPerLane; ++s) m = fmaxf(m, z[s]);
  return m;
}

// Σ exp(z − reference) over a leaf.
RLFAST_DEVICE float sum_e(const float (&z)[kPerLane], float reference) {
  float e[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int s = 0; s < kPerLane; ++s) e[s % 4] += exponential(max_nan(z[s] - reference, kFloor));
  return warp_sum((e[0] + e[1]) + (e[2] + e[3]));
}

template <class T>
RLFAST_DEVICE LeafSums sum_moments(const float (&z)[kPerLane], float reference, int64_t left, int lane) {
  int mine = int(min(left, kLeaf)) - LeafTile<T>::first(lane);
  float e[4] = {}, ex[4] = {}, ee[4] = {}, sz[4] = {};
#pragma unroll
  for (int s = 0; s < kPerLane; ++s) {
    float x = max_nan(z[s] - reference, kFloor), one = exponential(x);
    e[s % 4] += one;
    ex[s % 4] = fmaf(one, x, ex[s % 4]);
    ee[s % 4] = fmaf(one, one, ee[s % 4]);
    sz[s % 4] += LeafTile<T>::beyond(s) < mine ? z[s] : 0.0f;
  }
  return {warp_sum((e[0] + e[1]) + (e[2] + e[3])), warp_sum((ex[0] + ex[1]) + (ex[2] + ex[3])),
          warp_sum((ee[0] + ee[1]) + (ee[2] + ee[3])), warp_sum((sz[0] + sz[1]) + (sz[2] + sz[3]))};
}

// Whether the row counts: not masked, and if it has candidates, one is not −100. All lanes of the warp take part.
RLFAST_DEVICE bool counts(const Targets& targets, int64_t row, int lane) {
  if (targets.mask && !targets.mask[row]) return false;
  if (targets.candidates == 0) return true;
  const int64_t* ids = targets.ids + row * targets.candidates;
  bool any = false;
  for (int64_t k = lane; k < targets.candidates; k += kWarp) any |= ids[k] != kIgnoreIndex;
  return __ballot_sync(kAllLanes, any) != 0;
}

}  // namespace

}  // namespace rlfast::cuda
