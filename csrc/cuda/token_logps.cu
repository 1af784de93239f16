// token_logps on a GPU: forward and backward.
//
// Forward. One warp takes one leaf of 1024 columns into registers (2 KB of bf16: four 16-byte loads a lane in flight, and the next
// leaf's four behind them; 4 KB of fp32), finds its peak, then its sums relative to that peak: each logit is read once, whatever is
// asked for.
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

#include "backward.cuh"
#include "forward.cuh"
#include "launch.cuh"
#include "top_k.cuh"

namespace rlfast::cuda {

namespace {

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

void token_logps_forward(const Logits& logits, const Transform& transform, const Targets& targets,
                         const ForwardOut& out, float* scratch, int device, void* stream) {
  if (logits.rows() == 0) return;
  OnDevice guard(device);
  if (out.top_k > logits.vocab) throw std::invalid_argument("top_k: more than the vocabulary");
  bool moments = out.entropy || out.saved_entropy || out.log_sum_sq_probs || out.mean_logits;
  Forward f = {logits, transform, targets, out, scratch, ceil_div(logits.vocab, kLeaf), 1, moments};
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (logits.dtype) {
    case DType::f32:
      return launch_forward<F32>(f, device, s);
    case DType::bf16:
      return launch_forward<BF16>(f, device, s);
    case DType::f16:
      return launch_forward<F16>(f, device, s);
  }
}

void token_logps_backward(const Logits& logits, const Transform& transform, const Targets& targets,
                          const BackwardIn& in, const Logits& gradient, int device, void* stream) {
  if (logits.rows() == 0) return;
  OnDevice guard(device);
  Backward b = {logits, transform, targets, in, gradient, 1};
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (logits.dtype) {
    case DType::f32:
      return launch_backward<F32>(b, s);
    case DType::bf16:
      return launch_backward<BF16>(b, s);
    case DType::f16:
      return launch_backward<F16>(b, s);
  }
}

}  // namespace rlfast::cuda
