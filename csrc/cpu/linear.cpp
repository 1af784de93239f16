// linear: out = x·weightᵀ + bias, the weight read where it lies: no copy of it, so that an update in place is never missed.
//
// An element of out is a sum of its own. Its products are taken along the depth, kElements of them in one vector, into one
// vector of partial sums, which begins from zero every block of at most kSteps vectors; lane_sums adds its lanes, the blocks
// are added in ascending order, then the bias. So its bits depend on its row of x, its row of the weight and the depth alone:
// not on the other rows, nor on the tile that it falls into, nor on the threads.
//
// Loops, from the outside: a panel of rows of x that stays in the second-level cache; a tile of kLaneSums rows of the weight,
// which is read from memory once a panel; a block of the depth; up to kTall rows of x. While one tile is in use the next one is
// fetched, an equal share of it beside each of those: with 16 rows that halves the time.
#include "../rlfast/linear.h"

#include "kernels.h"
#include "linear_head.h"

namespace rlfast {
namespace RLFAST_ISA_NS {
namespace {

// Rows of x in a register tile with kLaneSums of the weight: 3·8 + 3 + 1 of 32 registers, 3·4 + 3 + 1 of 16.
constexpr int kTall = 3;
// Vectors of one partial sum: a tile of the weight is 32 KiB then and stays in the first-level cache, and no sum is longer
// than those of a GEMM of MKL.
constexpr int64_t kSteps = 64;
constexpr int64_t kPanelBytes = 512 << 10, kPanelRows = 84 * kTall;
// Jobs a thread, so that one that is held up is not waited for; below so many products the threads cost more than they save.
constexpr int64_t kJobs = 4, kAlone = 1 << 15;

// A vector of elements, and how two of them are multiplied and added to sums.
template <class T>
struct Products {
  using Vector = F;
  static constexpr int kElements = kLanes;
  static Vector load(const T* p) { return RLFAST_ISA_NS::load(p); }
  static Vector load_part(const T* p, int n) { return RLFAST_ISA_NS::load_part(p, n, 0.0f); }
  static F fma(Vector a, Vector b, F c) { return RLFAST_ISA_NS::fma(a, b, c); }
};

#if defined(__AVX512BF16__)
// Pairs of bf16: c + a₁·b₁ + a₀·b₀, with exact products and float32 sums.
template <>
struct Products<bf16> {
  using Vector = __m512bh;
  static constexpr int kElements = 2 * kLanes;
  static Vector load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Vector load_part(const bf16* p, int n) { return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
  static F fma(Vector a, Vector b, F c) { return _mm512_dpbf16_ps(c, a, b); }
};
#endif

// x in a register: GCC would load a factor again for each product that it is in, which takes a third more time.
template <class V>
V held(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;  // elements from row to row
};

// Where the next tile of the weight begins, and the bytes that a prefetch of it moves on a vector.
struct Ahead {
  const char* data;
  int64_t pace;
};

// sums [kHigh, kLaneSums] = x [kHigh, depth]·w [kWide, depth]ᵀ, added to what is there if `more`; kWide is kLaneSums or 1.
template <class T, int kHigh, int kWide>
void tile(Matrix<T> x, Matrix<T> w, int64_t depth, Ahead ahead, float* sums, bool more) {
  using P = Products<T>;
  F partial[kHigh][kWide];
#pragma GCC unroll 8
  for (int j = 0; j < kWide; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kHigh; ++i) partial[i][j] = set1(0.0f);
  }
  // One pointer to three rows, as in gemm.h.
  constexpr int kPointers = (kWide + 2) / 3;
  const int64_t row_bytes = w.stride * static_cast<int64_t>(sizeof(T));
  const T* rows[kPointers];
  const char* next[kPointers];
#pragma GCC unroll 4
  for (int p = 0; p < kPointers; ++p) rows[p] = w.data + 3 * p * w.stride, next[p] = ahead.data + 3 * p * row_bytes;
  const auto step = [&](auto load) {
    typename P::Vector a[kHigh];
#pragma GCC unroll 4
    for (int i = 0; i < kHigh; ++i) a[i] = load(x.data + i * x.stride);
#pragma GCC unroll 8
    for (int j = 0; j < kWide; ++j) {
      const typename P::Vector b = held(load(rows[j / 3] + j % 3 * w.stride));
#pragma GCC unroll 4
      for (int i = 0; i < kHigh; ++i) partial[i][j] = P::fma(a[i], b, partial[i][j]);
    }
  };
  for (int64_t k = depth / P::kElements; k > 0; --k) {
    step([](const T* p) { return P::load(p); });
#pragma GCC unroll 8
    for (int j = 0; j < kWide; ++j) prefetch(next[j / 3] + j % 3 * row_bytes);
    x.data += P::kElements;
#pragma GCC unroll 4
    for (int p = 0; p < kPointers; ++p) rows[p] += P::kElements, next[p] += ahead.pace;
  }
  if (const int left = static_cast<int>(depth % P::kElements)) {
    step([left](const T* p) { return P::load_part(p, left); });
  }
#pragma GCC unroll 4
  for (int i = 0; i < kHigh; ++i) {
    F lanes[kLaneSums];
    float found[kLaneSums], *c = sums + i * kLaneSums;
#pragma GCC unroll 8
    for (int j = 0; j < kLaneSums; ++j) lanes[j] = partial[i][j % kWide];
    lane_sums(lanes, found);
    for (int j = 0; j < kWide; ++j) c[j] = more ? c[j] + found[j] : found[j];
  }
}

template <class T, int kWide>
void tile_of(int64_t high, Matrix<T> x, Matrix<T> w, int64_t depth, Ahead ahead, float* sums, bool more) {
  static_assert(kTall == 3);
  constexpr decltype(&tile<T, 1, kWide>) tiles[] = {tile<T, 1, kWide>, tile<T, 2, kWide>, tile<T, 3, kWide>};
  tiles[high - 1](x, w, depth, ahead, sums, more);
}

template <class T, class Out>
class Linear {
public:
  Linear(const LinearIn& in, Out* out)
      : in_(in),
        x_{static_cast<const T*>(in.x), in.stride_x},
        weight_{static_cast<const T*>(in.weight), in.stride_weight},
        bias_(static_cast<const T*>(in.bias)),
        out_(out),
        tiles_(ceil_div(in.columns, kLaneSums)) {
    const int64_t vectors = ceil_div(in.depth, kElements);
    block_ = ceil_div(vectors, ceil_div(vectors, kSteps)) * kElements;
    // Whole tiles, so that panels of equal size are no larger, and none is empty.
    const int64_t fit = kPanelBytes / static_cast<int64_t>(sizeof(T)) / in.depth / kTall * kTall;
    panels_ = ceil_div(in.rows, std::clamp<int64_t>(fit, kTall, kPanelRows));
    panel_ = panels_ ? round_up(ceil_div(in.rows, panels_), kTall) : 0;
  }

