// Stands in for CUDA where there is none: each thread of a block is a fiber, blocks run one after another, and a barrier or a warp
// collective hands over to the next fiber. Kernels run unchanged, on exactly sized host buffers, under sanitizers.
// A collective that not every lane of its warp reaches, or a barrier that not every thread reaches, aborts.
// `simt::descending` reverses the order of the fibers and of the blocks: a missing barrier then shows as different bits.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

struct alignas(16) uint4 {  // so that the sanitizer sees a misaligned vector access
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct SimtIndex {
  unsigned x;
};
inline SimtIndex threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr int kWarp = 32;
inline bool descending = false;
inline int multiprocessors = 2;
inline unsigned grid_limit = 0xffffffffu;  // kernels stride over their work: fewer blocks must give the same

enum class Wait { none, warp, block, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::none;
  const char* what = nullptr;  // the collective it waits in
  int64_t passed = 0;          // warp collectives so far
  void* fake_stack = nullptr;
};

struct Block {
  static constexpr size_t kStack = 96 * 1024;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  void* scheduler_fake = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  int current = 0;
  // two buffers, used in turn: no lane can be two collectives ahead of another of its warp
  std::vector<uint32_t> posted[2];
  std::vector<int> votes;
  std::unique_ptr<char[]> shared;
  std::function<void()> body;
};
inline Block* block = nullptr;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "simt: %s (block %u, thread %u)\n", why, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void to_scheduler(bool last) {
  Fiber& me = block->fibers[block->current];
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &me.fake_stack, block->scheduler_stack, block->scheduler_size);
#endif
  (void)last;
  swapcontext(&me.context, &block->scheduler);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(me.fake_stack, &block->scheduler_stack, &block->scheduler_size);
#endif
}

inline void entry() {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_size);
#endif
  block->body();
  block->fibers[block->current].wait = Wait::done;
  to_scheduler(true);
}

inline void suspend(Wait wait, const char* what) {
  Fiber& me = block->fibers[block->current];
  me.wait = wait;
  me.what = what;
  to_scheduler(false);
}

inline void resume(int thread) {
  block->current = thread;
  threadIdx.x = unsigned(thread);
  Fiber& f = block->fibers[thread];
  f.wait = Wait::none;
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&block->scheduler_fake, f.stack.get(), Block::kStack);
#endif
  swapcontext(&block->scheduler, &f.context);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(block->scheduler_fake, nullptr, nullptr);
#endif
}

// Whether fibers [first, last) all wait in the same collective of this kind.
inline bool gathered(int first, int last, Wait wait) {
  const Fiber& leader = block->fibers[first];
  for (int i = first; i < last; ++i) {
    const Fiber& f = block->fibers[i];
    if (f.wait != wait) return false;
    if (std::strcmp(f.what, leader.what) != 0) fail("the threads of a group wait in different collectives");
  }
  return true;
}

inline void run_block(int threads) {
  int warps = threads / kWarp;
  std::vector<char> go(threads, 1);
  for (;;) {
    bool ran = false;
    for (int i = 0; i < threads; ++i) {
      int thread = descending ? threads - 1 - i : i;
      if (!go[thread]) continue;
      go[thread] = 0;
      ran = true;
      resume(thread);
    }
    if (!ran) break;
    for (int w = 0; w < warps; ++w)
      if (gathered(w * kWarp, (w + 1) * kWarp, Wait::warp)) std::fill_n(go.begin() + w * kWarp, kWarp, 1);
    if (gathered(0, threads, Wait::block)) std::fill(go.begin(), go.end(), 1);
  }
  for (const Fiber& f : block->fibers)
    if (f.wait != Wait::done) fail("deadlock: a barrier or a collective that some threads did not reach");
}

template <class F>
void launch(unsigned grid, unsigned threads, size_t shared_bytes, F kernel) {
  if (threads == 0 || threads % kWarp != 0 || threads > 1024 || grid == 0) fail("bad launch configuration");
  if (shared_bytes > 48 * 1024) fail("more than 48 KB of shared memory");
  grid = std::min(grid, grid_limit);
  Block b;
  b.fibers.resize(threads);
  b.posted[0].resize(threads), b.posted[1].resize(threads);
  b.votes.resize(threads);
  b.body = kernel;
  for (Fiber& f : b.fibers) f.stack.reset(new char[Block::kStack]);
  block = &b;
  blockDim.x = threads, gridDim.x = grid;
  for (unsigned index = 0; index < grid; ++index) {
    blockIdx.x = descending ? grid - 1 - index : index;
    b.shared.reset(new char[shared_bytes]);
    std::memset(b.shared.get(), 0xff, shared_bytes);  // NaN until written
    for (Fiber& f : b.fibers) {
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = Block::kStack;
      f.context.uc_link = nullptr;
      f.passed = 0;
      makecontext(&f.context, entry, 0);
    }
    run_block(int(threads));
  }
  block = nullptr;
}

