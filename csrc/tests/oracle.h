// What the stand-alone kernel tests share: buffers of exact size, rows in double precision by the definitions, and comparison.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../rlfast/token_logps.h"
#include "simt.h"

namespace rlfast::tests {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline int64_t checks = 0, failures = 0;
inline bool stop_at_first = false;  // failure

// A heap buffer of exactly n elements, so that the address sanitizer sees the first byte beyond it; its bytes are 0xff (NaN, −1).
template <class T>
struct Exact {
  std::unique_ptr<T[]> data;
  int64_t n;
  explicit Exact(int64_t n) : data(new T[n]), n(n) { std::memset(static_cast<void*>(data.get()), 0xff, n * sizeof(T)); }
  T* get() { return n ? data.get() : nullptr; }
  T& operator[](int64_t i) { return data[i]; }
};

inline int64_t width(DType type) { return type == DType::f32 ? 4 : 2; }

inline float read(const void* data, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(data)[i];
  uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == DType::f16 ? simt::f16_value(bits) : simt::cast<float>(uint32_t(bits) << 16);
}

inline void write(void* data, DType type, int64_t i, float x) {
  if (type == DType::f32)
    static_cast<float*>(data)[i] = x;
  else
    static_cast<uint16_t*>(data)[i] = type == DType::f16 ? simt::f16_bits(x) : simt::bf16_bits(x);
}

// Half an ulp of the storage type, relative.
inline double rounding(DType type) { return type == DType::f32 ? 6e-8 : type == DType::bf16 ? 0x1p-8 : 0x1p-11; }

struct RowOptions {
  double temperature = 1, softcap = 0, scale = 1;
};

// A row in double precision. `slack` bounds what fp32 loses of z before anything else is computed.
struct OracleRow {
  std::vector<double> z, log_p;
  double lse = 0, entropy = 0, log_sum_sq = 0, mean = 0, slack = 0;

  OracleRow(const std::vector<double>& x, const RowOptions& o) {
    double peak = -kInfinity, largest = 0, sum = 0;
    for (double v : x) {
      double u = v * o.scale;
      if (o.softcap) u = o.softcap * std::tanh(u / o.softcap);
      z.push_back(u / o.temperature);
      mean += z.back() / double(x.size());
      if (std::isnan(z.back()) || z.back() == kInfinity) peak = NAN;
      peak = std::isnan(peak) ? peak : std::max(peak, z.back());
      if (std::isfinite(z.back())) largest = std::max(largest, std::fabs(z.back()));
    }
    for (double v : z) sum += std::exp(v - peak);
    lse = peak + std::log(sum);
    double squares = 0;
    for (double v : z) {
      log_p.push_back(v - lse);
      double p = std::exp(log_p.back());
      if (p != 0) entropy -= p * log_p.back();
      squares += p * p;
    }
    log_sum_sq = std::log(squares);
    bool exact = o.scale == 1 && o.softcap == 0 && o.temperature == 1;
    slack = exact ? 0 : largest * 0x1p-22;
  }
  // 1 − p of one column, without cancellation.
  double rest(int64_t at) const {
    double sum = 0;
    for (size_t j = 0; j < log_p.size(); ++j)
      if (int64_t(j) != at) sum += std::exp(log_p[j]);
    return sum;
  }
  // log p = −log1p(Σ_others / p_t)
  double logp(int64_t at) const {
    double others = 0;
    for (size_t j = 0; j < z.size(); ++j)
      if (int64_t(j) != at) others += std::exp(z[j] - z[at]);
    if (!std::isfinite(others) || !std::isfinite(z[at])) return log_p[at];
    return -std::log1p(others);
  }
  bool first_argmax(int64_t at) const {
    for (size_t j = 0; j < z.size(); ++j)
      if (!(z[j] < z[at]) && (z[j] > z[at] || int64_t(j) < at || std::isnan(z[j]))) return false;
    return !std::isnan(z[at]);
  }
};

struct Report {
  std::string where;
  int shown = 0;

  void fail(const std::string& what, double got, double wanted, double bound) {
    ++failures;
    if (++shown <= 5)
      std::printf("FAIL %s: %s: got %.9g, wanted %.9g within %.2g\n", where.c_str(), what.c_str(), got, wanted, bound);
    if (stop_at_first) std::exit(1);
  }
  void near(const std::string& what, double got, double wanted, double bound) {
    ++checks;
    if (std::isnan(wanted) ? std::isnan(got) : got == wanted || std::fabs(got - wanted) <= bound) return;
    fail(what, got, wanted, bound);
  }
  void same(const std::string& what, double got, double wanted) { near(what, got, wanted, 0); }
};

}  // namespace rlfast::tests
