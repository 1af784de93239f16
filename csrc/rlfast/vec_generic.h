// Any machine: 4 lanes of the compilers' vector extension, which is SSE2 on x86-64.
#pragma once

namespace rlfast {
namespace RLFAST_ISA_NS {

typedef float F __attribute__((vector_size(16)));
typedef int32_t M __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr bool kFused = false;

inline F set1(float x) { return F{x, x, x, x}; }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F fma_sub(F a, F b, F c) { return a * b - c; }
inline F head12(F a) { return (F)((M)a & ~0xfff); }
inline M greater(F a, F b) { return a > b; }
inline M equal(F a, F b) { return a == b; }
inline F select(M m, F yes, F no) { return (F)((m & (M)yes) | (~m & (M)no)); }
inline M at_least(F a, F b) { return a >= b; }
inline M unequal(F a, F b) { return a != b; }
inline M both(M a, M b) { return a & b; }
inline M either(M a, M b) { return a | b; }
inline M except(M a, M b) { return a & ~b; }
inline M load_flags(const uint8_t* p) { return M{p[0], p[1], p[2], p[3]} > 0; }
inline F exponent(F x) { return __builtin_convertvector(((M)x >> 23) - 127, F); }
inline F max(F a, F b) { return select(a > b, a, b); }
inline F min(F a, F b) { return select(a < b, a, b); }
inline F min_number(F a, F b) { return select(equal(b, b), min(a, b), a); }
inline F max_number(F a, F b) { return select(equal(b, b), max(a, b), a); }
struct N {
  M lanes;
};
inline N zero_count() { return {M{0, 0, 0, 0}}; }
inline N tally(N n, M m) { return {n.lanes - m}; }
inline N add(N a, N b) { return {a.lanes + b.lanes}; }
inline int64_t reduce_add(N n) { return int64_t{n.lanes[0]} + n.lanes[1] + n.lanes[2] + n.lanes[3]; }
inline F abs(F a) { return (F)((M)a & 0x7fffffff); }
inline uint32_t bits(M m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
inline bool any(M m) { return bits(m) != 0; }
inline M from_bits(uint32_t x) {
  const int32_t bits = static_cast<int32_t>(x);
  return (M{bits, bits, bits, bits} & M{1, 2, 4, 8}) != 0;
}
inline F scale2(F p, F n) {
  // n + 1.5·2^23 holds the integer n in its low bits, whatever the compiler's float-to-int conversion does with NaN.
  const M power = ((M)(n + set1(0x1.8p23f)) + 127) << 23;
  return (F)((M)(p * (F)power) & ((n >= set1(-126.0f)) | (n != n)));
}
constexpr bool kScalesAny = false;
constexpr bool kSplitsInf = false;
inline void split(F t, F k, F* n, F* f) {
  const F magic = set1(0x1.8p23f);
  const F u = mul(t, k);  // rounded once: without a fused product, t·k − n would round differently for n
  *n = sub(add(u, magic), magic);
  *f = sub(u, *n);
}

inline F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
inline F load(const T* p) {
  return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class T>
inline F load_part(const T* p, int n, float fill) {
  F x = set1(fill);
  for (int i = 0; i < n; ++i) x[i] = to_float(p[i]);
  return x;
}
inline void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
template <class T>
inline void store(T* p, F x) {
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p + i);
}
template <class T>
inline void store_part(T* p, F x, int n) {
  for (int i = 0; i < n; ++i) from_float(x[i], p + i);
}
template <class T>
inline void stream(T* p, F x) {
  store(p, x);
}
inline void stream_fence() {}
inline void prefetch(const void* p) { __builtin_prefetch(p); }

inline float reduce_max(F x) {
  const float low = x[0] > x[1] ? x[0] : x[1], high = x[2] > x[3] ? x[2] : x[3];
  return low > high ? low : high;
}

typedef double D __attribute__((vector_size(16)));
inline D zero_double() { return D{0.0, 0.0}; }
inline D add(D a, D b) { return a + b; }
inline D accumulate(D d, F x) {
  return d + (D{static_cast<double>(x[0]), static_cast<double>(x[1])} +
              D{static_cast<double>(x[2]), static_cast<double>(x[3])});
}
inline double reduce_add(D d) { return d[0] + d[1]; }
inline double reduce_add(F x) { return reduce_add(accumulate(zero_double(), x)); }

typedef int64_t DM __attribute__((vector_size(16)));
constexpr int kDoubles = 2;
inline D set1_double(double x) { return D{x, x}; }
inline D load_double(const double* p) {
  D x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store_double(double* p, D x) { std::memcpy(p, &x, sizeof x); }
inline D widen_load(const float* p) { return D{static_cast<double>(p[0]), static_cast<double>(p[1])}; }
inline void narrow_store(float* p, D x) {
  p[0] = static_cast<float>(x[0]);
  p[1] = static_cast<float>(x[1]);
}
inline D sub(D a, D b) { return a - b; }
inline D mul(D a, D b) { return a * b; }
inline D fma(D a, D b, D c) { return a * b + c; }
inline DM nonzero(D x) { return x != zero_double(); }
inline D select(DM m, D yes, D no) { return (D)((m & (DM)yes) | (~m & (DM)no)); }
inline D min(D a, D b) { return select(a < b, a, b); }

typedef uint64_t W __attribute__((vector_size(16)));
inline W set1_word(uint32_t x) { return W{x, x}; }
inline W words_from(uint32_t x) { return W{x, x + 1}; }
inline W product(W a, W b) { return (a & 0xffffffff) * (b & 0xffffffff); }
inline W high_word(W a) { return a >> 32; }
inline W exclusive_or(W a, W b, W c) { return a ^ b ^ c; }
inline W max_word(W a, W b) {
  const W x = a & 0xffffffff, y = b & 0xffffffff;
  return W{x[0] > y[0] ? x[0] : y[0], x[1] > y[1] ? x[1] : y[1]};
}
inline uint32_t words_at_least(W a, W b) {
  const W x = a & 0xffffffff;
  return (x[0] >= b[0] ? 1u : 0u) | (x[1] >= b[1] ? 2u : 0u);
}
inline void store_words(uint32_t* p, W a) {
  p[0] = static_cast<uint32_t>(a[0]);
  p[1] = static_cast<uint32_t>(a[1]);
}
inline F float_of_words(const uint32_t* p) {
  return F{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}

using R = F;
constexpr int kRows = 4;
inline R load_rows(const float* p) { return load(p); }
inline void store_rows(float* p, R x) { store(p, x); }
inline void stream_rows(float* p, R x) { store(p, x); }
// x[i] lane j ↔ x[j] lane i.
inline void transpose(R* x) {
  const R a = x[0], b = x[1], c = x[2], d = x[3];
  for (int i = 0; i < kRows; ++i) x[i] = R{a[i], b[i], c[i], d[i]};
}

constexpr int kLaneSums = 4;
inline void lane_sums(const F* x, float* y) {
  R rows[kRows] = {x[0], x[1], x[2], x[3]};
  transpose(rows);
  store(y, add(add(rows[0], rows[1]), add(rows[2], rows[3])));
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
