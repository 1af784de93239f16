// divergence on a GPU: forward and backward.
//
// Forward. A block takes a row, a warp a leaf of 1024 columns of both sides in registers: the statistics of token_logps for either,
// and Σ e_p·gap of a KL. The block's first warp merges the leaves in an order that depends on the vocabulary alone. A JSD needs both
// log Σe before it can compare a column, so its block sweeps the row a second time, out of the L2. One launch.
// Bytes: 2·N·V·sizeof(logit) read + O(N·K) written. With fewer rows than blocks that keep a device busy, the rest of it idles.
//
// Backward: one read of both sides and one write of N·V, 16 bytes a lane at a time.
#include "divergence.h"

#include "backward.cuh"
#include "forward.cuh"
#include "launch.cuh"
#include "pair_math.cuh"

namespace rlfast::cuda {

namespace {

// Beside the slots of a leaf of token_logps: those of the other side, and what the pair adds.
enum PairSlot { kOtherPeak = kSlots, kOtherSum, kGap, kHalfS, kHalfT, kAllS, kAllT, kPairSlots };

constexpr int64_t kMaxPairLeaves = 48 * 1024 / (kPairSlots * sizeof(float)) - 1;
constexpr int kPairVectors = 2;

// Floats of a row's leaves, and of its sums.
RLFAST_HOST_DEVICE constexpr int64_t room_of(int64_t leaves) { return kPairSlots * (leaves + 1); }

struct PairForward {
  Forward own;
  Logits other;
  Transform of_other;
  PairOut out;
  Kind kind;
  float beta, rest;
  float* scratch;  // [blocks, room_of(leaves)], or null: shared memory
};

// In two parts, as it is saved.
struct Centre {
  float high, low;
};

struct PairSums {
  float peak, total, log_sum, other_peak, other_total, other_log_sum;
};

template <class T>
RLFAST_DEVICE void load_leaf(float (&z)[kPerLane], const Logits& logits, const RowTransform& t, int64_t row,
                             int64_t begin, int lane) {
  const void* at = row_of<T>(logits, row);
  LeafTile<T> tile;
  tile.load(at, begin, logits.vocab, misalignment(at), lane);
  tile.values(z, t, logits.vocab - begin, lane);
}

// Σ e_p·gap of a leaf, relative to both leaves' peaks.
RLFAST_DEVICE float sum_gaps(const float (&p)[kPerLane], const float (&q)[kPerLane], float peak_p, float peak_q) {
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int s = 0; s < kPerLane; ++s) sum[s % 2] += gap_term(p[s], q[s], peak_p, peak_q);
  return warp_sum(sum[0] + sum[1]);
}

// The statistics of one leaf of both sides.
template <class T>
RLFAST_DEVICE void pair_leaf(const PairForward& f, float* stats, const RowTransform& t, const RowTransform& u,
                             int64_t row, int64_t leaf, int lane) {
  int64_t begin = leaf * kLeaf, leaves = f.own.leaves, left = f.own.logits.vocab - begin;
  float z[kPerLane], y[kPerLane];
  load_leaf<T>(z, f.own.logits, t, row, begin, lane);
  load_leaf<T>(y, f.other, u, row, begin, lane);
  float peak = warp_max(lane_max(z)), other_peak = warp_max(lane_max(y)), gap = 0.0f;
  LeafSums sums = {0.0f, 0.0f, 0.0f, 0.0f};
  if (f.own.moments)
    sums = sum_moments<T>(z, reference_of(peak), left, lane);
  else
    sums.e = sum_e(z, reference_of(peak));
  float other = sum_e(y, reference_of(other_peak));
  if (f.kind == Kind::reverse) gap = sum_gaps(z, y, reference_of(peak), reference_of(other_peak));
  if (f.kind == Kind::forward) gap = sum_gaps(y, z, reference_of(other_peak), reference_of(peak));
  leave_out_targets<T>(f.own, z, peak, row, begin, lane);
  if (lane != 0) return;
  float values[] = {peak, sums.e, sums.ex, sums.ee, sums.z, other_peak, other, gap};
#pragma unroll
  for (int slot = 0; slot <= kGap; ++slot) stats[slot * leaves + leaf] = values[slot];
}

// A leaf's distance to its row's peak, whole: it is not a logarithm of what is added, as in LeafWeight.
RLFAST_DEVICE float distance_of(float leaf_peak, float peak) {
  return leaf_peak == -INFINITY ? 0.0f : leaf_peak - peak;
}

// own and other: both centres, in two parts.
RLFAST_DEVICE void store_pair(const PairForward& f, float value, Centre own, Centre other, bool possible, int64_t row) {
  int64_t rows = f.own.logits.rows();
  f.out.value[row] = possible ? value < 0.0f ? 0.0f : value : NAN;
  f.out.centre[row] = possible ? own.high : NAN;
  f.out.centre[rows + row] = own.low;
  f.out.ref_centre[row] = possible ? other.high : NAN;
  f.out.ref_centre[rows + row] = other.low;
}

// The student's outputs, the teacher's, and a KL. KL(p‖q) = E_p[gap] + log(Σe_q / Σe_p).
RLFAST_DEVICE PairSums merge_pair(const PairForward& f, const float* stats, int64_t row, int lane) {
  RowSums own = merge_row(f.own, stats, row, lane);
  int64_t leaves = f.own.leaves;
  float peak = -INFINITY, total = 0.0f, gaps = 0.0f;
  for (int64_t l = lane; l < leaves; l += kWarp) peak = fmaxf(peak, stats[kOtherPeak * leaves + l]);
  peak = reference_of(warp_max(peak));
  for (int64_t l = lane; l < leaves; l += kWarp) {
    float own_peak = stats[kPeak * leaves + l], other_peak = stats[kOtherPeak * leaves + l];
    LeafWeight w = LeafWeight::of(own_peak, own.peak), v = LeafWeight::of(other_peak, peak);
    float sum = stats[kOtherSum * leaves + l], gap = stats[kGap * leaves + l];
    float apart = distance_of(own_peak, own.peak) - distance_of(other_peak, peak);
    total = fmaf(v.weight, sum, total);
    bool reverse = f.kind == Kind::reverse;
    float shifted = reverse ? fmaf(stats[kSumE * leaves + l], apart, gap) : fmaf(sum, -apart, gap);
    // an infinite gap counts, whatever its weight underflows to
    gaps += gap == INFINITY ? gap : product(reverse ? w.weight : v.weight, shifted);
  }
  total = warp_sum(total), gaps = warp_sum(gaps);
  float log_sum = logf(total);
  if (lane == 0) {
    f.out.ref_peak[row] = peak;
    f.out.ref_log_sum[row] = log_sum;
    if (f.out.ref_lse) f.out.ref_lse[row] = peak + log_sum;
    if (f.kind != Kind::jsd) {
      float p = f.kind == Kind::reverse ? own.total : total, q = f.kind == Kind::reverse ? total : own.total;
      // of q, whose gradient is a difference of probabilities: 1/Σe of either side, whose logarithms are rounded
      float mean = gaps / p;
      Centre of_p = {mean, 0.0f}, of_q = {1.0f / q, 1.0f / p};
      bool reverse = f.kind == Kind::reverse;
      store_pair(f, mean + logf(q / p), reverse ? of_p : of_q, reverse ? of_q : of_p, own.total > 0.0f && total > 0.0f,
                 row);
    }
  }
  return {own.peak, own.total, own.log_sum, peak, total, log_sum};
}

// Σ S·log S/M, Σ T·log T/M, Σ S and Σ T of one leaf.
template <class T>
RLFAST_DEVICE void mixed_leaf(const PairForward& f, float* stats, const PairSums& r, const RowTransform& t,
                              const RowTransform& u, int64_t row, int64_t leaf, int lane) {
  float z[kPerLane], y[kPerLane], s = 0.0f, other = 0.0f, all_s = 0.0f, all_t = 0.0f;
  load_leaf<T>(z, f.own.logits, t, row, leaf * kLeaf, lane);
  load_leaf<T>(y, f.other, u, row, leaf * kLeaf, lane);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    float own = z[i] - r.peak, ref = y[i] - r.other_peak;
    OverMixture m = OverMixture::of((ref - own) - (r.other_log_sum - r.log_sum), f.beta, f.rest);
    float p = PairRow::p_of(own - r.log_sum), q = PairRow::p_of(ref - r.other_log_sum);
    s = fmaf(p, -m.s, s), all_s += p;
    other = fmaf(q, -m.t, other), all_t += q;
  }
  s = warp_sum(s), other = warp_sum(other), all_s = warp_sum(all_s), all_t = warp_sum(all_t);
  if (lane != 0) return;
  stats[kHalfS * f.own.leaves + leaf] = s;
  stats[kHalfT * f.own.leaves + leaf] = other;
  stats[kAllS * f.own.leaves + leaf] = all_s;
  stats[kAllT * f.own.leaves + leaf] = all_t;
}

