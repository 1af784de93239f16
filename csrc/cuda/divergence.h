// divergence on a CUDA device: the entry points that the bindings call. Nothing here allocates or synchronises.
#pragma once
#include "../rlfast/divergence.h"

namespace rlfast::cuda {

// All throw std::runtime_error with CUDA's message when a call or a launch fails. `stream` is a cudaStream_t of `device`.

// Floats of scratch that divergence_forward needs: leaf statistics, where those of a row do not fit in shared memory; else 0.
int64_t divergence_scratch(int64_t rows, int64_t vocab, int device);

void divergence_forward(const Logits& own, const Logits& other, const Transform& of_own, const Transform& of_other,
                        const Targets& targets, const Measure& measure, const PairOut& out, float* scratch, int device,
                        void* stream);

// `gradient`: of the own side's logits.
void divergence_backward(const Logits& own, const Logits& other, const Transform& of_own, const Transform& of_other,
                         const Targets& targets, const Measure& measure, const PairIn& in, const Logits& gradient,
                         int device, void* stream);

}  // namespace rlfast::cuda
