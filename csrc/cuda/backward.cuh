// The backward of token_logps: one read and one write of the logits.
#pragma once
#include "leaf.cuh"

namespace rlfast::cuda {

namespace {

constexpr int kBackwardThreads = 256, kBackwardVectors = 4;

struct Backward {
  Logits logits;
  Transform transform;
  Targets targets;
  BackwardIn in;
  Logits gradient;
  int64_t tiles;  // of a row
};

// What the backward knows of a row. All lanes of the warp take part.
RLFAST_DEVICE RowGradient row_gradient(const Backward& b, int64_t row, int lane) {
  const BackwardIn& in = b.in;
  int64_t candidates = b.targets.candidates;
  const int64_t* ids = b.targets.ids + row * candidates;
  float g_logp = 0.0f;
  if (in.g_logp)
    for (int64_t k = lane; k < candidates; k += kWarp)
      if (ids[k] != kIgnoreIndex) g_logp += in.g_logp[row * candidates + k];
  bool entropy = in.g_entropy != nullptr;
  return {in.peak[row],
          in.log_sum[row],
          entropy ? in.saved_entropy[row] : 0.0f,
          warp_sum(g_logp),
          in.g_lse ? in.g_lse[row] : 0.0f,
          entropy ? in.g_entropy[row] : 0.0f};
}

// ∂L/∂x at the column of candidate `k`; candidates that repeat it count together.
template <class T>
RLFAST_DEVICE float gradient_at_target(const Backward& b, const RowGradient& g, const RowTransform& t, int64_t row,
                                       int64_t k) {
  int64_t candidates = b.targets.candidates;
  const int64_t* ids = b.targets.ids + row * candidates;
  float x = T::to_float(row_of<T>(b.logits, row)[ids[k]]);
  float hit = 0.0f;
  if (b.in.g_logp)
    for (int64_t other = 0; other < candidates; ++other)
      if (ids[other] == ids[k]) hit += b.in.g_logp[row * candidates + other];
  return product(g.at_target(t(x), b.in.saved_logp[k * b.logits.rows() + row], hit), t.slope(x));
}

template <class T>
RLFAST_DEVICE void store_columns(void* row, int64_t column, int64_t vocab, const float* g) {
  constexpr int width = T::kWidth;
  typename T::Bits* p = static_cast<typename T::Bits*>(row) + column;
  if (column >= 0 && column + width <= vocab) return store16(p, pack<T>(g));
#pragma unroll
  for (int j = 0; j < width; ++j)
    if (column + j >= 0 && column + j < vocab) p[j] = T::from_float(g[j]);
}

// A block takes a tile of one row: kBackwardVectors vectors a thread, all loaded before the first is used. Vectors are aligned in
// the gradient's row, so that every store is whole; `origin` ≤ 0 is the first vector's column.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 2) backward_kernel(const Backward b) {
  constexpr int width = T::kWidth, bytes = 16 / width;
  int64_t vocab = b.logits.vocab, candidates = b.targets.candidates, work = b.logits.rows() * b.tiles;
  int lane = threadIdx.x % kWarp;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    int64_t row = item / b.tiles, tile = item % b.tiles;
    void* out = row_of<T>(b.gradient, row);
    const typename T::Bits* logits = row_of<T>(b.logits, row);
    int64_t origin = -int64_t(misalignment(out) / bytes);
    int shift = (misalignment(logits) - misalignment(out)) & 15;
    int64_t tile_begin = origin + tile * blockDim.x * kBackwardVectors * width;
    int64_t tile_end = tile_begin + int64_t(blockDim.x) * kBackwardVectors * width;
    if (tile_begin >= vocab) continue;
    bool live = counts(b.targets, row, lane);
    Vector raw[kBackwardVectors];
    if (live) {
#pragma unroll
      for (int i = 0; i < kBackwardVectors; ++i) {
        int64_t column = tile_begin + (int64_t(i) * blockDim.x + threadIdx.x) * width;
        if (column < vocab) raw[i] = load_columns<T, false>(logits, column, vocab, shift);
      }
    }
    RowGradient g = {};
    RowTransform t = {};
    bool near = false;
    const int64_t* ids = b.targets.ids + row * candidates;
    if (live) {
      g = row_gradient(b, row, lane);
      t = RowTransform::of(b.transform, row);
      for (int64_t k = threadIdx.x; k < candidates; k += blockDim.x)
        near |= ids[k] >= 0 && ids[k] < vocab && ids[k] >= tile_begin && ids[k] < tile_end;
    }
    near = __syncthreads_or(near);
#pragma unroll
    for (int i = 0; i < kBackwardVectors; ++i) {
      int64_t column = tile_begin + (int64_t(i) * blockDim.x + threadIdx.x) * width;
      if (column >= vocab) continue;
      float v[width] = {};
      if (live) {
        unpack<T>(raw[i], v);
#pragma unroll
        for (int j = 0; j < width; ++j) v[j] = t.plain ? g(v[j]) : product(g(t(v[j])), t.slope(v[j]));
      }
      for (int64_t k = 0; near && k < candidates; ++k) {
        if (ids[k] < 0 || ids[k] >= vocab || ids[k] < column || ids[k] >= column + width) continue;
        float exact = gradient_at_target<T>(b, g, t, row, k);
#pragma unroll
        for (int j = 0; j < width; ++j) v[j] = ids[k] == column + j ? exact : v[j];
      }
      store_columns<T>(out, column, vocab, v);
    }
  }
}

}  // namespace

}  // namespace rlfast::cuda
