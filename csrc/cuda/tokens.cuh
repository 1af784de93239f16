// The tokens of a loss on a GPU: where those of a sequence lie, four of them in a thread's registers, and sums over the block and
// over all blocks.
#pragma once
#include "../rlfast/token_loss.h"
#include "device.cuh"

namespace rlfast::cuda {

namespace {

// Four tokens a thread: 16 bytes of fp32, 8 of the 16-bit types. Eight would fill the latter's 16 bytes and twice the registers.
constexpr int kLossThreads = 256, kGroup = 4;

// Tokens [begin, end) of a sequence whose first is token `first` of `row`.
struct Piece {
  int64_t row, first, begin, end;
};

// Where packed sequence i begins. Nothing outside the batch is read, whatever cu_seqlens holds.
RLFAST_DEVICE int64_t boundary(const int64_t* cu_seqlens, int64_t i, int64_t length) {
  return min(max(cu_seqlens[i], int64_t(0)), length);
}

RLFAST_DEVICE bool aligned(const void* p, int bytes) { return (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) == 0; }

template <class T>
RLFAST_DEVICE void load_floats(const LossField& f, int64_t at, int live, float (&x)[kGroup]) {
  using Bits = typename T::Bits;
  const Bits* p = static_cast<const Bits*>(f.data) + at;
  if (f.step == 1 && live == kGroup && aligned(p, kGroup * sizeof(Bits))) {
    if constexpr (T::kWidth == kGroup)
      unpack<T>(load16<true>(p), x);
    else {
      uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
      T::unpack(v.x, x), T::unpack(v.y, x + 2);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j) x[j] = j < live ? T::to_float(p[j * f.step]) : 0.0f;
}

// The field of tokens t … t + live − 1 of a piece's sequence.
RLFAST_DEVICE void load(const LossField& f, const Piece& p, int64_t t, int live, float (&x)[kGroup]) {
  int64_t at = p.row * f.stride + (p.first + t) * f.step;
  switch (f.dtype) {
    case DType::f32:
      return load_floats<F32>(f, at, live, x);
    case DType::bf16:
      return load_floats<BF16>(f, at, live, x);
    case DType::f16:
      return load_floats<F16>(f, at, live, x);
  }
}

// A bit a token; none beyond `live`.
RLFAST_DEVICE unsigned load(const LossFlags& f, const Piece& p, int64_t t, int live) {
  unsigned bits = (1u << live) - 1;
  if (!f.data) return bits;
  const uint8_t* at = f.data + p.row * f.stride + p.first + t;
  if (live == kGroup && aligned(at, kGroup)) {
    uint32_t word = *reinterpret_cast<const uint32_t*>(at);
    return (word & 1) | (word >> 7 & 2) | (word >> 14 & 4) | (word >> 21 & 8);
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    if (j < live && !at[j]) bits &= ~(1u << j);
  return bits;
}

RLFAST_DEVICE bool bit(unsigned bits, int j) { return bits >> j & 1; }

RLFAST_DEVICE void clear(unsigned on, float (&x)[kGroup]) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) x[j] = bit(on, j) ? x[j] : 0.0f;
}

// Gradients are [rows, length], without gaps.
RLFAST_DEVICE float* place(float* gradient, const Piece& p, int64_t length, int64_t t) {
  return gradient + p.row * length + p.first + t;
}

RLFAST_DEVICE void store(float* p, int live, const float (&x)[kGroup]) {
  if (live == kGroup && aligned(p, kGroup * sizeof(float))) return store16(p, pack<F32>(x));
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    if (j < live) p[j] = x[j];
}

// The larger of the two, or NaN if either is one.
RLFAST_DEVICE double joined(double a, double b, bool maximum) { return !maximum ? a + b : a != a || a > b ? a : b; }

constexpr int kParts = 8;  // threads a number in the second step of block_total

constexpr size_t shared_bytes(int numbers) { return sizeof(double) * numbers * (kLossThreads + kParts); }

// Each of a thread's numbers over the block, for every thread, in an order that is always the same.
template <int kNumbers, int kFirstMaximum = kNumbers>
RLFAST_DEVICE void block_total(double (&x)[kNumbers]) {
  RLFAST_SHARED(double, shared);
  double* parts = shared + kNumbers * kLossThreads;
#pragma unroll
  for (int k = 0; k < kNumbers; ++k) shared[k * kLossThreads + threadIdx.x] = x[k];
  __syncthreads();
  if (threadIdx.x < kNumbers * kParts) {
    int number = threadIdx.x / kParts, part = threadIdx.x % kParts;
    double sum = shared[number * kLossThreads + part];
    for (int i = part + kParts; i < kLossThreads; i += kParts)
      sum = joined(sum, shared[number * kLossThreads + i], number >= kFirstMaximum);
    parts[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kNumbers) {
    double sum = parts[threadIdx.x * kParts];
    for (int i = 1; i < kParts; ++i)
      sum = joined(sum, parts[threadIdx.x * kParts + i], int(threadIdx.x) >= kFirstMaximum);
    shared[threadIdx.x] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kNumbers; ++k) x[k] = shared[k];
  __syncthreads();
}

// Σ of x over the threads before this one, for numbers whose sums are exact.
RLFAST_DEVICE double threads_before(double x) {
  RLFAST_SHARED(double, shared);
  shared[threadIdx.x] = x;
  __syncthreads();
  double sum = 0.0;
  for (unsigned i = 0; i < threadIdx.x; ++i) sum += shared[i];
  __syncthreads();
  return sum;
}

// The sums of a piece, to its place in `partial` [kNumbers, pieces].
template <int kNumbers>
RLFAST_DEVICE void give_partial(double* partial, int64_t pieces, int64_t piece, const double (&total)[kNumbers]) {
  if (threadIdx.x == 0)
#pragma unroll
    for (int k = 0; k < kNumbers; ++k) partial[k * pieces + piece] = total[k];
}

// What this thread takes of the sums of all pieces. Other blocks wrote them: not through the L1.
template <int kNumbers, int kFirstMaximum = kNumbers>
RLFAST_DEVICE void take_partial(const double* partial, int64_t pieces, double (&total)[kNumbers]) {
  for (int64_t piece = threadIdx.x; piece < pieces; piece += kLossThreads)
#pragma unroll
    for (int k = 0; k < kNumbers; ++k)
      total[k] = joined(total[k], __ldcg(partial + k * pieces + piece), k >= kFirstMaximum);
}

// Whether all other blocks are done, and what they wrote can be read. The counter is 0 again then.
RLFAST_DEVICE bool last_block(unsigned* finished) {
  __threadfence();
  __syncthreads();
  bool last = threadIdx.x == 0 && atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
  last = __syncthreads_or(last);
  __threadfence();
  return last;
}

}  // namespace

}  // namespace rlfast::cuda
