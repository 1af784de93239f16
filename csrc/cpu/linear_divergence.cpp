// linear_divergence: the logits of a leaf of both heads are made in cache, by the products of gemm.h, and used there.
//
// Forward   per leaf: pack both weights, then per block of rows: both logits → their statistics (→ kept). A JSD takes the leaves
//           again when every row's log Σe is known: from kept logits, or from logits made again.
// Backward  the head's own (linear_backward.h); dlogits [rows, leaf] take the other side's logits of that leaf, kept or made
//           again.
#include "../rlfast/pair_grad.h"
#include "kernels.h"
#include "linear_backward.h"

namespace rlfast {
namespace RLFAST_ISA_NS {
namespace {

// Rows of a block: the logits of both sides (458 KiB) stay in a second-level cache of 1 MiB.
constexpr int64_t kPairRows = kBlockRows / 2;

template <class T>
class PairForward {
public:
  PairForward(const Head& head, const Head& other, const Transform& of_own, const Transform& of_other,
              const Targets& targets, const Measure& measure, const PairOut& out, float* kept, float* other_kept,
              int threads)
      : targets_(targets),
        measure_(measure),
        out_(out),
        rows_(targets, head.rows),
        count_(rows_.count),
        threads_(threads),
        leaves_each_(ceil_div(head.vocab, kLeaf)),
        sums_(wanted_sums(out.student)),
        kept_(kept),
        other_kept_(other_kept),
        streaming_(count_ * head.vocab * 4 > kStreamBytes),
        own_(head, rows_),
        other_(other, rows_),
        scratch_each_(own_.packed_size() + other_.packed_size() + (2 * kPairRows + 4) * kLeafPitch),
        scratch_(scratch_each_ * threads),
        merge_(threads * 2 * leaves_each_),
        own_leaves_(count_ * leaves_each_),
        other_leaves_(count_ * leaves_each_),
        gaps_(count_ * leaves_each_),
        found_(count_ * targets.candidates),
        scales_(count_),
        other_scales_(count_),
        totals_(count_),
        halves_(measure.kind == Kind::jsd ? count_ * leaves_each_ : 0) {
    const int64_t wanted = std::max<int64_t>(ceil_div(4 * threads, leaves_each_), 1);
    rows_each_ = std::max<int64_t>(round_up(ceil_div(count_, wanted), kTileRows), kTileRows);
    for (int64_t i = 0; i < count_; ++i) {
      scales_[i] = row_scale(of_own, rows_.at[i]);
      other_scales_[i] = row_scale(of_other, rows_.at[i]);
    }
  }

  void run() {
    const int64_t rows = own_.head().rows, jobs = ceil_div(count_, rows_each_) * leaves_each_;
    const bool jsd = measure_.kind == Kind::jsd;
#pragma omp parallel num_threads(threads_)
    {
      float* scratch = scratch_.get() + thread() * scratch_each_;
      double* merge = &merge_[thread() * 2 * leaves_each_];
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count_; ++i) own_.gather(i), other_.gather(i);
#pragma omp for schedule(dynamic, 1)
      for (int64_t job = 0; job < jobs; ++job) run_job<false>(job, scratch);
      stream_fence();
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count_; ++i) {
        const int64_t at = i * leaves_each_;
        totals_[i] = merge_pair(&own_leaves_[at], &other_leaves_[at], &gaps_[at], leaves_each_, scales_[i],
                                other_scales_[i], measure_.kind, merge);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t job = 0; job < (jsd ? jobs : 0); ++job) run_job<true>(job, scratch);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count_; ++i) write(i, merge);
    }
    for (int64_t row = 0, i = 0; row < rows; ++row) {
      if (i < count_ && rows_.at[i] == row) {
        ++i;
      } else {
        write_skipped_pair(targets_.candidates, out_, row, rows);
      }
    }
  }

private:
  // A group of rows in one leaf: its statistics, or what it adds to a JSD.
  template <bool kMixed>
  void run_job(int64_t job, float* scratch) {
    const int64_t leaf = job % leaves_each_, begin = job / leaves_each_ * rows_each_;
    const int64_t end = std::min(count_, begin + rows_each_), vocab = own_.head().vocab;
    float *own_packed = scratch, *other_packed = own_packed + own_.packed_size();
    float *own = other_packed + other_.packed_size(), *other = own + kPairRows * kLeafPitch;
    float* buffer = other + kPairRows * kLeafPitch;
    const bool again = !kMixed || !kept_;
    for (int64_t j = 0; again && j * kTileCols < own_.width(leaf); ++j) {
      own_.pack(leaf, j, own_packed);
      other_.pack(leaf, j, other_packed);
    }
    for (int64_t i = begin; i < end; i += kPairRows) {
      const int64_t rows = std::min(kPairRows, end - i);
      if (again) {
        own_.project(leaf, own_packed, i, rows, own);
        other_.project(leaf, other_packed, i, rows, other);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (i + r) * vocab + leaf * kLeaf;
        const float* x = again ? own + r * kLeafPitch : kept_ + at;
        const float* y = again ? other + r * kLeafPitch : other_kept_ + at;
        if constexpr (kMixed) {
          take_mixed(leaf, i + r, x, y, buffer);
        } else {
          take(leaf, i + r, x, y, buffer);
        }
      }
    }
  }

