// unpaired_loss on a CUDA device: the entry points that the bindings call. Nothing here allocates or synchronises.
#pragma once
#include "../rlfast/preference.h"

namespace rlfast::cuda {

// Doubles of scratch that a call needs, for what the pieces of the batch add up to; `tokens`: the sums are not given.
int64_t unpaired_loss_scratch(int64_t rows, bool tokens);

// `scratch` and `finished` as in token_loss.h.
void unpaired_loss(const PreferenceCall& call, const PreferenceSide& side, const LossFlags& desirable,
                   const PreferenceRest& rest, int64_t rows, const PreferenceOut& out, double* scratch,
                   unsigned* finished, int device, void* stream);

}  // namespace rlfast::cuda
