// token_logps on a GPU: forward and backward.
//
// Forward. One warp takes one leaf of 1024 columns into registers (2 KB of bf16: four 16-byte loads a lane in flight, and the next
// leaf's four behind them; 4 KB of fp32), finds its peak, then its sums relative to that peak: each logit is read once, whatever is asked for.
// The leaf that holds a target is summed again without it, from the same registers. The leaves of a row then merge
// in a tree that depends on the vocabulary alone, so that the bits do not depend on the batch or on how a row is split.
//   many rows: a block a row, leaf statistics in shared memory, merged by the block's first warp: one launch;
//   few rows (decoding), or top-k: a row's leaves over several blocks, statistics in a scratch buffer (20 bytes a leaf), then a
//   merge kernel with a warp a row. Top-k takes one more leaf read per returned id: a leaf is read again only if its peak wins.
// Bytes: N·V·sizeof(logit) read + O(N·K) written; an unaligned row costs no more traffic, its second loads hit the L1.
//
// Backward: one read and one write of N·V, 16 bytes a lane at a time, in place if asked; a skipped row is only written.
//
// A thread-block cluster holding the row in distributed shared memory would also read it once, and so would a bulk-copy pipeline;
// neither lowers the traffic below this. Not yet measured on a GPU.
#include "token_logps.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "row_math.cuh"

