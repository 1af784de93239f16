// linear_token_logps: the logits of a leaf are made in cache, by the products of gemm.h, and used there.
//
// Forward   per leaf: pack its weights, then per block of rows: logits → row statistics (→ kept).
// Backward  per leaf: logits again (kept or made) → dlogits [rows, leaf]; then, all from the same dlogits,
//           ∂hidden += dlogits·weight, ∂weight = dlogitsᵀ·hidden, ∂bias = Σ dlogits. A leaf's ∂weight is complete with
//           that, so it needs no accumulator beside the output.
//
// Sums run over tokens and leaves in ascending order, and only outputs are shared out among threads: the bits do not
// depend on their number.
#include "../rlfast/row_grad.h"
#include "kernels.h"
#include "linear_head.h"

namespace rlfast {
namespace RLFAST_ISA_NS {
namespace {

// Outputs above the size of a last-level cache go past it: nothing is read to be overwritten.
constexpr int64_t kStreamBytes = 32 << 20;

template <class T>
void write_row_of(const float* x, int64_t n, bool streaming, T* y) {
  int64_t i = 0;
  if (streaming && reinterpret_cast<uintptr_t>(y) % (kLanes * sizeof(T)) == 0) {
    for (; i + kLanes <= n; i += kLanes) stream(y + i, load(x + i));
  } else {
    for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
  }
  for (; i < n; ++i) from_float(x[i], y + i);
}

// A job is a group of rows × a group of leaves. Top-k wants the leaves of a row in ascending order: one group of all.
struct Grid {
  int64_t leaves, row_groups, leaf_groups, rows_each;

  Grid(int64_t rows, int64_t vocab, bool top_k, int threads) : leaves(ceil_div(vocab, kLeaf)) {
    leaf_groups = top_k ? 1 : leaves;
    const int64_t wanted = top_k ? ceil_div(rows, kBlockRows) : ceil_div(4 * threads, leaves);
    rows_each = std::max<int64_t>(round_up(ceil_div(rows, std::max<int64_t>(wanted, 1)), kTileRows), kTileRows);
    row_groups = ceil_div(rows, rows_each);
  }
};

template <class T>
class Forward {
public:
  Forward(const Head& head, const Transform& transform, const Targets& targets, const ForwardOut& out, float* kept,
          int threads)
      : targets_(targets),
        out_(out),
        rows_(targets, head.rows),
        count_(rows_.count),
        threads_(threads),
        grid_(count_, head.vocab, out.top_k > 0, threads),
        sums_(wanted_sums(out)),
        kept_(kept),
        streaming_(count_ * head.vocab * 4 > kStreamBytes),
        linear_(head, rows_),
        scratch_each_(linear_.packed_size() + (kBlockRows + 2) * kLeafPitch),
        scratch_(scratch_each_ * threads),
        merge_(threads * grid_.leaves),
        leaves_(count_ * grid_.leaves),
        found_(count_ * targets.candidates),
        scales_(count_),
        heaps_(count_ * out.top_k),
        rests_(out.top_k ? count_ * grid_.leaves : 0),
        best_(out.top_k ? count_ : 0) {
    for (int64_t i = 0; i < count_; ++i) {
      scales_[i] = row_scale(transform, rows_.at[i]);
      if (out.top_k) best_[i] = {&heaps_[i * out.top_k], &rests_[i * grid_.leaves], out.top_k, 0};
    }
  }

  void run() {
    const Head& head = linear_.head();
#pragma omp parallel num_threads(threads_)
    {
      float* scratch = scratch_.get() + thread() * scratch_each_;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count_; ++i) linear_.gather(i);
#pragma omp for schedule(dynamic, 1)
      for (int64_t job = 0; job < grid_.row_groups * grid_.leaf_groups; ++job) run_job(job, scratch);
      stream_fence();
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count_; ++i) {
        write_row(&leaves_[i * grid_.leaves], head.vocab, &found_[i * targets_.candidates], targets_.candidates,
                  out_.top_k ? &best_[i] : nullptr, scales_[i], sums_, &merge_[thread() * grid_.leaves], out_,
                  rows_.at[i], head.rows);
      }
    }
    for (int64_t row = 0; row < head.rows; ++row) {
      if (skipped(targets_, row)) write_skipped_row(targets_.candidates, out_, row, head.rows);
    }
  }

private:
  void run_job(int64_t job, float* scratch) {
    const int64_t leaves_each = grid_.leaves / grid_.leaf_groups;
    const int64_t first = job / grid_.row_groups * leaves_each, begin = job % grid_.row_groups * grid_.rows_each;
    const int64_t end = std::min(count_, begin + grid_.rows_each);
    float *packed = scratch, *logits = scratch + linear_.packed_size(), *buffer = logits + kBlockRows * kLeafPitch;
    for (int64_t leaf = first; leaf < first + leaves_each; ++leaf) {
      for (int64_t j = 0; j * kTileCols < linear_.width(leaf); ++j) linear_.pack(leaf, j, packed);
      for (int64_t i = begin; i < end; i += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, end - i);
        linear_.project(leaf, packed, i, rows, logits);
        for (int64_t r = 0; r < rows; ++r) take(leaf, i + r, logits + r * kLeafPitch, buffer);
      }
    }
  }

