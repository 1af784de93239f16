// Scratch of the kernels, and the small sums that lay it out.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <cstddef>
#include <cstdint>
#include <new>

namespace rlfast {
namespace RLFAST_ISA_NS {

// Uninitialised, from the start of a cache line. Not std::vector, whose functions the linker would merge across the
// instruction sets.
template <class T>
class Buffer {
public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(static_cast<size_t>(n) * sizeof(T), kLine))) {}
  ~Buffer() { ::operator delete(data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

inline int thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The row stride of a matrix that is read down its columns: an odd number of cache lines, so that rows do not share sets.
inline int64_t pitch(int64_t columns) { return (ceil_div(columns, 16) | 1) * 16; }

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