namespace rlfast::cuda {

namespace {

constexpr int kPerLane = kLeaf / kWarp;  // columns of a leaf in one lane
constexpr int kForwardWarps = 8, kSplitWarps = 4;
constexpr int kBackwardThreads = 256, kBackwardVectors = 4;
constexpr int64_t kMaxGrid = 2147483647;

// Slots of a leaf's statistics, [kSlots, leaves] a row. Top-k reuses the last three once they are merged.
enum Slot { kPeak, kSumE, kSumEX, kSumEE, kSumZ, kSlots };

struct Forward {
  Logits logits;
  Transform transform;
  Targets targets;
  ForwardOut out;
  float* scratch;  // [rows, kSlots, leaves], or null: shared memory
  int64_t leaves, splits;
  bool moments;  // whether anything beside logp, lse and is_top1 is asked for
};

struct Backward {
  Logits logits;
  Transform transform;
  Targets targets;
  BackwardIn in;
  Logits gradient;
  int64_t tiles;  // of a row
};

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

// Whether the row counts: not masked, and some candidate is not −100. All lanes of the warp take part.
RLFAST_DEVICE bool counts(const Targets& targets, int64_t row, int lane) {
  if (targets.mask && !targets.mask[row]) return false;
  const int64_t* ids = targets.ids + row * targets.candidates;
  bool any = false;
  for (int64_t k = lane; k < targets.candidates; k += kWarp) any |= ids[k] != kIgnoreIndex;
  return __ballot_sync(kAllLanes, any) != 0;
}

// For each candidate in this leaf, until the merge: in logp, Σ without it; in saved_logp, its z; in is_top1, whether no earlier
// column of the leaf reaches the leaf's peak.
template <class T>
RLFAST_DEVICE void leave_out_targets(const Forward& f, float (&z)[kPerLane], float peak, int64_t row, int64_t begin,
                                     int lane) {
  int64_t candidates = f.targets.candidates;
  const int64_t* ids = f.targets.ids + row * candidates;
  int64_t end = min(begin + kLeaf, f.logits.vocab);
  for (int64_t base = 0; base < candidates; base += kWarp) {
    int64_t id = base + lane < candidates ? ids[base + lane] : -1;
    bool here = id >= begin && id < end;
    int at = here ? int(id - begin) : 0;
#pragma unroll 1
    for (unsigned hits = __ballot_sync(kAllLanes, here); hits; hits &= hits - 1) {
      int source = __ffs(hits) - 1;
      int column = __shfl_sync(kAllLanes, at, source);
      int owner = LeafTile<T>::lane_of(column), slot = LeafTile<T>::slot_of(column);
      int left_out = lane == owner ? slot : -1, before = column - LeafTile<T>::first(lane);
      float top = forgotten(peak), mine = 0.0f;
      bool earlier = false;
#pragma unroll
      for (int s = 0; s < kPerLane; ++s) {
        earlier |= z[s] == top && LeafTile<T>::beyond(s) < before;
        mine = s == left_out ? z[s] : mine;
        z[s] = s == left_out ? -INFINITY : z[s];
      }
      float others = sum_e(z, reference_of(top));
#pragma unroll
      for (int s = 0; s < kPerLane; ++s) z[s] = s == left_out ? mine : z[s];
      float target = __shfl_sync(kAllLanes, mine, owner);
      bool first = __ballot_sync(kAllLanes, earlier) == 0;
      if (lane == 0) {
        int64_t k = base + source;
        f.out.logp[row * candidates + k] = others;
        f.out.saved_logp[k * f.logits.rows() + row] = target;
        if (f.out.is_top1) f.out.is_top1[row * candidates + k] = first;
      }
    }
  }
}

RLFAST_DEVICE void skip_row(const Forward& f, int64_t row, int lane) {
  const ForwardOut& o = f.out;
  int64_t candidates = f.targets.candidates, rows = f.logits.rows();
  for (int64_t k = lane; k < candidates; k += kWarp) {
    o.logp[row * candidates + k] = 0.0f;
    o.saved_logp[k * rows + row] = 0.0f;
    if (o.is_top1) o.is_top1[row * candidates + k] = 0;
  }
  for (int64_t k = lane; k < o.top_k; k += kWarp) {
    o.topk_logp[row * o.top_k + k] = 0.0f;
    o.topk_ids[row * o.top_k + k] = -1;
  }
  float* scalars[] = {o.lse, o.entropy, o.peak, o.log_sum, o.saved_entropy, o.log_sum_sq_probs, o.mean_logits, o.tail_mass};
  if (lane == 0)
    for (float* x : scalars)
      if (x) x[row] = 0.0f;
}

// logp and is_top1 of candidate `k` from what its leaf left behind.
RLFAST_DEVICE void merge_target(const Forward& f, const float* stats, float peak, float poison, int64_t row, int64_t k,
                                int lane) {
  const ForwardOut& o = f.out;
  int64_t at = row * f.targets.candidates + k, saved = k * f.logits.rows() + row;
  int64_t id = f.targets.ids[at];
  bool inside = id >= 0 && id < f.logits.vocab;
  float left_out = inside ? o.logp[at] : 0.0f, target = inside ? o.saved_logp[saved] : 0.0f;
  float others = 0.0f;
  bool beaten = false;
  for (int64_t l = lane; l < f.leaves; l += kWarp) {
    float leaf_peak = stats[kPeak * f.leaves + l];
    float sum = inside && l == id / kLeaf ? left_out : stats[kSumE * f.leaves + l];
    others = fmaf(LeafWeight::of(leaf_peak, peak).weight, sum, others);
    beaten |= l < id / kLeaf && leaf_peak == peak;
  }
  others = warp_sum(others);
  beaten = __ballot_sync(kAllLanes, beaten) != 0;
  if (lane != 0) return;
  bool ignored = id == kIgnoreIndex;
  float logp = ignored ? 0.0f : target_logp(others, target - peak) + poison;
  if (o.is_top1) o.is_top1[at] = inside && poison == 0.0f && target == peak && !beaten && o.is_top1[at];
  o.logp[at] = logp;
  o.saved_logp[saved] = logp;
}

struct RowSums {
  float peak, total, log_sum;
};

// Every output of a row but top-k from its leaves' statistics. Lane l takes leaves l, l + 32, … ascending.
RLFAST_DEVICE RowSums merge_row(const Forward& f, const float* stats, int64_t row, int lane) {
  const ForwardOut& o = f.out;
  float peak = -INFINITY;
  for (int64_t l = lane; l < f.leaves; l += kWarp) peak = fmaxf(peak, stats[kPeak * f.leaves + l]);
  peak = reference_of(warp_max(peak));

  const int64_t* ids = f.targets.ids + row * f.targets.candidates;
  bool wild = false;
  for (int64_t k = lane; k < f.targets.candidates; k += kWarp)
    wild |= ids[k] != kIgnoreIndex && (ids[k] < 0 || ids[k] >= f.logits.vocab);
  float poison = __ballot_sync(kAllLanes, wild) != 0 ? NAN : 0.0f;

  LeafSums sums = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int64_t l = lane; l < f.leaves; l += kWarp) {
    LeafWeight w = LeafWeight::of(stats[kPeak * f.leaves + l], peak);
    float e = stats[kSumE * f.leaves + l];
    sums.e = fmaf(w.weight, e, sums.e);
    if (!f.moments) continue;
    sums.ex = fmaf(w.weight, fmaf(e, w.distance, stats[kSumEX * f.leaves + l]), sums.ex);
    sums.ee = fmaf(product(w.weight, w.weight), stats[kSumEE * f.leaves + l], sums.ee);
    sums.z += stats[kSumZ * f.leaves + l];
  }
  float total = warp_sum(sums.e) + poison;
  float log_sum = logf(total);
  if (f.moments) {
    float ex = warp_sum(sums.ex), ee = warp_sum(sums.ee), z = warp_sum(sums.z);
    if (lane == 0) {
      // H = log Σe − Σ e·(z − peak) / Σe: two non-negative terms, nothing cancels
      float entropy = log_sum - ex / total;
      if (o.entropy) o.entropy[row] = entropy;
      if (o.saved_entropy) o.saved_entropy[row] = entropy;
      if (o.log_sum_sq_probs) o.log_sum_sq_probs[row] = logf(ee) - 2.0f * log_sum;
      if (o.mean_logits) o.mean_logits[row] = z / float(f.logits.vocab) + poison;
    }
  }
  if (lane == 0) {
    o.lse[row] = peak + log_sum;
    o.peak[row] = peak;
    o.log_sum[row] = log_sum;
  }
  for (int64_t k = 0; k < f.targets.candidates; ++k)
    merge_target(f, stats, peak, total == total ? 0.0f : NAN, row, k, lane);
  return {peak, total, log_sum};
}

// A block takes the leaves of one split of one row; with no scratch there is one split, and the block merges it.
template <class T>
__global__ void __launch_bounds__(kForwardWarps* kWarp, 2) leaf_kernel(const Forward f) {
  RLFAST_SHARED(float, shared);
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int64_t vocab = f.logits.vocab, work = f.logits.rows() * f.splits;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    int64_t row = item / f.splits, split = item % f.splits;
    bool live = counts(f.targets, row, lane);
    float* stats = f.scratch ? f.scratch + row * kSlots * f.leaves : shared;
    if (live) {
      RowTransform t = RowTransform::of(f.transform, row);
      const void* logits = row_of<T>(f.logits, row);
      int shift = misalignment(logits);
      int64_t leaf = split * warps + warp, stride = f.splits * warps;
      // Leaves that are fetched ahead. An unaligned or partial one would spill registers beside the leaf at hand, and so would fp32,
      // whose 4 KB a leaf keep enough bytes in flight without.
      int64_t whole = shift == 0 && T::kWidth == 8 ? vocab / kLeaf : 0;
      LeafTile<T> next;
      if (leaf < whole) next.load_whole(logits, leaf * kLeaf, lane);
      for (; leaf < f.leaves; leaf += stride) {
        int64_t begin = leaf * kLeaf;
        float z[kPerLane];
        if (leaf >= whole) next.load(logits, begin, vocab, shift, lane);
        next.values(z, t, vocab - begin, lane);
        if (leaf + stride < whole) next.load_whole(logits, begin + stride * kLeaf, lane);
        float peak = warp_max(lane_max(z));
        LeafSums sums = {0.0f, 0.0f, 0.0f, 0.0f};
        if (f.moments)
          sums = sum_moments<T>(z, reference_of(peak), vocab - begin, lane);
        else
          sums.e = sum_e(z, reference_of(peak));
        leave_out_targets<T>(f, z, peak, row, begin, lane);
        if (lane == 0) {
          stats[kPeak * f.leaves + leaf] = peak;
          stats[kSumE * f.leaves + leaf] = sums.e;
          if (f.moments) {
            stats[kSumEX * f.leaves + leaf] = sums.ex;
            stats[kSumEE * f.leaves + leaf] = sums.ee;
            stats[kSumZ * f.leaves + leaf] = sums.z;
          }
        }
      }
    }
    if (f.scratch) continue;
    __syncthreads();
    if (warp == 0) {
      if (live)
        merge_row(f, stats, row, lane);
      else
        skip_row(f, row, lane);
    }
    __syncthreads();
  }
}

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

