// The words of csrc/rlfast/formulas.h for V = float. minimum and maximum return the operand that is not NaN.
#pragma once
#include "device.cuh"

namespace rlfast::formulas {

RLFAST_DEVICE float choose(bool mask, float yes, float no) { return mask ? yes : no; }
RLFAST_DEVICE float minimum(float a, float b) { return fminf(a, b); }
RLFAST_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
RLFAST_DEVICE float absolute_value(float x) { return fabsf(x); }
RLFAST_DEVICE float log(float x) { return logf(x); }
RLFAST_DEVICE float exp(float x) { return expf(x); }
RLFAST_DEVICE float expm1(float x) { return expm1f(x); }
RLFAST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
RLFAST_DEVICE float log1p(float x) { return log1pf(x); }
RLFAST_DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

}  // namespace rlfast::formulas

#include "../rlfast/formulas.gen.h"

namespace rlfast::cuda {

// The hyper-parameters of a formula, from its numbers.
template <class Hyper, int n>
RLFAST_DEVICE Hyper hyper_of(const float (&numbers)[n]) {
  static_assert(sizeof(Hyper) <= sizeof(numbers), "more hyper-parameters than there are numbers");
  Hyper h;
  memcpy(&h, numbers, sizeof h);
  return h;
}

}  // namespace rlfast::cuda