  // One row of one leaf; `buffer` holds four rows.
  void take(int64_t leaf, int64_t i, const float* x, const float* y, float* buffer) {
    const int64_t vocab = own_.head().vocab, at = i * leaves_each_ + leaf;
    const int n = static_cast<int>(own_.width(leaf));
    if (kept_) {
      write_row_of(x, n, streaming_, kept_ + i * vocab + leaf * kLeaf);
      write_row_of(y, n, streaming_, other_kept_ + i * vocab + leaf * kLeaf);
    }
    const RowScale &s = scales_[i], &t = other_scales_[i];
    float own_peak, other_peak;
    const float* own = load_leaf(x, n, s, buffer, &own_peak);
    const float* other = load_leaf(y, n, t, buffer + kLeafPitch, &other_peak);
    const PairLeaf found = pair_leaf(own, other, n, own_peak, other_peak, s, t, sums_, measure_.kind);
    own_leaves_[at] = found.own, other_leaves_[at] = found.other, gaps_[at] = found.gap;
    for (int64_t k = 0; k < targets_.candidates; ++k) {
      const int64_t id = targets_.ids[rows_.at[i] * targets_.candidates + k];
      TargetStats& target = found_[i * targets_.candidates + k];
      if (id < 0 || id >= vocab) {
        if (leaf == 0) target = {id == kIgnoreIndex ? -1 : -2, false, 0.0f, {}};
      } else if (id / kLeaf == leaf) {
        target = target_stats(own, n, leaf, static_cast<int>(id % kLeaf), s.log2, buffer + 2 * kLeafPitch);
      }
    }
  }

  void take_mixed(int64_t leaf, int64_t i, const float* x, const float* y, float* buffer) {
    if (!totals_[i].possible) return;
    const int n = static_cast<int>(own_.width(leaf));
    const RowScale &s = scales_[i], &t = other_scales_[i];
    const Mixture m = mixture_of(totals_[i], s, t, measure_.beta);
    float peak;
    const float* own = load_leaf(x, n, s, buffer, &peak);
    const float* other = load_leaf(y, n, t, buffer + kLeafPitch, &peak);
    halves_[i * leaves_each_ + leaf] = mixed_sums(own, other, n, m);
  }

  void write(int64_t i, double* merge) {
    Halves sum{0.0, 0.0};
    for (int64_t l = 0; l < leaves_each_ && measure_.kind == Kind::jsd && totals_[i].possible; ++l) {
      sum.s += halves_[i * leaves_each_ + l].s, sum.t += halves_[i * leaves_each_ + l].t;
    }
    write_row(&own_leaves_[i * leaves_each_], own_.head().vocab, &found_[i * targets_.candidates], targets_.candidates,
              nullptr, scales_[i], sums_, merge, out_.student, rows_.at[i], own_.head().rows);
    write_pair(totals_[i], sum, other_scales_[i], measure_, out_, rows_.at[i], own_.head().rows);
  }

  const Targets& targets_;
  const Measure& measure_;
  const PairOut& out_;
  CountedRows rows_;
  int64_t count_;
  int threads_;
  int64_t leaves_each_;
  unsigned sums_;
  float *kept_, *other_kept_;
  bool streaming_;
  LinearHead<T> own_, other_;
  int64_t scratch_each_;
  Buffer<float> scratch_;                        // [threads, scratch_each]
  Buffer<double> merge_;                         // [threads, 2, leaves]
  Buffer<LeafStats> own_leaves_, other_leaves_;  // [count, leaves]
  Buffer<double> gaps_;                          // [count, leaves]
  Buffer<TargetStats> found_;                    // [count, candidates]
  Buffer<RowScale> scales_, other_scales_;       // [count]
  Buffer<PairTotals> totals_;                    // [count]
  Buffer<Halves> halves_;                        // [count, leaves]
  int64_t rows_each_;
};

// ∂L/∂logits of one side of a divergence; from kept logits, or from logits made again.
template <class T>
class PairGradients {
public:
  PairGradients(LinearHead<T>& own, LinearHead<T>& other, const CountedRows& rows, const Transform& of_own,
                const Transform& of_other, const Targets& targets, const Measure& measure, const PairIn& in,
                const float* kept, const float* other_kept, int threads)
      : own_(own),
        other_(other),
        rows_(rows),
        targets_(targets),
        measure_(measure),
        in_(in),
        kept_(kept),
        other_kept_(other_kept),
        other_packed_(kept ? 0 : other.packed_size()),
        made_(kept ? 0 : rows.count * kLeafPitch),
        at_target_(threads * targets.candidates),
        scales_(rows.count),
        other_scales_(rows.count) {
    for (int64_t i = 0; i < rows.count; ++i) {
      scales_[i] = row_scale(of_own, rows.at[i]);
      other_scales_[i] = row_scale(of_other, rows.at[i]);
    }
  }