// Returns from `leaf` the lowest column whose key is the leaf's best, and notes the best of what is left; −1 if no column has that key.
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
RLFAST_DEVICE void rank_row(const Forward& f, float* stats, const RowTransform& t, const RowSums& sums, int64_t row, int lane) {
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
RLFAST_DEVICE void merge_tail(const Forward& f, float* stats, const RowTransform& t, const RowSums& sums, int64_t row, int lane) {
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

// What the backward knows of a row. All lanes of the warp take part.
RLFAST_DEVICE RowGradient row_gradient(const Backward& b, int64_t row, int lane) {
  const BackwardIn& in = b.in;
  int64_t candidates = b.targets.candidates;
  const int64_t* ids = b.targets.ids + row * candidates;
  float g_logp = 0.0f;
  if (in.g_logp)
    for (int64_t k = lane; k < candidates; k += kWarp)
      if (ids[k] != kIgnoreIndex) g_logp += in.g_logp[row * candidates + k];
  bool entropy = in.g_entropy != nullptr;
  return {in.peak[row],
          in.log_sum[row],
          entropy ? in.saved_entropy[row] : 0.0f,
          warp_sum(g_logp),
          in.g_lse ? in.g_lse[row] : 0.0f,
          entropy ? in.g_entropy[row] : 0.0f};
}

// ∂L/∂x at the column of candidate `k`; candidates that repeat it count together.
template <class T>
RLFAST_DEVICE float gradient_at_target(const Backward& b, const RowGradient& g, const RowTransform& t, int64_t row, int64_t k) {
  int64_t candidates = b.targets.candidates;
  const int64_t* ids = b.targets.ids + row * candidates;
  float x = T::to_float(row_of<T>(b.logits, row)[ids[k]]);
  float hit = 0.0f;
  if (b.in.g_logp)
    for (int64_t other = 0; other < candidates; ++other)
      if (ids[other] == ids[k]) hit += b.in.g_logp[row * candidates + other];
  return product(g.at_target(t(x), b.in.saved_logp[k * b.logits.rows() + row], hit), t.slope(x));
}

template <class T>
RLFAST_DEVICE void store_columns(void* row, int64_t column, int64_t vocab, const float* g) {
  constexpr int width = T::kWidth;
  typename T::Bits* p = static_cast<typename T::Bits*>(row) + column;
  if (column >= 0 && column + width <= vocab) return store16(p, pack<T>(g));
#pragma unroll
  for (int j = 0; j < width; ++j)
    if (column + j >= 0 && column + j < vocab) p[j] = T::from_float(g[j]);
}

// A block takes a tile of one row: kBackwardVectors vectors a thread, all loaded before the first is used. Vectors are aligned in
// the gradient's row, so that every store is whole; `origin` ≤ 0 is the first vector's column.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 2) backward_kernel(const Backward b) {
  constexpr int width = T::kWidth, bytes = 16 / width;
  int64_t vocab = b.logits.vocab, candidates = b.targets.candidates, work = b.logits.rows() * b.tiles;
  int lane = threadIdx.x % kWarp;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    int64_t row = item / b.tiles, tile = item % b.tiles;
    void* out = row_of<T>(b.gradient, row);
    const typename T::Bits* logits = row_of<T>(b.logits, row);
    int64_t origin = -int64_t(misalignment(out) / bytes);
    int shift = (misalignment(logits) - misalignment(out)) & 15;
    int64_t tile_begin = origin + tile * blockDim.x * kBackwardVectors * width;
    int64_t tile_end = tile_begin + int64_t(blockDim.x) * kBackwardVectors * width;
    if (tile_begin >= vocab) continue;
    bool live = counts(b.targets, row, lane);
    Vector raw[kBackwardVectors];
    if (live) {
#pragma unroll
      for (int i = 0; i < kBackwardVectors; ++i) {
        int64_t column = tile_begin + (int64_t(i) * blockDim.x + threadIdx.x) * width;
        if (column < vocab) raw[i] = load_columns<T, false>(logits, column, vocab, shift);
      }
    }
    RowGradient g = {};
    RowTransform t = {};
    bool near = false;
    const int64_t* ids = b.targets.ids + row * candidates;
    if (live) {
      g = row_gradient(b, row, lane);
      t = RowTransform::of(b.transform, row);
      for (int64_t k = threadIdx.x; k < candidates; k += blockDim.x)
        near |= ids[k] >= 0 && ids[k] < vocab && ids[k] >= tile_begin && ids[k] < tile_end;
    }
    near = __syncthreads_or(near);
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) {
      int64_t column = tile_begin + (int64_t(i) * blockDim.x + threadIdx.x) * width;
      if (column >= vocab) continue;
      float v[width] = {};
      if (live) {
        unpack<T>(raw[i], v);
#pragma unroll
        for (int j = 0; j < width; ++j) v[j] = t.plain ? g(v[j]) : product(g(t(v[j])), t.slope(v[j]));
      }
      for (int64_t k = 0; near && k < candidates; ++k) {
        if (ids[k] < 0 || ids[k] >= vocab || ids[k] < column || ids[k] >= column + width) continue;
        float exact = gradient_at_target<T>(b, g, t, row, k);
#pragma unroll
        for (int j = 0; j < width; ++j) v[j] = ids[k] == column + j ? exact : v[j];
      }
      store_columns<T>(out, column, vocab, v);
    }
  }
}

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

