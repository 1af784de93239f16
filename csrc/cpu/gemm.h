// C = A·B (+ C) in float32 by register tiles, one text for every instruction set.
//
// A tile of kTileRows × kTileCols accumulators stays in registers; A is broadcast element by element from wherever it
// lies (two strides, so that a matrix and its transpose are both read in place), B comes from packed panels
// (gemm_pack.h). An element of C is the sum, in ascending order, of one partial sum per partial_depth() products, each
// begun from zero: its bits depend neither on the shape of the batch nor on how the work is shared out.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

#include "../rlfast/vec.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// Two vectors of columns, and as many rows as leave registers for B and one element of A: 14·2 + 3 of 32, 6·2 + 3 of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileCols = 2 * kLanes;
// Products in one partial sum. 128 puts a product no further from the truth than MKL's, whose sums are as long; 256 would be
// 1% to 2% faster. Short sums are not worth the time of a long one's digits: 32 for those, as a matrix-vector product has.
inline int64_t partial_depth(int64_t depth) { return depth <= 256 ? 32 : 128; }

// How a 32-bit word of A and a vector of words of B are multiplied.
struct Float32Words {
  static F fma(const float* a, F b, F c) { return RLFAST_ISA_NS::fma(set1(*a), b, c); }
};

#if defined(__AVX512BF16__)
// A word holds two bf16: c + a₁·b₁ + a₀·b₀, with exact products and float32 sums.
struct Bf16Words {
  static F fma(const float* a, F b, F c) { return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_ps(*a), (__m512bh)b); }
};
#endif

// A(i, k) = data[i·row + k·depth]
struct Strided {
  const float* data;
  int64_t row, depth;
};

// Columns j·kTileCols + [0, kTileCols) of B: [depth][kTileCols] at data + j·stride.
struct Panels {
  const float* data;
  int64_t stride;
};

template <class Words, int kRows>
void gemm_tile(int64_t depth, Strided a, const float* b, float* c, int64_t ldc, bool accumulate) {
  F sums[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = set1(0.0f);
  // One pointer to three rows: base, base + stride and base + 2·stride are addressing modes, and the pointers fit in registers.
  constexpr int kPointers = (kRows + 2) / 3;
  const float* rows[kPointers];
#pragma GCC unroll 16
  for (int i = 0; i < kPointers; ++i) rows[i] = a.data + 3 * i * a.row;
  for (int64_t k = 0; k < depth; ++k, b += kTileCols) {
    const F b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float* x = rows[i / 3] + (i % 3) * a.row;
      sums[i][0] = Words::fma(x, b0, sums[i][0]);
      sums[i][1] = Words::fma(x, b1, sums[i][1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPointers; ++i) rows[i] += a.depth;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i, c += ldc) {
    if (accumulate) {
      sums[i][0] = add(load(c), sums[i][0]);
      sums[i][1] = add(load(c + kLanes), sums[i][1]);
    }
    store(c, sums[i][0]);
    store(c + kLanes, sums[i][1]);
  }
}

using GemmTile = void (*)(int64_t, Strided, const float*, float*, int64_t, bool);

template <class Words, int... kRows>
GemmTile gemm_tile_of(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr GemmTile tiles[] = {gemm_tile<Words, kRows + 1>...};
  return tiles[rows - 1];
}

// C [rows, cols] = A [rows, depth]·B [depth, cols], added to what C holds if `accumulate`; cols is whole tiles.
template <class Words>
void gemm(int64_t rows, int64_t cols, int64_t depth, Strided a, Panels b, float* c, int64_t ldc, bool accumulate) {
  const int64_t partial = partial_depth(depth);
  for (int64_t k = 0; k < depth; k += partial) {
    const int64_t deep = std::min(partial, depth - k);
    const bool more = accumulate || k > 0;
    for (int64_t j = 0; j < cols; j += kTileCols) {
      const float* panel = b.data + j / kTileCols * b.stride + k * kTileCols;
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const int64_t height = std::min<int64_t>(kTileRows, rows - i);
        const GemmTile tile = gemm_tile_of<Words>(height, std::make_integer_sequence<int, kTileRows>{});
        const Strided block{a.data + i * a.row + k * a.depth, a.row, a.depth};
        tile(deep, block, panel, c + i * ldc + j, ldc, more);
      }
    }
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
