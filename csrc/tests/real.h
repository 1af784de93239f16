// The words of csrc/rlfast/formulas.h for a double, so that the oracles of losses evaluate every formula without fp32.
#pragma once
#include <cmath>

namespace rlfast::tests {

struct Real {
  double x;
  Real(double x = 0) : x(x) {}
};

inline Real operator-(Real a) { return -a.x; }
inline Real operator+(Real a, Real b) { return a.x + b.x; }
inline Real operator-(Real a, Real b) { return a.x - b.x; }
inline Real operator*(Real a, Real b) { return a.x * b.x; }
inline Real operator/(Real a, Real b) { return a.x / b.x; }
inline bool operator<(Real a, Real b) { return a.x < b.x; }
inline bool operator>(Real a, Real b) { return a.x > b.x; }
inline bool operator<=(Real a, Real b) { return a.x <= b.x; }
inline bool operator>=(Real a, Real b) { return a.x >= b.x; }
inline bool operator==(Real a, Real b) { return a.x == b.x; }
inline bool operator!=(Real a, Real b) { return a.x != b.x; }
inline Real choose(bool mask, Real yes, Real no) { return mask ? yes : no; }
inline Real minimum(Real a, Real b) { return std::fmin(a.x, b.x); }
inline Real maximum(Real a, Real b) { return std::fmax(a.x, b.x); }
inline Real absolute_value(Real a) { return std::fabs(a.x); }
inline Real log(Real a) { return std::log(a.x); }
inline Real exp(Real a) { return std::exp(a.x); }
inline Real expm1(Real a) { return std::expm1(a.x); }
inline Real sigmoid(Real a) { return 1 / (1 + std::exp(-a.x)); }
inline Real log1p(Real a) { return std::log1p(a.x); }
inline Real softplus(Real a) { return std::fmax(a.x, 0) + std::log1p(std::exp(-std::fabs(a.x))); }

}  // namespace rlfast::tests