// Launches go to `device` while it lives, then to the caller's again.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks that keep every multiprocessor busy to the end; with fewer rows than this, rows are split.
int64_t busy_blocks(int device) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return 8 * int64_t(multiprocessors);
}

// Above this, leaf statistics no longer fit in the 48 KB of shared memory that every block may have.
constexpr int64_t kMaxSharedLeaves = 48 * 1024 / (kSlots * sizeof(float));

template <class T>
void launch_forward(Forward f, int device, cudaStream_t stream) {
  int64_t rows = f.logits.rows();
  int warps = f.scratch ? kSplitWarps : int(std::min<int64_t>(kForwardWarps, f.leaves));
  if (f.scratch) f.splits = std::clamp<int64_t>(busy_blocks(device) / rows, 1, ceil_div(f.leaves, kSplitWarps));
  int grid = int(std::min(rows * f.splits, kMaxGrid));
  size_t shared = f.scratch ? 0 : f.leaves * kSlots * sizeof(float);
  RLFAST_LAUNCH(leaf_kernel<T>, grid, warps * kWarp, shared, stream, f);
  check(cudaGetLastError(), "token_logps leaves");
  if (!f.scratch) return;
  RLFAST_LAUNCH(merge_kernel<T>, int(std::min(rows, kMaxGrid)), kWarp, 0, stream, f);
  check(cudaGetLastError(), "token_logps merge");
}

