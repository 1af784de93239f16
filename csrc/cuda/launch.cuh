// What every launch needs: the caller's device, errors as exceptions, how many blocks keep it busy.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "device.cuh"

namespace rlfast::cuda {

constexpr int64_t kMaxGrid = 2147483647;

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

// Launches go to `device` while it lives, then to the caller's again.
class OnDevice {
public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

private:
  int before_ = 0;
  bool changed_ = false;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks that keep every multiprocessor busy to the end; with fewer rows than this, rows are split.
inline int64_t busy_blocks(int device) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return 8 * int64_t(multiprocessors);
}

}  // namespace rlfast::cuda
