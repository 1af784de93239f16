// Calls of pair_loss and unpaired_loss held to their definition in double precision, whatever kernel runs them.
#pragma once
#include "../rlfast/preference.h"
#include "oracle.h"

namespace rlfast::tests {

// The kernels under test. `again` asks for another order of the work: the bits must be the same.
struct PreferenceKernels {
  virtual ~PreferenceKernels() = default;
  virtual void pairs(const PreferenceCall& call, const PreferenceSide (&sides)[2], const PreferenceRest& rest,
                     int64_t rows, const PreferenceOut& out, bool again) = 0;
  virtual void singles(const PreferenceCall& call, const PreferenceSide& side, const LossFlags& desirable,
                       const PreferenceRest& rest, int64_t rows, const PreferenceOut& out, bool again) = 0;
};

// `lean`: batches whose tokens simt.h can walk through, but one of each beyond a grid.
void check_preference(PreferenceKernels& kernels, const std::string& who, bool lean);

}  // namespace rlfast::tests
