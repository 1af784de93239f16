// NEON on aarch64: 4 lanes.
#pragma once
#include <arm_neon.h>

namespace rlfast {
namespace RLFAST_ISA_NS {

using F = float32x4_t;
using M = uint32x4_t;
constexpr int kLanes = 4;
constexpr bool kFused = true;

inline F set1(float x) { return vdupq_n_f32(x); }
inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F div(F a, F b) { return vdivq_f32(a, b); }
inline F head12(F a) { return a; }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F fma_sub(F a, F b, F c) { return vfmaq_f32(vnegq_f32(c), a, b); }
inline M greater(F a, F b) { return vcgtq_f32(a, b); }
inline M equal(F a, F b) { return vceqq_f32(a, b); }
inline F select(M m, F yes, F no) { return vbslq_f32(m, yes, no); }
inline M at_least(F a, F b) { return vcgeq_f32(a, b); }
inline M unequal(F a, F b) { return vmvnq_u32(vceqq_f32(a, b)); }
inline M both(M a, M b) { return vandq_u32(a, b); }
inline M either(M a, M b) { return vorrq_u32(a, b); }
inline M except(M a, M b) { return vbicq_u32(a, b); }
inline M load_flags(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  const uint32x4_t x = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
  return vtstq_u32(x, x);
}
inline F exponent(F x) {
  const int32x4_t biased = vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_f32(x), 23));
  return vcvtq_f32_s32(vsubq_s32(biased, vdupq_n_s32(127)));
}
// By comparison: vmaxq would give NaN for a NaN in either operand.
inline F max(F a, F b) { return select(greater(a, b), a, b); }
inline F min(F a, F b) { return select(greater(b, a), a, b); }
inline F min_number(F a, F b) { return vminnmq_f32(a, b); }
inline F max_number(F a, F b) { return vmaxnmq_f32(a, b); }
struct N {
  uint32x4_t lanes;
};
inline N zero_count() { return {vdupq_n_u32(0)}; }
inline N tally(N n, M m) { return {vsubq_u32(n.lanes, m)}; }
inline N add(N a, N b) { return {vaddq_u32(a.lanes, b.lanes)}; }
inline int64_t reduce_add(N n) { return vaddvq_u32(n.lanes); }
inline F abs(F a) { return vabsq_f32(a); }
inline uint32_t bits(M m) {
  const uint32x4_t lane = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(m, lane));
}
inline bool any(M m) { return vmaxvq_u32(m) != 0; }
inline M from_bits(uint32_t x) {
  const uint32x4_t lane = {1, 2, 4, 8};
  return vtstq_u32(vdupq_n_u32(x), lane);
}
inline F scale2(F p, F n) {
  const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
  const F scaled = mul(p, vreinterpretq_f32_s32(power));
  return select(greater(set1(-126.0f), n), set1(0.0f), scaled);
}
constexpr bool kScalesAny = false;
constexpr bool kSplitsInf = false;
inline void split(F t, F k, F* n, F* f) {
  const F magic = set1(0x1.8p23f);
  *n = sub(fma(t, k, magic), magic);
  *f = fma_sub(t, k, *n);
}

inline F widen(uint16x4_t x, bf16) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
inline F widen(uint16x4_t x, f16) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
inline uint16x4_t narrow(F x, bf16) {
  const uint32x4_t u = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t r = vshrq_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), 16);
  return vmovn_u32(vbslq_u32(vceqq_f32(x, x), r, vdupq_n_u32(0x7fc0)));
}
inline uint16x4_t narrow(F x, f16) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }

inline F load(const float* p) { return vld1q_f32(p); }
template <class T>
inline F load(const T* p) {
  return widen(vld1_u16(reinterpret_cast<const uint16_t*>(p)), T{});
}
template <class T>
inline F load_part(const T* p, int n, float fill) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return vld1q_f32(lanes);
}
inline void store(float* p, F x) { vst1q_f32(p, x); }
template <class T>
inline void store(T* p, F x) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), narrow(x, T{}));
}
template <class T>
inline void store_part(T* p, F x, int n) {
  T lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
template <class T>
inline void stream(T* p, F x) {
  store(p, x);
}
inline void stream_fence() {}
inline void prefetch(const void* p) { __builtin_prefetch(p); }

inline float reduce_max(F x) { return vmaxnmvq_f32(x); }

using D = float64x2_t;
inline D zero_double() { return vdupq_n_f64(0.0); }
inline D add(D a, D b) { return vaddq_f64(a, b); }
inline D accumulate(D d, F x) { return vaddq_f64(d, vaddq_f64(vcvt_f64_f32(vget_low_f32(x)), vcvt_high_f64_f32(x))); }
inline double reduce_add(D d) { return vaddvq_f64(d); }
inline double reduce_add(F x) { return reduce_add(accumulate(zero_double(), x)); }

using DM = uint64x2_t;
constexpr int kDoubles = 2;
inline D set1_double(double x) { return vdupq_n_f64(x); }
inline D load_double(const double* p) { return vld1q_f64(p); }
inline void store_double(double* p, D x) { vst1q_f64(p, x); }
inline D widen_load(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
inline void narrow_store(float* p, D x) { vst1_f32(p, vcvt_f32_f64(x)); }
inline D sub(D a, D b) { return vsubq_f64(a, b); }
inline D mul(D a, D b) { return vmulq_f64(a, b); }
inline D fma(D a, D b, D c) { return vfmaq_f64(c, a, b); }
inline DM nonzero(D x) { return veorq_u64(vceqzq_f64(x), vdupq_n_u64(~0ull)); }
inline D select(DM m, D yes, D no) { return vbslq_f64(m, yes, no); }
inline D min(D a, D b) { return select(vcltq_f64(a, b), a, b); }

using W = uint64x2_t;
inline W set1_word(uint32_t x) { return vdupq_n_u64(x); }
inline W words_from(uint32_t x) {
  const uint64x2_t next = {0, 1};
  return vaddq_u64(vdupq_n_u64(x), next);
}
inline W product(W a, W b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
inline W high_word(W a) { return vshrq_n_u64(a, 32); }
inline W exclusive_or(W a, W b, W c) { return veorq_u64(a, veorq_u64(b, c)); }
inline W max_word(W a, W b) {
  return vreinterpretq_u64_u32(vmaxq_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b)));
}
inline uint32_t words_at_least(W a, W b) {
  const uint32x2_t lane = {1, 2};
  return vaddv_u32(vand_u32(vcge_u32(vmovn_u64(a), vmovn_u64(b)), lane));
}
inline void store_words(uint32_t* p, W a) { vst1_u32(p, vmovn_u64(a)); }
inline F float_of_words(const uint32_t* p) { return vcvtq_f32_u32(vld1q_u32(p)); }

using R = F;
constexpr int kRows = 4;
inline R load_rows(const float* p) { return load(p); }
inline void store_rows(float* p, R x) { store(p, x); }
inline void stream_rows(float* p, R x) { store(p, x); }
// x[i] lane j ↔ x[j] lane i.
inline void transpose(R* x) {
  const float32x4x2_t a = vtrnq_f32(x[0], x[1]), b = vtrnq_f32(x[2], x[3]);
  x[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  x[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  x[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  x[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

constexpr int kLaneSums = 4;
inline void lane_sums(const F* x, float* y) { store(y, vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]))); }

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
