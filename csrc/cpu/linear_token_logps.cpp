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
#include "linear_backward.h"

namespace rlfast {
namespace RLFAST_ISA_NS {
namespace {

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

// ∂L/∂logits of log-probs, entropies and log-sum-exps; from kept logits, or from logits made again.
template <class T>
class TokenGradients {
public:
  TokenGradients(LinearHead<T>& linear, const CountedRows& rows, const Transform& transform, const Targets& targets,
                 const BackwardIn& in, const float* kept, int threads)
      : linear_(linear),
        rows_(rows),
        targets_(targets),
        in_(in),
        kept_(kept),
        at_target_(threads * targets.candidates),
        scales_(rows.count),
        grads_(rows.count) {
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t row = rows.at[i];
      scales_[i] = row_scale(transform, row);
      grads_[i] = row_grad(scales_[i], in, ids(row), targets.candidates, linear.head().vocab, row);
    }
  }

  bool again() const { return !kept_; }
  void gather(int64_t i) { linear_.gather(i); }
  int64_t packs(int64_t leaf) const { return ceil_div(linear_.width(leaf), kTileCols); }
  void pack(int64_t leaf, int64_t p, float* packed) const { linear_.pack(leaf, p, packed); }

  void make(int64_t leaf, int64_t begin, int64_t end, float* dlogits, const float* packed) const {
    const int64_t n = linear_.width(leaf), vocab = linear_.head().vocab, rows = linear_.head().rows;
    const int64_t candidates = targets_.candidates;
    if (!kept_) linear_.project(leaf, packed, begin, end - begin, dlogits + begin * kLeafPitch);
    float* at_target = &at_target_[thread() * candidates];
    for (int64_t i = begin; i < end; ++i) {
      float* d = dlogits + i * kLeafPitch;
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

private:
  const int64_t* ids(int64_t row) const { return targets_.ids + row * targets_.candidates; }

  LinearHead<T>& linear_;
  const CountedRows& rows_;
  const Targets& targets_;
  const BackwardIn& in_;
  const float* kept_;
  Buffer<float> at_target_;  // [threads, candidates]
  Buffer<RowScale> scales_;
  Buffer<RowGrad> grads_;
};

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
  const CountedRows rows(targets, head.rows);
  if (rows.count == 0) return zero_gradients<T>(head, out);
  LinearHead<T> linear(head, rows);
  TokenGradients<T> source(linear, rows, transform, targets, in, kept, threads);
  HeadBackward<T, TokenGradients<T>>(linear, rows.count, rows, out, source, threads).run();
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
