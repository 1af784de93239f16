// The CUDA kernels of pair_loss and unpaired_loss, run by simt.h on the CPU: with a block for each piece and two for all, and with
// threads and blocks in either order.
#include "../cuda/pair_loss.cu"
#include "../cuda/unpaired_loss.cu"
#include "preference_case.h"

namespace rlfast::tests {

namespace {

struct UnderSimt : PreferenceKernels {
  unsigned finished = 0;

  void pairs(const PreferenceCall& call, const PreferenceSide (&sides)[2], const PreferenceRest& rest, int64_t rows,
             const PreferenceOut& out, bool again) override {
    simt::descending = again, simt::grid_limit = again ? 2u : 0xffffffffu;
    Exact<double> scratch(cuda::pair_loss_scratch(rows, sides[0].tokens));
    cuda::pair_loss(call, sides[0], sides[1], rest, rows, out, scratch.get(), &finished, 0, nullptr);
  }
  void singles(const PreferenceCall& call, const PreferenceSide& side, const LossFlags& desirable,
               const PreferenceRest& rest, int64_t rows, const PreferenceOut& out, bool again) override {
    simt::descending = again, simt::grid_limit = again ? 2u : 0xffffffffu;
    Exact<double> scratch(cuda::unpaired_loss_scratch(rows, side.tokens));
    cuda::unpaired_loss(call, side, desirable, rest, rows, out, scratch.get(), &finished, 0, nullptr);
  }
};

}  // namespace

void test_cuda_preference() {
  UnderSimt kernels;
  check_preference(kernels, "cuda under simt", true);
  Report{"cuda under simt, preference losses"}.same("blocks counted as finished afterwards", kernels.finished, 0);
  simt::descending = false, simt::grid_limit = 0xffffffffu;
}

}  // namespace rlfast::tests
