// The forward of token_logps: leaf statistics, and their merge into a row's outputs.
#pragma once
#include "leaf.cuh"

namespace rlfast::cuda {

namespace {

constexpr int kForwardWarps = 8, kSplitWarps = 4;

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
  float* scalars[] = {o.lse,           o.entropy,          o.peak,        o.log_sum,
                      o.saved_entropy, o.log_sum_sq_probs, o.mean_logits, o.tail_mass};
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
    if (o.lse) o.lse[row] = peak + log_sum;
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
      // Leaves that are fetched ahead. An unaligned or partial one would spill registers beside the leaf at hand, and
      // so would fp32, whose 4 KB a leaf keep enough bytes in flight without.
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

}  // namespace

}  // namespace rlfast::cuda
