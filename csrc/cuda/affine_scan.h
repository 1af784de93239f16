// affine_scan on a CUDA device: the entry points that the bindings call. Nothing here allocates or synchronises.
#pragma once
#include "../rlfast/affine_scan.h"

namespace rlfast::cuda {

// Doubles of scratch that affine_scan needs: the maps of the segments, where few long rows are split, and their moments, where the
// advantages are whitened; else 0. `longest`: tokens of a row, or of all packed rows.
int64_t affine_scan_scratch(int64_t rows, int64_t longest, bool packed, bool whiten, int device);

// Throws std::runtime_error with CUDA's message when a call or a launch fails. `stream` is a cudaStream_t of `device`.
void affine_scan(const ScanIn& in, const ScanOut& out, const Whiten& whiten, int64_t longest, double* scratch,
                 int device, void* stream);

}  // namespace rlfast::cuda