// S and T sum to 1 but for the rounding of log Σe.
RLFAST_DEVICE void merge_mixed(const PairForward& f, const float* stats, int64_t row, int lane) {
  int64_t leaves = f.own.leaves;
  float s = 0.0f, t = 0.0f, all_s = 0.0f, all_t = 0.0f;
  for (int64_t l = lane; l < leaves; l += kWarp) {
    s += stats[kHalfS * leaves + l], t += stats[kHalfT * leaves + l];
    all_s += stats[kAllS * leaves + l], all_t += stats[kAllT * leaves + l];
  }
  all_s = warp_sum(all_s), all_t = warp_sum(all_t);
  s = warp_sum(s) / all_s, t = warp_sum(t) / all_t;
  if (lane == 0)
    store_pair(f, fmaf(f.beta, t, product(f.rest, s)), {s, 0.0f}, {t, 0.0f}, all_s > 0.0f && all_t > 0.0f, row);
}

RLFAST_DEVICE void skip_pair(const PairForward& f, int64_t row, int lane) {
  skip_row(f.own, row, lane);
  if (lane != 0) return;
  int64_t rows = f.own.logits.rows();
  f.out.value[row] = f.out.ref_peak[row] = f.out.ref_log_sum[row] = 0.0f;
  if (f.out.ref_lse) f.out.ref_lse[row] = 0.0f;
  f.out.centre[row] = f.out.ref_centre[row] = f.out.centre[rows + row] = f.out.ref_centre[rows + row] = 0.0f;
}

