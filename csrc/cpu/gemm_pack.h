// Operands of gemm.h from matrices of any dtype and row stride: bf16 and f16 become float32 here, and only here, or stay
// bf16 in pairs where the processor multiplies those.
#pragma once
#include "gemm.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// A row of elements as 32-bit words, the last word completed with zero.
template <class T>
struct Widened {
  using Element = T;
  using Words = Float32Words;
  static int64_t words(int64_t n) { return n; }
  // The words where they lie, if they are there.
  static const float* in_words(const T* x, int64_t) {
    return sizeof(T) == sizeof(float) ? reinterpret_cast<const float*>(x) : nullptr;
  }
  static void copy(const T* x, int64_t n, float* y) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
    for (; i < n; ++i) y[i] = to_float(x[i]);
  }
};

#if defined(__AVX512BF16__)
struct Paired {
  using Element = bf16;
  using Words = Bf16Words;
  static int64_t words(int64_t n) { return (n + 1) / 2; }
  static const float* in_words(const bf16* x, int64_t n) { return n % 2 ? nullptr : reinterpret_cast<const float*>(x); }
  static void copy(const bf16* x, int64_t n, float* y) {
    if (n % 2) y[n / 2] = 0.0f;
    std::memcpy(y, x, n * sizeof(bf16));
  }
};
#endif

// The widest exact product of T: pairs of bf16 where the processor has it, else float32.
template <class T>
struct RowOf {
  using type = Widened<T>;
};
#if defined(__AVX512BF16__)
template <>
struct RowOf<bf16> {
  using type = Paired;
};
#endif

// One panel of B = Xᵀ: `rows` ≤ kTileCols rows of X, n elements each, become the columns. row(r) is where a row begins; null: it
// is zero, like the rows that are not there.
template <class Row, class RowAt>
void pack_transposed(RowAt row, int64_t rows, int64_t n, float* panel) {
  constexpr int64_t kElements = 64;  // 32 rows of 64 words: 8 KiB, staged in the first-level cache
  alignas(64) static const float kZeros[kElements] = {};
  alignas(64) float staged[kTileCols * kElements];
  for (int64_t i = 0; i < n; i += kElements) {
    const int64_t width = std::min(kElements, n - i), words = Row::words(width);
    const float* from[kTileCols];
    for (int64_t r = 0; r < kTileCols; ++r) {
      const typename Row::Element* x = r < rows ? row(r) : nullptr;
      from[r] = x ? Row::in_words(x + i, width) : kZeros;
      if (!from[r]) Row::copy(x + i, width, staged + r * kElements), from[r] = staged + r * kElements;
    }
    float* block = panel + Row::words(i) * kTileCols;
    int64_t k = 0;
    for (; k + kRows <= words; k += kRows) {
      for (int64_t r = 0; r < kTileCols; r += kRows) {
        R x[kRows];
#pragma GCC unroll 8
        for (int j = 0; j < kRows; ++j) x[j] = load_rows(from[r + j] + k);
        transpose(x);
#pragma GCC unroll 8
        for (int j = 0; j < kRows; ++j) store_rows(block + (k + j) * kTileCols + r, x[j]);
      }
    }
    for (; k < words; ++k) {
      for (int64_t r = 0; r < kTileCols; ++r) std::memcpy(block + k * kTileCols + r, from[r] + k, sizeof(float));
    }
  }
}

// The same of rows that lie ldx apart.
template <class Row>
void pack_transposed(const typename Row::Element* x, int64_t ldx, int64_t rows, int64_t n, float* panel) {
  pack_transposed<Row>([=](int64_t r) { return x + r * ldx; }, rows, n, panel);
}

// One panel of B = X in float32: cols ≤ kTileCols columns, which begin at row(r) in row r.
template <class T, class RowAt>
void pack_panel(RowAt row, int64_t rows, int64_t cols, float* panel) {
  for (int64_t r = 0; r < rows; ++r, panel += kTileCols) {
    Widened<T>::copy(row(r), cols, panel);
    std::fill(panel + cols, panel + kTileCols, 0.0f);
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