  // One row of one leaf; `buffer` holds two rows.
  void take(int64_t leaf, int64_t i, const float* x, float* buffer) {
    const int64_t vocab = linear_.head().vocab;
    const int n = static_cast<int>(linear_.width(leaf));
    if (kept_) write_row_of(x, n, streaming_, kept_ + i * vocab + leaf * kLeaf);
    const RowScale& s = scales_[i];
    float peak;
    const float* y = load_leaf(x, n, s, buffer, &peak);
    LeafStats& stats = leaves_[i * grid_.leaves + leaf];
    stats = leaf_stats(y, n, peak, s.log2, sums_);
    float* spare = buffer + kLeafPitch;
    for (int64_t k = 0; k < targets_.candidates; ++k) {
      const int64_t id = targets_.ids[rows_.at[i] * targets_.candidates + k];
      TargetStats& found = found_[i * targets_.candidates + k];
      if (id < 0 || id >= vocab) {
        if (leaf == 0) found = {id == kIgnoreIndex ? -1 : -2, false, 0.0f, {}};
      } else if (id / kLeaf == leaf) {
        found = target_stats(y, n, leaf, static_cast<int>(id % kLeaf), s.log2, spare);
      }
    }
    if (out_.top_k) best_[i].offer(y, n, leaf, stats, s, spare);
  }

  const Targets& targets_;
  const ForwardOut& out_;
  CountedRows rows_;
  int64_t count_;
  int threads_;
  Grid grid_;
  unsigned sums_;
  float* kept_;
  bool streaming_;
  LinearHead<T> linear_;
  int64_t scratch_each_;
  Buffer<float> scratch_;      // [threads, scratch_each]: a packed leaf, logits of a block, two rows
  Buffer<double> merge_;       // [threads, leaves]
  Buffer<LeafStats> leaves_;   // [count, leaves]
  Buffer<TargetStats> found_;  // [count, candidates]
  Buffer<RowScale> scales_;    // [count]
  Buffer<Ranked> heaps_;       // [count, top_k]
  Buffer<LeafRest> rests_;     // [count, leaves]
  Buffer<TopK> best_;          // [count]
};

// Columns of the depth that one job of a backward product covers.
constexpr int64_t kBlockCols = 192;

template <class T>
class Backward {
public:
  Backward(const Head& head, const Transform& transform, const Targets& targets, const BackwardIn& in,
           const float* kept, const HeadGradients& out, int threads)
      : targets_(targets),
        in_(in),
        out_(out),
        rows_(targets, head.rows),
        count_(rows_.count),
        threads_(threads),
        panels_(ceil_div(head.depth, kTileCols)),
        depth_(panels_ * kTileCols),
        groups_(ceil_div(head.depth, kBlockCols)),
        kept_(kept),
        linear_(head, rows_),
        dlogits_(count_ * kLeafPitch),
        weight_(std::max(out.hidden ? kLeaf * depth_ : 0, kept ? 0 : linear_.packed_size())),
        hidden_(out.weight ? count_ * depth_ : 0),
        d_hidden_(out.hidden ? count_ * depth_ : 0),
        tiles_(threads * kBlockRows * kBlockCols),
        at_target_(threads * targets.candidates),
        scales_(count_),
        grads_(count_) {
    // Four jobs a thread, so that a slow one is not waited for; at most what a product's block takes.
    const int64_t rows = round_up(ceil_div(count_, 4 * threads), kTileRows);
    rows_each_ = std::clamp<int64_t>(rows, kTileRows, kBlockRows);
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t row = rows_.at[i];
      scales_[i] = row_scale(transform, row);
      grads_[i] = row_grad(scales_[i], in, ids(row), targets.candidates, head.vocab, row);
    }
  }

  void run() {
    const Head& head = linear_.head();
    const int64_t row_jobs = ceil_div(count_, rows_each_);
#pragma omp parallel num_threads(threads_)
    {
      float* tile = tiles_.get() + thread() * kBlockRows * kBlockCols;
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < (kept_ ? 0 : count_); ++i) linear_.gather(i);
#pragma omp for schedule(static)
      for (int64_t p = 0; p < (out_.weight ? panels_ : 0); ++p) pack_hidden(p);
      for (int64_t leaf = 0; leaf * kLeaf < head.vocab; ++leaf) {
        if (!kept_) make_dlogits_again(leaf, row_jobs);
        const int64_t packing = out_.hidden ? panels_ : 0;
        // Kept logits become dlogits beside the packing, without a barrier between.
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < packing + (kept_ ? row_jobs : 0); ++job) {
          if (job < packing) {
            pack_weight(leaf, job);
          } else {
            make_dlogits(leaf, job - packing);
          }
        }
        const int64_t for_hidden = out_.hidden ? ceil_div(count_, kBlockRows) * groups_ : 0;
        const int64_t for_weight = out_.weight ? ceil_div(linear_.width(leaf), kBlockRows) * groups_ : 0;
        const int64_t for_bias = out_.bias ? ceil_div(linear_.width(leaf), kTileCols) : 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < for_hidden + for_weight + for_bias; ++job) {
          if (job < for_hidden) {
            add_to_hidden(leaf, job);
          } else if (job < for_hidden + for_weight) {
            write_weight(leaf, job - for_hidden, tile);
          } else {
            write_bias(leaf, job - for_hidden - for_weight);
          }
        }
      }
      stream_fence();
      if (out_.hidden) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count_; ++i) {
          write_row_of(d_hidden_.get() + i * depth_, head.depth, false,
                       static_cast<T*>(out_.hidden) + rows_.at[i] * head.depth);
        }
      }
    }
    if (!out_.hidden) return;
    for (int64_t row = 0; row < head.rows; ++row) {
      if (skipped(targets_, row))
        std::memset(static_cast<T*>(out_.hidden) + row * head.depth, 0, head.depth * sizeof(T));
    }
  }