// A row's sums, for all warps of its block, behind the leaves' slots.
RLFAST_DEVICE void post_sums(float* at, const PairSums& r) {
  at[0] = r.peak, at[1] = r.total, at[2] = r.log_sum, at[3] = r.other_peak, at[4] = r.other_total,
  at[5] = r.other_log_sum;
}

template <class T>
__global__ void __launch_bounds__(kForwardWarps* kWarp, 1) pair_kernel(const PairForward f) {
  RLFAST_SHARED(float, shared);
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  float* stats = f.scratch ? f.scratch + blockIdx.x * room_of(f.own.leaves) : shared;
  float* sums = stats + kPairSlots * f.own.leaves;
  for (int64_t row = blockIdx.x; row < f.own.logits.rows(); row += gridDim.x) {
    bool live = counts(f.own.targets, row, lane);
    RowTransform t = RowTransform::of(f.own.transform, row), u = RowTransform::of(f.of_other, row);
    for (int64_t leaf = warp; live && leaf < f.own.leaves; leaf += warps) pair_leaf<T>(f, stats, t, u, row, leaf, lane);
    __syncthreads();
    if (warp == 0) {
      PairSums r = {};
      if (live) r = merge_pair(f, stats, row, lane);
      if (!live) skip_pair(f, row, lane);
      if (lane == 0) post_sums(sums, r);
    }
    __syncthreads();
    if (f.kind == Kind::jsd) {
      PairSums r = {sums[0], sums[1], sums[2], sums[3], sums[4], sums[5]};
      for (int64_t leaf = warp; live && leaf < f.own.leaves; leaf += warps)
        mixed_leaf<T>(f, stats, r, t, u, row, leaf, lane);
      __syncthreads();
      if (live && warp == 0) merge_mixed(f, stats, row, lane);
      __syncthreads();
    }
  }
}

struct PairBackward {
  Backward own;  // without the pair: logp, log-sum-exp, entropy
  Logits other;
  Transform of_other;
  PairIn in;
  Kind kind;
  float beta, rest;
  bool more;  // whether the own side has gradients of its own
};

RLFAST_DEVICE PairRow pair_row(const PairBackward& b, int64_t row) {
  return {b.kind,
          b.in.own.peak[row],
          b.in.own.log_sum[row],
          b.in.other_peak[row],
          b.in.other_log_sum[row],
          b.in.centre[row],
          b.in.centre[b.own.logits.rows() + row],
          b.in.g_value[row],
          b.beta,
          b.rest};
}

// As backward_kernel: vectors are aligned in the gradient's row.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 2) pair_backward_kernel(const PairBackward b) {
  constexpr int width = T::kWidth, bytes = 16 / width;
  int64_t vocab = b.own.logits.vocab, candidates = b.own.targets.candidates, work = b.own.logits.rows() * b.own.tiles;
  int lane = threadIdx.x % kWarp;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    int64_t row = item / b.own.tiles, tile = item % b.own.tiles;
    void* out = row_of<T>(b.own.gradient, row);
    const typename T::Bits *own = row_of<T>(b.own.logits, row), *other = row_of<T>(b.other, row);
    int64_t origin = -int64_t(misalignment(out) / bytes);
    int shift = (misalignment(own) - misalignment(out)) & 15,
        other_shift = (misalignment(other) - misalignment(out)) & 15;
    int64_t begin = origin + tile * blockDim.x * kPairVectors * width;
    bool live = counts(b.own.targets, row, lane);
    RowTransform t = RowTransform::of(b.own.transform, row), u = RowTransform::of(b.of_other, row);
    RowGradient g = {};
    PairRow pair = {};
    if (live && b.more) g = row_gradient(b.own, row, lane);
    if (live && b.in.g_value) pair = pair_row(b, row);
    const int64_t* ids = b.own.targets.ids + row * candidates;
