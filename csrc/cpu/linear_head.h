// hidden·weightᵀ + bias, a leaf of the vocabulary at a time, for the rows that count.
#pragma once
#include "../rlfast/linear_token_logps.h"
#include "../rlfast/row_outputs.h"
#include "buffer.h"
#include "gemm_pack.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

constexpr int64_t kLeafPitch = (kLeaf / 16 | 1) * 16;
// Rows of one product with a packed leaf: 8 tiles of 14, whose logits (458 KiB) stay in a second-level cache of 1 MiB.
constexpr int64_t kBlockRows = 8 * kTileRows;

// Rows that are not masked and have a target, in ascending order: the only ones that are projected.
struct CountedRows {
  Buffer<int64_t> at;
  int64_t count = 0;

  CountedRows(const Targets& targets, int64_t rows) : at(rows) {
    for (int64_t r = 0; r < rows; ++r) {
      if (!skipped(targets, r)) at[count++] = r;
    }
  }
};

template <class T>
class LinearHead {
  using Row = typename RowOf<T>::type;

public:
  LinearHead(const Head& head, const CountedRows& rows)
      : head_(head), rows_(rows), words_(Row::words(head.depth)), lda_(pitch(words_)), hidden_(rows.count * lda_) {}

  const Head& head() const { return head_; }
  const T* hidden(int64_t i) const { return static_cast<const T*>(head_.hidden) + rows_.at[i] * head_.stride_hidden; }
  const T* weight(int64_t v) const { return static_cast<const T*>(head_.weight) + v * head_.stride_weight; }

  // Columns of leaf `leaf`, and the floats of a packed leaf.
  int64_t width(int64_t leaf) const { return std::min(kLeaf, head_.vocab - leaf * kLeaf); }
  int64_t packed_size() const { return kLeaf * words_; }

  void gather(int64_t i) { Row::copy(hidden(i), head_.depth, hidden_.get() + i * lda_); }

  // Panel j of the leaf's weight, transposed.
  void pack(int64_t leaf, int64_t j, float* packed) const {
    const int64_t v = leaf * kLeaf + j * kTileCols;
    const int64_t rows = std::min<int64_t>(kTileCols, head_.vocab - v);
    pack_transposed<Row>(weight(v), head_.stride_weight, rows, head_.depth, packed + j * kTileCols * words_);
  }

  // The logits of counted rows i to i + rows in one leaf, to c [rows, kLeafPitch].
  void project(int64_t leaf, const float* packed, int64_t i, int64_t rows, float* c) const {
    const int64_t columns = round_up(width(leaf), kTileCols);
    gemm<typename Row::Words>(rows, columns, words_, {hidden_.get() + i * lda_, lda_, 1}, {packed, kTileCols * words_},
                              c, kLeafPitch, false);
    if (head_.bias) add_bias(leaf, rows, c);
  }

private:
  void add_bias(int64_t leaf, int64_t rows, float* c) const {
    const T* bias = static_cast<const T*>(head_.bias) + leaf * kLeaf;
    const int64_t n = width(leaf);
    for (int64_t r = 0; r < rows; ++r, c += kLeafPitch) {
      int64_t j = 0;
      for (; j + kLanes <= n; j += kLanes) store(c + j, add(load(c + j), load(bias + j)));
      for (; j < n; ++j) c[j] += to_float(bias[j]);
    }
  }

  Head head_;
  const CountedRows& rows_;
  int64_t words_, lda_;
  Buffer<float> hidden_;  // [rows, lda] words
};

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