// Posts a word, waits for the warp, and returns the warp's words.
inline const uint32_t* exchange(uint32_t word, const char* what) {
  Fiber& me = block->fibers[block->current];
  std::vector<uint32_t>& posted = block->posted[me.passed++ % 2];
  posted[block->current] = word;
  suspend(Wait::warp, what);
  return posted.data() + block->current / kWarp * kWarp;
}

template <class To, class From>
To cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

inline uint16_t bf16_bits(float x) {
  uint32_t bits = cast<uint32_t>(x);
  if (x != x) return 0x7fff;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float f16_value(uint16_t h) {
  int exponent = h >> 10 & 31, mantissa = h & 1023;
  float sign = h & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(float(mantissa + 1024), exponent - 25) : std::ldexp(float(mantissa), -24));
}

// Round to nearest even.
inline uint16_t f16_bits(float x) {
  uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return 0x7fff;
  float a = std::fabs(x);
  if (a >= 65520.0f) return sign | 0x7c00;
  int exponent = a > 0 ? std::max(std::ilogb(a), -14) : -14;
  int units = int(std::nearbyint(std::ldexp(a, 10 - exponent)));  // may round up to 2048: the carry is right
  return uint16_t(sign | ((exponent + 14) * 1024 + units));
}

template <class T>
T* shared() {
  return reinterpret_cast<T*>(block->shared.get());
}

}  // namespace simt

#define __global__
#define __launch_bounds__(...)
#define RLFAST_SHARED(type, name) type* name = simt::shared<type>()
#define RLFAST_LAUNCH(kernel, grid, block, shared, stream, args) \
  ((void)(stream), simt::launch(grid, block, shared, [copy = args] { kernel(copy); }))

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  int lane = simt::block->current % simt::kWarp;
  return simt::cast<float>(simt::exchange(simt::cast<uint32_t>(x), "shfl_xor")[lane ^ mask]);
}
template <class T>
T __shfl_sync(unsigned, T x, int source) {
  return simt::cast<T>(simt::exchange(simt::cast<uint32_t>(x), "shfl")[source]);
}
// Of the lane `delta` below; a lane that has none keeps its own.
inline double __shfl_up_sync(unsigned, double x, int delta) {
  const int lane = simt::block->current % simt::kWarp, source = lane < delta ? lane : lane - delta;
  uint32_t word[2];
  std::memcpy(word, &x, sizeof x);
  for (uint32_t& w : word) w = simt::exchange(w, "shfl_up")[source];
  std::memcpy(&x, word, sizeof x);
  return x;
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint32_t* votes = simt::exchange(vote, "ballot");
  unsigned bits = 0;
  for (int i = 0; i < simt::kWarp; ++i) bits |= votes[i] << i;
  return bits;
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t x) {
  const uint32_t* all = simt::exchange(x, "reduce_max");
  return *std::max_element(all, all + simt::kWarp);
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t x) {
  const uint32_t* all = simt::exchange(x, "reduce_min");
  return *std::min_element(all, all + simt::kWarp);
}
inline void __syncwarp() { simt::exchange(0, "syncwarp"); }
inline void __syncthreads() { simt::suspend(simt::Wait::block, "syncthreads"); }
inline bool __syncthreads_or(bool vote) {
  simt::block->votes[simt::block->current] = vote;
  simt::suspend(simt::Wait::block, "syncthreads_or");
  bool any = false;
  for (int v : simt::block->votes) any |= v != 0;
  simt::suspend(simt::Wait::block, "syncthreads_or");
  return any;
}

inline uint4 __ldg(const uint4* p) { return *p; }
inline uint2 __ldg(const uint2* p) { return *p; }
inline double __ldcg(const double* p) { return *p; }
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* p, unsigned most) {
  unsigned before = *p;
  *p = before >= most ? 0 : before + 1;
  return before;
}
inline int __ffs(unsigned x) { return x ? __builtin_ctz(x) + 1 : 0; }
inline float __uint_as_float(uint32_t x) { return simt::cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return simt::cast<uint32_t>(x); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int shift) {
  return shift ? low >> shift | high << (32 - shift) : low;
}
using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = simt::multiprocessors, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