template <class T>
void launch_backward(Backward b, cudaStream_t stream) {
  // one vector more than the vocabulary needs: an unaligned row begins inside its first
  int64_t vectors = ceil_div(b.logits.vocab, T::kWidth) + 1;
  int64_t threads = std::min<int64_t>(kBackwardThreads, ceil_div(ceil_div(vectors, kBackwardVectors), kWarp) * kWarp);
  b.tiles = ceil_div(vectors, threads * kBackwardVectors);
  int grid = int(std::min(b.logits.rows() * b.tiles, kMaxGrid));
  RLFAST_LAUNCH(backward_kernel<T>, grid, int(threads), 0, stream, b);
  check(cudaGetLastError(), "token_logps backward");
}

}  // namespace

int64_t token_logps_scratch(int64_t rows, int64_t vocab, int64_t top_k, int device) {
  int64_t leaves = ceil_div(vocab, kLeaf);
  bool few = leaves > kForwardWarps && rows < busy_blocks(device);
  return top_k > 0 || leaves > kMaxSharedLeaves || few ? rows * kSlots * leaves : 0;
}

void token_logps_forward(const Logits& logits, const Transform& transform, const Targets& targets, const ForwardOut& out,
                         float* scratch, int device, void* stream) {
  if (logits.rows() == 0) return;
  OnDevice guard(device);
  if (out.top_k > logits.vocab) throw std::invalid_argument("top_k: more than the vocabulary");
  bool moments = out.entropy || out.saved_entropy || out.log_sum_sq_probs || out.mean_logits;
  Forward f = {logits, transform, targets, out, scratch, ceil_div(logits.vocab, kLeaf), 1, moments};
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (logits.dtype) {
    case DType::f32: return launch_forward<F32>(f, device, s);
    case DType::bf16: return launch_forward<BF16>(f, device, s);
    case DType::f16: return launch_forward<F16>(f, device, s);
  }
}

void token_logps_backward(const Logits& logits, const Transform& transform, const Targets& targets, const BackwardIn& in,
                          const Logits& gradient, int device, void* stream) {
  if (logits.rows() == 0) return;
  OnDevice guard(device);
  Backward b = {logits, transform, targets, in, gradient, 1};
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (logits.dtype) {
    case DType::f32: return launch_backward<F32>(b, s);
    case DType::bf16: return launch_backward<BF16>(b, s);
    case DType::f16: return launch_backward<F16>(b, s);
  }
}

}  // namespace rlfast::cuda
