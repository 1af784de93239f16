// token_logps on a CUDA device: the entry points that the bindings call. Nothing here allocates or synchronises.
#pragma once
#include "../rlfast/token_logps.h"

namespace rlfast::cuda {

// All throw std::runtime_error with CUDA's message when a call or a launch fails. `stream` is a cudaStream_t of `device`.

// Floats of scratch that token_logps_forward needs: leaf statistics, where a row is split over several blocks or its largest
// logits are asked for; else 0.
int64_t token_logps_scratch(int64_t rows, int64_t vocab, int64_t top_k, int device);

void token_logps_forward(const Logits& logits, const Transform& transform, const Targets& targets,
                         const ForwardOut& out, float* scratch, int device, void* stream);

// `gradient` may be the logits themselves.
void token_logps_backward(const Logits& logits, const Transform& transform, const Targets& targets,
                          const BackwardIn& in, const Logits& gradient, int device, void* stream);

}  // namespace rlfast::cuda