#pragma unroll
    for (int i = 0; i < kPairVectors; ++i) {
      int64_t column = begin + (int64_t(i) * blockDim.x + threadIdx.x) * width;
      if (column >= vocab) continue;
      float v[width] = {};
      if (live) {
        float w[width];
        unpack<T>(load_columns<T, false>(own, column, vocab, shift), v);
        unpack<T>(load_columns<T, false>(other, column, vocab, other_shift), w);
        int hit[width];
#pragma unroll
        for (int j = 0; j < width; ++j) hit[j] = -1;
        for (int64_t k = 0; b.more && k < candidates; ++k) {
          if (ids[k] < 0 || ids[k] >= vocab || ids[k] < column || ids[k] >= column + width) continue;
#pragma unroll
          for (int j = 0; j < width; ++j) hit[j] = ids[k] == column + j ? int(k) : hit[j];
        }
#pragma unroll
        for (int j = 0; j < width; ++j) {
          float x = v[j], z = t(x);
          float d = b.in.g_value ? product(pair(z, u(w[j])), t.slope(x)) : 0.0f;
          if (b.more) d += hit[j] >= 0 ? gradient_at_target<T>(b.own, g, t, row, hit[j]) : product(g(z), t.slope(x));
          v[j] = d;
        }
      }
      store_columns<T>(out, column, vocab, v);
    }
  }
}

int64_t pair_blocks(int64_t rows, int device) { return std::min<int64_t>(rows, busy_blocks(device)); }

template <class T>
void launch_forward(PairForward f, int device, cudaStream_t stream) {
  int warps = int(std::min<int64_t>(kForwardWarps, f.own.leaves));
  int grid = int(f.scratch ? pair_blocks(f.own.logits.rows(), device) : std::min(f.own.logits.rows(), kMaxGrid));
  size_t shared = f.scratch ? 0 : room_of(f.own.leaves) * sizeof(float);
  RLFAST_LAUNCH(pair_kernel<T>, grid, warps * kWarp, shared, stream, f);
  check(cudaGetLastError(), "divergence");
}

template <class T>
void launch_backward(PairBackward b, cudaStream_t stream) {
  int64_t vectors = ceil_div(b.own.logits.vocab, T::kWidth) + 1;
  int64_t threads = std::min<int64_t>(kBackwardThreads, ceil_div(ceil_div(vectors, kPairVectors), kWarp) * kWarp);
  b.own.tiles = ceil_div(vectors, threads * kPairVectors);
  int grid = int(std::min(b.own.logits.rows() * b.own.tiles, kMaxGrid));
  RLFAST_LAUNCH(pair_backward_kernel<T>, grid, int(threads), 0, stream, b);
  check(cudaGetLastError(), "divergence backward");
}

}  // namespace

int64_t divergence_scratch(int64_t rows, int64_t vocab, int device) {
  int64_t leaves = ceil_div(vocab, kLeaf);
  return leaves > kMaxPairLeaves ? pair_blocks(rows, device) * room_of(leaves) : 0;
}

void divergence_forward(const Logits& own, const Logits& other, const Transform& of_own, const Transform& of_other,
                        const Targets& targets, const Measure& measure, const PairOut& out, float* scratch, int device,
                        void* stream) {
  if (own.rows() == 0) return;
  OnDevice guard(device);
  const ForwardOut& o = out.student;
  bool moments = o.entropy || o.saved_entropy;
  int64_t leaves = ceil_div(own.vocab, kLeaf);
  float* room = leaves > kMaxPairLeaves ? scratch : nullptr;
  PairForward f = {{own, of_own, targets, o, room, leaves, 1, moments},
                   other,
                   of_other,
                   out,
                   measure.kind,
                   float(measure.beta),
                   float(1.0 - measure.beta),
                   room};
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (own.dtype) {
    case DType::f32:
      return launch_forward<F32>(f, device, s);
    case DType::bf16:
      return launch_forward<BF16>(f, device, s);
    case DType::f16:
      return launch_forward<F16>(f, device, s);
  }
}

void divergence_backward(const Logits& own, const Logits& other, const Transform& of_own, const Transform& of_other,
                         const Targets& targets, const Measure& measure, const PairIn& in, const Logits& gradient,
                         int device, void* stream) {
  if (own.rows() == 0) return;
  OnDevice guard(device);
  PairBackward b = {{own, of_own, targets, in.own, gradient, 1},
                    other,
                    of_other,
                    in,
                    measure.kind,
                    float(measure.beta),
                    float(1.0 - measure.beta),
                    in.own.g_logp || in.own.g_lse || in.own.g_entropy};
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (own.dtype) {
    case DType::f32:
      return launch_backward<F32>(b, s);
    case DType::bf16:
      return launch_backward<BF16>(b, s);
    case DType::f16:
      return launch_backward<F16>(b, s);
  }
}

}  // namespace rlfast::cuda