private:
  const int64_t* ids(int64_t row) const { return targets_.ids + row * targets_.candidates; }

  // Called by every thread.
  void make_dlogits_again(int64_t leaf, int64_t row_jobs) {
    const int64_t transposed = ceil_div(linear_.width(leaf), kTileCols);
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < transposed; ++p) linear_.pack(leaf, p, weight_.get());
#pragma omp for schedule(dynamic, 1)
    for (int64_t job = 0; job < row_jobs; ++job) make_dlogits(leaf, job);
  }

  void pack_hidden(int64_t p) {
    const int64_t cols = std::min<int64_t>(kTileCols, linear_.head().depth - p * kTileCols);
    const auto row = [&](int64_t i) { return linear_.hidden(i) + p * kTileCols; };
    pack_panel<T>(row, count_, cols, hidden_.get() + p * kTileCols * count_);
  }

  void pack_weight(int64_t leaf, int64_t p) {
    const int64_t cols = std::min<int64_t>(kTileCols, linear_.head().depth - p * kTileCols);
    const auto row = [&](int64_t v) { return linear_.weight(leaf * kLeaf + v) + p * kTileCols; };
    pack_panel<T>(row, linear_.width(leaf), cols, weight_.get() + p * kTileCols * kLeaf);
  }

  void make_dlogits(int64_t leaf, int64_t job) {
    const int64_t begin = job * rows_each_, end = std::min(count_, begin + rows_each_), n = linear_.width(leaf);
    const int64_t vocab = linear_.head().vocab, rows = linear_.head().rows, candidates = targets_.candidates;
    if (!kept_) linear_.project(leaf, weight_.get(), begin, end - begin, dlogits_.get() + begin * kLeafPitch);
    float* at_target = &at_target_[thread() * candidates];
    for (int64_t i = begin; i < end; ++i) {
      float* d = dlogits_.get() + i * kLeafPitch;
      const float* x = kept_ ? kept_ + i * vocab + leaf * kLeaf : d;
      const int64_t* id = ids(rows_.at[i]);
      const auto here = [&](int64_t k) { return id[k] >= leaf * kLeaf && id[k] < leaf * kLeaf + n; };
      for (int64_t k = 0; k < candidates; ++k) {
        if (!here(k)) continue;
        at_target[k] =
            target_dlogit(x[id[k] % kLeaf], k, scales_[i], grads_[i], in_, id, candidates, rows_.at[i], rows);
      }
      dlogits_span<Store::cached>(x, d, n, scales_[i], grads_[i]);
      for (int64_t k = 0; k < candidates; ++k) {
        if (here(k)) d[id[k] % kLeaf] = at_target[k];
      }
    }
  }

  void add_to_hidden(int64_t leaf, int64_t job) {
    const int64_t i = job / groups_ * kBlockRows, d = job % groups_ * kBlockCols;
    const Strided a{dlogits_.get() + i * kLeafPitch, kLeafPitch, 1};
    const Panels b{weight_.get() + d * kLeaf, kTileCols * kLeaf};
    gemm<Float32Words>(std::min(kBlockRows, count_ - i), std::min(kBlockCols, depth_ - d), linear_.width(leaf), a, b,
                       d_hidden_.get() + i * depth_ + d, depth_, leaf > 0);
  }

  void write_weight(int64_t leaf, int64_t job, float* tile) {
    const int64_t v = job / groups_ * kBlockRows, d = job % groups_ * kBlockCols, depth = linear_.head().depth;
    const int64_t rows = std::min(kBlockRows, linear_.width(leaf) - v), cols = std::min(kBlockCols, depth - d);
    const Panels b{hidden_.get() + d * count_, kTileCols * count_};
    gemm<Float32Words>(rows, std::min(kBlockCols, depth_ - d), count_, {dlogits_.get() + v, 1, kLeafPitch}, b, tile,
                       kBlockCols, false);
    const bool streaming = linear_.head().vocab * depth * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
    T* out = static_cast<T*>(out_.weight) + (leaf * kLeaf + v) * depth + d;
    for (int64_t r = 0; r < rows; ++r) write_row_of(tile + r * kBlockCols, cols, streaming, out + r * depth);
  }

  // Partial sums of 16 rows, as the products have them.
  void write_bias(int64_t leaf, int64_t job) {
    float sum[kTileCols] = {};
    const float* d = dlogits_.get() + job * kTileCols;
    for (int64_t i = 0; i < count_; i += 16) {
      float part[kTileCols] = {};
      for (int64_t r = i; r < std::min(count_, i + 16); ++r) {
        for (int j = 0; j < kTileCols; ++j) part[j] += d[r * kLeafPitch + j];
      }
      for (int j = 0; j < kTileCols; ++j) sum[j] += part[j];
    }
    const int64_t n = std::min<int64_t>(kTileCols, linear_.width(leaf) - job * kTileCols);
    write_row_of(sum, n, false, static_cast<T*>(out_.bias) + leaf * kLeaf + job * kTileCols);
  }

  const Targets& targets_;
  const BackwardIn& in_;
  const HeadGradients& out_;
  CountedRows rows_;
  int64_t count_;
  int threads_;
  int64_t panels_, depth_, groups_;  // the depth in panels, rounded up to whole ones, and in blocks of columns
  const float* kept_;
  LinearHead<T> linear_;
  Buffer<float> dlogits_;   // [count, kLeafPitch]: of one leaf
  Buffer<float> weight_;    // a leaf's, transposed while logits are made again, then [panels, kLeaf, kTileCols]
  Buffer<float> hidden_;    // [panels, count, kTileCols]
  Buffer<float> d_hidden_;  // [count, depth]
  Buffer<float> tiles_;     // [threads, kBlockRows, kBlockCols]
  int64_t rows_each_;
  Buffer<float> at_target_;  // [threads, candidates]
  Buffer<RowScale> scales_;
  Buffer<RowGrad> grads_;
};

