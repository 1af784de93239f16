// Whitening of what affine_scan has written: moments of segments, of rows and of the batch, then one pass over it.
//
// Tokens of a segment, segments of a row and rows come in one order, so that the bits depend neither on the padding nor on how rows
// are split. Squares are taken about a number of the same set, so that they keep their digits whatever the offset.
#pragma once
#include "../rlfast/affine_scan.h"
#include "launch.cuh"
#include "tokens.cuh"

namespace rlfast::cuda {

namespace {

constexpr int kMoments = 3;  // numbers of a set's moments

struct Moments {
  double n, mean, squares;  // Σ(x − mean)²
};

// Numbers as they come, about the first of them.
struct Sums {
  double n = 0.0, first = 0.0, off = 0.0, squares = 0.0;
  RLFAST_DEVICE void add(double x) {
    if (n == 0.0) first = x;
    const double d = x - first;
    n += 1.0, off += d, squares += d * d;
  }
  RLFAST_DEVICE Moments moments() const {
    const double d = off / max(n, 1.0);
    return {n, first + d, squares - off * d};
  }
};

// Of two sets, either of which may be empty.
RLFAST_DEVICE Moments joined(const Moments& a, const Moments& b) {
  const double n = a.n + b.n, share = b.n / max(n, 1.0), gap = b.mean - a.mean;
  return {n, a.mean + gap * share, a.squares + b.squares + gap * gap * a.n * share};
}

// Of the sets of all threads of a block, for every thread.
RLFAST_DEVICE Moments together(const Moments& m) {
  double sum[2] = {m.n, m.n * m.mean};
  block_total(sum);
  const double mean = sum[1] / max(sum[0], 1.0), gap = m.mean - mean;
  double squares[1] = {m.squares + m.n * gap * gap};
  block_total(squares);
  return {sum[0], mean, squares[0]};
}

RLFAST_DEVICE Moments moments_at(const double* x, int64_t i) {
  return {x[i * kMoments], x[i * kMoments + 1], x[i * kMoments + 2]};
}

RLFAST_DEVICE void put(double* x, int64_t i, const Moments& m) {
  if (threadIdx.x == 0) x[i * kMoments] = m.n, x[i * kMoments + 1] = m.mean, x[i * kMoments + 2] = m.squares;
}

// Where the segments of each row lie: a packed row of n tokens has n / segment places or one more.
struct Places {
  const int64_t* cu;
  int64_t rows, segment, segments;  // a segment's tokens; segments of padded rows

  RLFAST_DEVICE int64_t begin(int64_t row) const { return cu ? row + cu[row] / segment : row * segments; }
  // The row that a place belongs to: the last one that begins there or before.
  RLFAST_DEVICE int64_t row_of(int64_t place) const {
    if (!cu) return place / segments;
    int64_t low = 0, high = rows;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (begin(middle) <= place ? low : high) = middle;
    }
    return low;
  }
};

struct Whitening {
  ScanIn in;
  float* x;
  Whiten how;
  Places places;
  const double* moments;  // [places, kMoments]
  double* sums;           // [blocks of rows, kMoments]
  int64_t size;           // of x
};

__global__ void __launch_bounds__(kLossThreads) add_rows(Whitening w) {
  const int64_t row = int64_t(blockIdx.x) * kLossThreads + threadIdx.x;
  Moments m = {0.0, 0.0, 0.0};
  if (row < w.in.rows)
    for (int64_t i = w.places.begin(row); i < w.places.begin(row + 1); ++i) m = joined(m, moments_at(w.moments, i));
  put(w.sums, blockIdx.x, together(m));
}

__global__ void __launch_bounds__(kLossThreads) whiten_tokens(Whitening w) {
  const int64_t blocks = (w.in.rows + kLossThreads - 1) / kLossThreads;
  Moments m = {0.0, 0.0, 0.0};
  for (int64_t i = threadIdx.x; i < blocks; i += kLossThreads) m = joined(m, moments_at(w.sums, i));
  m = together(m);
  // alone, a token is at the mean: its variance is 0, with Bessel's correction too
  const double var = max(m.squares, 0.0) / max(m.n - (w.how.bessel ? 1.0 : 0.0), 1.0), eps = w.how.eps;
  const double scale = 1.0 / (w.how.floor ? sqrt(max(var, eps)) : w.how.inside ? sqrt(var + eps) : sqrt(var) + eps);
  const double shift = w.how.shift ? 0.0 : m.mean;
  const TokenFlags& mask = w.in.mask;
  for (int64_t i = int64_t(blockIdx.x) * kLossThreads + threadIdx.x; i < w.size;
       i += int64_t(gridDim.x) * kLossThreads) {
    const int64_t row = !mask.data || w.in.cu || mask.stride == w.in.steps ? 0 : i / w.in.steps;
    const bool valid = !mask.data || mask.data[i + row * (mask.stride - w.in.steps)];
    w.x[i] = valid ? float((double(w.x[i]) - m.mean) * scale + shift) : 0.0f;
  }
}

}  // namespace

}  // namespace rlfast::cuda
