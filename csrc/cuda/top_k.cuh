// A row's largest logits from its leaves' peaks, and the merge kernel that needs them.
#pragma once
#include "forward.cuh"

namespace rlfast::cuda {

namespace {

// A leaf's place in the descending order, ties by the lower id: the best value not yet returned, and the last one that was.
struct Ranking {
  uint32_t *best, *last;  // sort keys, [leaves]; 0: none
  int32_t* last_column;   // within the leaf; −1: nothing returned yet

  static RLFAST_DEVICE Ranking of(float* stats, int64_t leaves) {
    return {reinterpret_cast<uint32_t*>(stats + kSumEX * leaves), reinterpret_cast<uint32_t*>(stats + kSumEE * leaves),
            reinterpret_cast<int32_t*>(stats + kSumZ * leaves)};
  }
  RLFAST_DEVICE bool after(int64_t leaf, uint32_t key, int column) const {
    return last_column[leaf] < 0 || key < last[leaf] || (key == last[leaf] && column > last_column[leaf]);
  }
};

// Returns from `leaf` the lowest column whose key is the leaf's best, and notes the best of what is left; −1 if no column
// has that key.
template <class T>
RLFAST_DEVICE int take_best(const Ranking& rank, int64_t leaf, const float (&z)[kPerLane], int64_t left, int lane) {
  uint32_t best = rank.best[leaf], found = 0xffffffffu;
#pragma unroll
  for (int s = 0; s < kPerLane; ++s) {
    int column = LeafTile<T>::column(s, lane);
    uint32_t key = sort_key(z[s]);
    if (column < left && key == best && rank.after(leaf, key, column)) found = min(found, uint32_t(column));
  }
  found = warp_min(found);
  uint32_t next = 0;
#pragma unroll
  for (int s = 0; s < kPerLane; ++s) {
    uint32_t column = LeafTile<T>::column(s, lane), key = sort_key(z[s]);
    bool remains = key < best || (key == best && found != 0xffffffffu && column > found);
    if (column < left && remains) next = max(next, key);
  }
  next = warp_max(next);
  __syncwarp();
  if (lane == 0) {
    rank.best[leaf] = next;
    if (found != 0xffffffffu) {
      rank.last[leaf] = best;
      rank.last_column[leaf] = int32_t(found);
    }
  }
  __syncwarp();
  return int(found);
}

// The row's top_k largest z in descending order. Each round takes the best of the leaf whose best is largest (the lower leaf on a
// tie) and reads that leaf again.
template <class T>
RLFAST_DEVICE void rank_row(const Forward& f, float* stats, const RowTransform& t, const RowSums& sums, int64_t row,
                            int lane) {
  const ForwardOut& o = f.out;
  int64_t vocab = f.logits.vocab;
  const void* logits = row_of<T>(f.logits, row);
  int shift = misalignment(logits);
  Ranking rank = Ranking::of(stats, f.leaves);
  __syncwarp();
  for (int64_t l = lane; l < f.leaves; l += kWarp) {
    float e = stats[kSumE * f.leaves + l];
    // a NaN is in no leaf's peak, but in its sum
    rank.best[l] = e == e ? sort_key(stats[kPeak * f.leaves + l]) : 0xffffffffu;
    rank.last[l] = 0;
    rank.last_column[l] = -1;
  }
  __syncwarp();
  for (int64_t k = 0; k < o.top_k;) {
    uint32_t best = 0;
    for (int64_t l = lane; l < f.leaves; l += kWarp) best = max(best, rank.best[l]);
    best = warp_max(best);
    uint32_t which = 0xffffffffu;
    for (int64_t l = lane; l < f.leaves; l += kWarp)
      if (rank.best[l] == best) which = min(which, uint32_t(l));
    which = warp_min(which);
    LeafTile<T> tile;
    float z[kPerLane];
    int64_t begin = int64_t(which) * kLeaf;
    tile.load(logits, begin, vocab, shift, lane);
    tile.values(z, t, vocab - begin, lane);
    int column = take_best<T>(rank, which, z, vocab - begin, lane);
    if (column < 0) continue;
    if (lane == 0) {
      o.topk_logp[row * o.top_k + k] = (from_sort_key(best) - sums.peak) - sums.log_sum;
      o.topk_ids[row * o.top_k + k] = begin + column;
    }
    ++k;
  }
}

// Σ p outside the top-k, by summation: a leaf that gave nothing counts whole, the others are summed again.
template <class T>
RLFAST_DEVICE void merge_tail(const Forward& f, float* stats, const RowTransform& t, const RowSums& sums, int64_t row,
                              int lane) {
  int64_t vocab = f.logits.vocab;
  const void* logits = row_of<T>(f.logits, row);
  int shift = misalignment(logits);
  Ranking rank = Ranking::of(stats, f.leaves);
  for (int64_t l = 0; l < f.leaves; ++l) {
    if (rank.last_column[l] < 0) continue;
    LeafTile<T> tile;
    float z[kPerLane];
    int64_t begin = l * kLeaf;
    tile.load(logits, begin, vocab, shift, lane);
    tile.values(z, t, vocab - begin, lane);
#pragma unroll
    for (int s = 0; s < kPerLane; ++s)
      z[s] = rank.after(l, sort_key(z[s]), LeafTile<T>::column(s, lane)) ? z[s] : -INFINITY;
    float e = sum_e(z, reference_of(stats[kPeak * f.leaves + l]));
    if (lane == 0) stats[kSumE * f.leaves + l] = e;
  }
  __syncwarp();
  float tail = 0.0f;
  for (int64_t l = lane; l < f.leaves; l += kWarp)
    tail = fmaf(LeafWeight::of(stats[kPeak * f.leaves + l], sums.peak).weight, stats[kSumE * f.leaves + l], tail);
  tail = warp_sum(tail);
  if (lane == 0) f.out.tail_mass[row] = tail / sums.total;
}

// A warp a row, over the leaf statistics in the scratch buffer.
template <class T>
__global__ void __launch_bounds__(kWarp) merge_kernel(const Forward f) {
  int lane = threadIdx.x;
  for (int64_t row = blockIdx.x; row < f.logits.rows(); row += gridDim.x) {
    if (!counts(f.targets, row, lane)) {
      skip_row(f, row, lane);
      continue;
    }
    float* stats = f.scratch + row * kSlots * f.leaves;
    RowSums sums = merge_row(f, stats, row, lane);
    if (f.out.top_k == 0) continue;
    RowTransform t = RowTransform::of(f.transform, row);
    rank_row<T>(f, stats, t, sums, row, lane);
    merge_tail<T>(f, stats, t, sums, row, lane);
  }
}

}  // namespace

}  // namespace rlfast::cuda