template <class T>
void zero_gradients(const Head& head, const HeadGradients& out) {
  if (out.hidden) std::memset(out.hidden, 0, head.rows * head.depth * sizeof(T));
  if (out.weight) std::memset(out.weight, 0, head.vocab * head.depth * sizeof(T));
  if (out.bias) std::memset(out.bias, 0, head.vocab * sizeof(T));
}

}  // namespace

void linear_token_logps_forward(const Head& head, const Transform& transform, const Targets& targets,
                                const ForwardOut& out, float* kept, int threads) {
  switch (head.dtype) {
    case DType::f32:
      return Forward<float>(head, transform, targets, out, kept, threads).run();
    case DType::bf16:
      return Forward<bf16>(head, transform, targets, out, kept, threads).run();
    case DType::f16:
      return Forward<f16>(head, transform, targets, out, kept, threads).run();
  }
}

template <class T>
void run_backward(const Head& head, const Transform& transform, const Targets& targets, const BackwardIn& in,
                  const float* kept, const HeadGradients& out, int threads) {
  if (CountedRows(targets, head.rows).count == 0) return zero_gradients<T>(head, out);
  Backward<T>(head, transform, targets, in, kept, out, threads).run();
}

void linear_token_logps_backward(const Head& head, const Transform& transform, const Targets& targets,
                                 const BackwardIn& in, const float* kept, const HeadGradients& out, int threads) {
  switch (head.dtype) {
    case DType::f32:
      return run_backward<float>(head, transform, targets, in, kept, out, threads);
    case DType::bf16:
      return run_backward<bf16>(head, transform, targets, in, kept, out, threads);
    case DType::f16:
      return run_backward<f16>(head, transform, targets, in, kept, out, threads);
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
