// token_loss on a CUDA device: the entry points that the bindings call. Nothing here allocates or synchronises.
#pragma once
#include <vector>

#include "../rlfast/token_loss.h"

namespace rlfast::cuda {

// Names of the surrogates that are compiled in.
std::vector<const char*> token_loss_surrogates();

// Doubles of scratch that a call needs, for what each piece of the batch adds up to.
int64_t token_loss_scratch(const LossObjective& objective, const LossFields& fields);

// `finished` is a counter that holds 0 between launches, of this stream alone. Throws std::runtime_error with CUDA's message when
// the launch fails. `stream` is a cudaStream_t of `device`.
void token_loss(const LossObjective& objective, const LossFields& fields, const LossOut& out, double* scratch,
                unsigned* finished, int device, void* stream);

}  // namespace rlfast::cuda