  bool again() const { return !kept_; }
  void gather(int64_t i) { own_.gather(i), other_.gather(i); }
  int64_t packs(int64_t leaf) const { return 2 * ceil_div(own_.width(leaf), kTileCols); }
  void pack(int64_t leaf, int64_t p, float* packed) const {
    if (p % 2) {
      other_.pack(leaf, p / 2, other_packed_.get());
    } else {
      own_.pack(leaf, p / 2, packed);
    }
  }

  void make(int64_t leaf, int64_t begin, int64_t end, float* dlogits, const float* packed) const {
    const int64_t n = own_.width(leaf), vocab = own_.head().vocab, rows = own_.head().rows;
    const int64_t candidates = targets_.candidates;
    if (!kept_) {
      own_.project(leaf, packed, begin, end - begin, dlogits + begin * kLeafPitch);
      other_.project(leaf, other_packed_.get(), begin, end - begin, made_.get() + begin * kLeafPitch);
    }
    float* at_target = &at_target_[thread() * candidates];
    for (int64_t i = begin; i < end; ++i) {
      float* d = dlogits + i * kLeafPitch;
      const float* x = kept_ ? kept_ + i * vocab + leaf * kLeaf : d;
      const float* y = kept_ ? other_kept_ + i * vocab + leaf * kLeaf : made_.get() + i * kLeafPitch;
      const int64_t row = rows_.at[i], *id = targets_.ids + row * candidates;
      const RowScale &s = scales_[i], &t = other_scales_[i];
      const PairGrad g = pair_grad(s, t, measure_, in_, id, candidates, vocab, row, rows);
      const auto here = [&](int64_t k) { return id[k] >= leaf * kLeaf && id[k] < leaf * kLeaf + n; };
      for (int64_t k = 0; k < candidates; ++k) {
        if (!here(k)) continue;
        at_target[k] = target_pair(x[id[k] % kLeaf], y[id[k] % kLeaf], k, measure_.kind, s, t, g, in_.own, id,
                                   candidates, row, rows);
      }
      pair_span<Store::cached>(x, y, d, n, measure_.kind, s, t, g);
      for (int64_t k = 0; k < candidates; ++k) {
        if (here(k)) d[id[k] % kLeaf] = at_target[k];
      }
    }
  }

private:
  LinearHead<T>&own_, &other_;
  const CountedRows& rows_;
  const Targets& targets_;
  const Measure& measure_;
  const PairIn& in_;
  const float *kept_, *other_kept_;
  Buffer<float> other_packed_;  // a leaf of the other head, transposed
  Buffer<float> made_;          // [count, kLeafPitch]: the other side's logits of one leaf
  Buffer<float> at_target_;     // [threads, candidates]
  Buffer<RowScale> scales_, other_scales_;
};

template <class T>
void run_backward(const Head& head, const Head& other, const Transform& of_own, const Transform& of_other,
                  const Targets& targets, const Measure& measure, const PairIn& in, const float* kept,
                  const float* other_kept, const HeadGradients& out, int threads) {
  const CountedRows rows(targets, head.rows);
  if (rows.count == 0) return zero_gradients<T>(head, out);
  LinearHead<T> mine(head, rows), others(other, rows);
  PairGradients<T> source(mine, others, rows, of_own, of_other, targets, measure, in, kept, other_kept, threads);
  HeadBackward<T, PairGradients<T>>(mine, rows.count, rows, out, source, threads).run();
}

}  // namespace

void linear_divergence_forward(const Head& head, const Head& other, const Transform& of_own, const Transform& of_other,
                               const Targets& targets, const Measure& measure, const PairOut& out, float* kept,
                               float* other_kept, int threads) {
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    PairForward<T>(head, other, of_own, of_other, targets, measure, out, kept, other_kept, threads).run();
  };
  switch (head.dtype) {
    case DType::f32:
      return with(float{});
    case DType::bf16:
      return with(bf16{});
    case DType::f16:
      return with(f16{});
  }
}

void linear_divergence_backward(const Head& head, const Head& other, const Transform& of_own, const Transform& of_other,
                                const Targets& targets, const Measure& measure, const PairIn& in, const float* kept,
                                const float* other_kept, const HeadGradients& out, int threads) {
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    run_backward<T>(head, other, of_own, of_other, targets, measure, in, kept, other_kept, out, threads);
  };
  switch (head.dtype) {
    case DType::f32:
      return with(float{});
    case DType::bf16:
      return with(bf16{});
    case DType::f16:
      return with(f16{});
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
