// The gradients of a head from ∂L/∂logits, a leaf of the vocabulary at a time:
//
//   ∂hidden += dlogits·weight, ∂weight = dlogitsᵀ·hidden, ∂bias = Σ dlogits
//
// A leaf's ∂weight is complete with that, so it needs no accumulator beside the output.
#pragma once
#include <cstring>

#include "linear_head.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

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

// Columns of the depth that one job of a backward product covers.
constexpr int64_t kBlockCols = 192;

// Bytes of an element of a gradient.
template <class T>
int64_t element_size(const HeadGradients& out) {
  return static_cast<int64_t>(out.wide ? sizeof(float) : sizeof(T));
}

// `Source` makes dlogits:
//   bool again()                        whether the logits are made again, which takes packed weights
//   void gather(i)                      what that needs of row i
//   int64_t packs(leaf), pack(leaf, p, packed)   its packing in pieces; `packed` has room for the own head's leaf
//   void make(leaf, begin, end, dlogits, packed)   rows [begin, end) of one leaf to dlogits [count, kLeafPitch]
template <class T, class Source>
class HeadBackward {
public:
  HeadBackward(const LinearHead<T>& linear, int64_t count, const CountedRows& rows, const HeadGradients& out,
               Source& source, int threads)
      : out_(out),
        rows_(rows),
        count_(count),
        threads_(threads),
        panels_(ceil_div(linear.head().depth, kTileCols)),
        depth_(panels_ * kTileCols),
        groups_(ceil_div(linear.head().depth, kBlockCols)),
        linear_(linear),
        source_(source),
        dlogits_(count_ * kLeafPitch),
        weight_(std::max(out.hidden ? kLeaf * depth_ : 0, source.again() ? linear_.packed_size() : 0)),
        hidden_(out.weight ? count_ * depth_ : 0),
        d_hidden_(out.hidden ? count_ * depth_ : 0),
        tiles_(threads * kBlockRows * kBlockCols) {
    // Four jobs a thread, so that a slow one is not waited for; at most what a product's block takes.
    const int64_t each = round_up(ceil_div(count_, 4 * threads), kTileRows);
    rows_each_ = std::clamp<int64_t>(each, kTileRows, kBlockRows);
  }

  void run() {
    const Head& head = linear_.head();
    const int64_t row_jobs = ceil_div(count_, rows_each_);
    const bool again = source_.again();
#pragma omp parallel num_threads(threads_)
    {
      float* tile = tiles_.get() + thread() * kBlockRows * kBlockCols;
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < (again ? count_ : 0); ++i) source_.gather(i);
#pragma omp for schedule(static)
      for (int64_t p = 0; p < (out_.weight ? panels_ : 0); ++p) pack_hidden(p);
      for (int64_t leaf = 0; leaf * kLeaf < head.vocab; ++leaf) {
        if (again) make_dlogits_again(leaf, row_jobs);
        const int64_t packing = out_.hidden ? panels_ : 0;
        // Kept logits become dlogits beside the packing, without a barrier between.
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < packing + (again ? 0 : row_jobs); ++job) {
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
        for (int64_t i = 0; i < count_; ++i) write_hidden(i);
      }
    }
    if (out_.hidden) zero_skipped();
  }

private:
  void write_hidden(int64_t i) {
    const int64_t depth = linear_.head().depth, at = rows_.at[i] * depth;
    const float* row = d_hidden_.get() + i * depth_;
    if (out_.wide) {
      std::memcpy(static_cast<float*>(out_.hidden) + at, row, depth * sizeof(float));
    } else {
      write_row_of(row, depth, false, static_cast<T*>(out_.hidden) + at);
    }
  }

  void zero_skipped() {
    const int64_t bytes = linear_.head().depth * element_size<T>(out_);
    for (int64_t row = 0, i = 0; row < linear_.head().rows; ++row) {
      if (i < count_ && rows_.at[i] == row) {
        ++i;
      } else {
        std::memset(static_cast<char*>(out_.hidden) + row * bytes, 0, bytes);
      }
    }
  }

  // Called by every thread.
  void make_dlogits_again(int64_t leaf, int64_t row_jobs) {
    const int64_t packs = source_.packs(leaf);
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < packs; ++p) source_.pack(leaf, p, weight_.get());
#pragma omp for schedule(dynamic, 1)
    for (int64_t job = 0; job < row_jobs; ++job) make_dlogits(leaf, job);
  }

  void make_dlogits(int64_t leaf, int64_t job) {
    const int64_t begin = job * rows_each_, end = std::min(count_, begin + rows_each_);
    source_.make(leaf, begin, end, dlogits_.get(), weight_.get());
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
    const bool streaming = linear_.head().vocab * depth * element_size<T>(out_) > kStreamBytes;
    const int64_t at = (leaf * kLeaf + v) * depth + d;
    for (int64_t r = 0; r < rows; ++r) hand_out(tile + r * kBlockCols, cols, streaming, out_.weight, at + r * depth);
  }

  // n numbers of a gradient, complete for these rows, from its element `at` on.
  void hand_out(const float* x, int64_t n, bool streaming, void* gradient, int64_t at) const {
    if (!out_.wide) return write_row_of(x, n, streaming, static_cast<T*>(gradient) + at);
    float* sum = static_cast<float*>(gradient) + at;
    if (!out_.add) return write_row_of(x, n, streaming, sum);
    for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
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
    hand_out(sum, n, false, out_.bias, leaf * kLeaf + job * kTileCols);
  }

  const HeadGradients& out_;
  const CountedRows& rows_;
  int64_t count_;
  int threads_;
  int64_t panels_, depth_, groups_;  // the depth in panels, rounded up to whole ones, and in blocks of columns
  const LinearHead<T>& linear_;
  Source& source_;
  Buffer<float> dlogits_;   // [count, kLeafPitch]: of one leaf
  Buffer<float> weight_;    // a leaf's, transposed while logits are made again, then [panels, kLeaf, kTileCols]
  Buffer<float> hidden_;    // [panels, count, kTileCols]
  Buffer<float> d_hidden_;  // [count, depth]
  Buffer<float> tiles_;     // [threads, kBlockRows, kBlockCols]
  int64_t rows_each_;
};

template <class T>
void zero_gradients(const Head& head, const HeadGradients& out) {
  if (out.hidden) std::memset(out.hidden, 0, head.rows * head.depth * element_size<T>(out));
  if (out.add) return;
  if (out.weight) std::memset(out.weight, 0, head.vocab * head.depth * element_size<T>(out));
  if (out.bias) std::memset(out.bias, 0, head.vocab * element_size<T>(out));
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
