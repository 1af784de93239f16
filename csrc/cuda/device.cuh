// The few device primitives that the kernels use. Under nvcc they are the hardware's; compiled as plain C++,
// csrc/tests/simt.h stands in for them, so that the same kernel source runs on a CPU under sanitizers.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define RLFAST_DEVICE __device__ __forceinline__
#define RLFAST_SHARED(type, name) extern __shared__ type name[]
#define RLFAST_LAUNCH(kernel, grid, block, shared, stream, args) kernel<<<grid, block, shared, stream>>>(args)
#else
#include "../tests/simt.h"
#define RLFAST_DEVICE inline
#endif

namespace rlfast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// 2^x; results below 2^-126 are 0.
RLFAST_DEVICE float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
#endif
}

// The larger of the two, or NaN if either is one (fmaxf drops a NaN).
RLFAST_DEVICE float max_nan(float a, float b) {
#ifdef __CUDACC__
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a != a ? a : b != b ? b : a > b ? a : b;
#endif
}

// A product that the compiler never contracts with a later sum: z must have the same bits wherever it is used.
RLFAST_DEVICE float product(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// The same number, of which the compiler knows nothing: what is computed from it is computed anew, not kept in registers.
RLFAST_DEVICE float forgotten(float x) {
#ifdef __CUDACC__
  asm volatile("" : "+f"(x));
#endif
  return x;
}

RLFAST_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane >>= 1) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

RLFAST_DEVICE float warp_max(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane >>= 1) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}

RLFAST_DEVICE uint32_t warp_max(uint32_t x) { return __reduce_max_sync(kAllLanes, x); }
RLFAST_DEVICE uint32_t warp_min(uint32_t x) { return __reduce_min_sync(kAllLanes, x); }

// Storage types: how many elements a 16-byte vector has, and their way to and from fp32.
struct F32 {
  using Bits = uint32_t;
  static constexpr int kWidth = 4;
  static constexpr Bits kMinusInf = 0xff800000u;
  static RLFAST_DEVICE float to_float(Bits x) { return __uint_as_float(x); }
  static RLFAST_DEVICE Bits from_float(float x) { return __float_as_uint(x); }
  static RLFAST_DEVICE void unpack(uint32_t word, float* x) { x[0] = __uint_as_float(word); }
  static RLFAST_DEVICE uint32_t pack(const float* x) { return __float_as_uint(x[0]); }
};

struct BF16 {
  using Bits = uint16_t;
  static constexpr int kWidth = 8;
  static constexpr Bits kMinusInf = 0xff80u;
  static RLFAST_DEVICE float to_float(Bits x) { return __uint_as_float(uint32_t(x) << 16); }
  static RLFAST_DEVICE Bits from_float(float x) {
    float both[2] = {x, 0.0f};
    return Bits(pack(both));
  }
  static RLFAST_DEVICE void unpack(uint32_t word, float* x) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
  }
  static RLFAST_DEVICE uint32_t pack(const float* x) {
#ifdef __CUDACC__
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
    return word;
#else
    return simt::bf16_bits(x[0]) | uint32_t(simt::bf16_bits(x[1])) << 16;
#endif
  }
};

struct F16 {
  using Bits = uint16_t;
  static constexpr int kWidth = 8;
  static constexpr Bits kMinusInf = 0xfc00u;
  static RLFAST_DEVICE float to_float(Bits x) {
#ifdef __CUDACC__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    return simt::f16_value(x);
#endif
  }
  static RLFAST_DEVICE Bits from_float(float x) {
    float both[2] = {x, 0.0f};
    return Bits(pack(both));
  }
  static RLFAST_DEVICE void unpack(uint32_t word, float* x) {
    x[0] = to_float(Bits(word));
    x[1] = to_float(Bits(word >> 16));
  }
  static RLFAST_DEVICE uint32_t pack(const float* x) {
#ifdef __CUDACC__
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
    return word;
#else
    return simt::f16_bits(x[0]) | uint32_t(simt::f16_bits(x[1])) << 16;
#endif
  }
};

// Sixteen bytes: four words of elements.
struct Vector {
  uint32_t word[4];
};

template <class T>
RLFAST_DEVICE void unpack(const Vector& v, float* x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) T::unpack(v.word[i], x + i * (T::kWidth / 4));
}

template <class T>
RLFAST_DEVICE Vector pack(const float* x) {
  Vector v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = T::pack(x + i * (T::kWidth / 4));
  return v;
}

// ReadOnly: nothing writes the buffer while the kernel runs, so the load may go through the read-only path.
template <bool ReadOnly>
RLFAST_DEVICE Vector load16(const void* p) {
  const uint4* q = static_cast<const uint4*>(p);
  uint4 v;
  if constexpr (ReadOnly)
    v = __ldg(q);
  else
    v = *q;
  return {{v.x, v.y, v.z, v.w}};
}

RLFAST_DEVICE void store16(void* p, const Vector& v) {
  *static_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// The 16 bytes at `p`, which lies `shift` bytes beyond a 16-byte boundary: two aligned loads and a funnel shift. The second
// load is the neighbouring lane's first, so it is served by the L1.
template <bool ReadOnly>
RLFAST_DEVICE Vector load16_shifted(const char* p, int shift) {
  Vector low = load16<ReadOnly>(p - shift), high = load16<ReadOnly>(p - shift + 16);
  uint32_t w[9] = {
      low.word[0], low.word[1], low.word[2], low.word[3], high.word[0], high.word[1], high.word[2], high.word[3], 0};
#pragma unroll
  for (int i = 0; i < 7; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
  Vector v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = __funnelshift_r(w[i], w[i + 1], 8 * (shift & 3));
  return v;
}

// Columns [column, column + T::kWidth) of a row, −inf outside [0, vocab); `shift` is the address of the first modulo 16. No byte
// outside the row is read. Unaligned fp32 comes one by one: two vectors for each would take registers, and the L1 keeps up.
template <class T, bool ReadOnly>
RLFAST_DEVICE Vector load_columns(const void* row, int64_t column, int64_t vocab, int shift) {
  using Bits = typename T::Bits;
  constexpr int width = T::kWidth, per_word = width / 4;
  const Bits* p = static_cast<const Bits*>(row) + column;
  if (shift == 0 && column >= 0 && column + width <= vocab) return load16<ReadOnly>(p);
  if (width == 8 && shift != 0 && column >= width && column + 2 * width <= vocab)
    return load16_shifted<ReadOnly>(reinterpret_cast<const char*>(p), shift);
  int begin = column < 0 ? int(-column) : 0, end = int(min(max(vocab - column, int64_t(0)), int64_t(width)));
  Vector v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < per_word; ++j) {
      int at = i * per_word + j;
      Bits bits = T::kMinusInf;
      if (at >= begin && at < end) bits = p[at];
      word |= uint32_t(bits) << (j * 16);
    }
    v.word[i] = word;
  }
  return v;
}

}  // namespace rlfast::cuda