  void run(int threads) const {
    if (in_.rows * in_.columns * in_.depth < kAlone) threads = 1;
    const int64_t groups =
        threads == 1 ? 1 : std::min(tiles_, ceil_div(kJobs * threads, std::max<int64_t>(panels_, 1)));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t job = 0; job < panels_ * groups; ++job) {
      const int64_t group = job % groups, row = job / groups * panel_;
      run_panel(row, std::min(panel_, in_.rows - row), tiles_ * group / groups, tiles_ * (group + 1) / groups);
    }
  }

private:
  static constexpr int kElements = Products<T>::kElements;

  void run_panel(int64_t row, int64_t rows, int64_t begin, int64_t end) const {
    float sums[kPanelRows * kLaneSums];
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t k = 0; k < in_.depth; k += block_) {
        const bool last = k + block_ >= in_.depth;
        const int64_t after = std::min(last ? t + 1 : t, end - 1);
        make_sums(row, rows, t, k, weight(after) + (last ? 0 : k + block_), sums);
      }
      write(row, rows, t, sums);
    }
  }

  // The products of one block of the depth, from k on, of a panel of rows and a tile of the weight.
  void make_sums(int64_t row, int64_t rows, int64_t t, int64_t k, const T* next, float* sums) const {
    const int64_t depth = std::min(block_, in_.depth - k), shares = ceil_div(rows, kTall);
    const int64_t bytes = depth * static_cast<int64_t>(sizeof(T));
    const int64_t pace = kElements * static_cast<int64_t>(sizeof(T)) / shares;
    for (int64_t s = 0; s < shares; ++s) {
      const int64_t i = rows * s / shares, high = rows * (s + 1) / shares - i;
      const Matrix<T> x{x_.data + (row + i) * x_.stride + k, x_.stride}, w{weight(t) + k, weight_.stride};
      const Ahead ahead{reinterpret_cast<const char*>(next) + s * bytes / shares, pace};
      if (width(t) == kLaneSums) {
        tile_of<T, kLaneSums>(high, x, w, depth, ahead, sums + i * kLaneSums, k > 0);
      } else {
        for (int64_t j = 0; j < width(t); ++j) {
          const Matrix<T> one{w.data + j * w.stride, w.stride};
          tile_of<T, 1>(high, x, one, depth, ahead, sums + i * kLaneSums + j, k > 0);
        }
      }
    }
  }

  void write(int64_t row, int64_t rows, int64_t t, const float* sums) const {
    const int64_t column = t * kLaneSums, n = width(t);
    float bias[kLaneSums] = {};
    for (int64_t j = 0; bias_ && j < n; ++j) bias[j] = to_float(bias_[column + j]);
    for (int64_t r = 0; r < rows; ++r, sums += kLaneSums) {
      Out* y = out_ + (row + r) * in_.columns + column;
      for (int64_t j = 0; j < n; ++j) from_float(sums[j] + bias[j], y + j);
    }
  }

  const T* weight(int64_t t) const { return weight_.data + t * kLaneSums * weight_.stride; }
  int64_t width(int64_t t) const { return std::min<int64_t>(kLaneSums, in_.columns - t * kLaneSums); }

  LinearIn in_;
  Matrix<T> x_, weight_;
  const T* bias_;
  Out* out_;
  int64_t tiles_, block_, panels_, panel_;
};

template <class T>
void run(const LinearIn& in, const LinearOut& out, int threads) {
  if (out.wide) return Linear<T, float>(in, static_cast<float*>(out.data)).run(threads);
  Linear<T, T>(in, static_cast<T*>(out.data)).run(threads);
}

}  // namespace

void linear(const LinearIn& in, const LinearOut& out, int threads) {
  switch (in.dtype) {
    case DType::f32:
      return run<float>(in, out, threads);
    case DType::bf16:
      return run<bf16>(in, out, threads);
    case DType::f16:
      return run<f16>(in, out, threads);
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
