// pair_loss and unpaired_loss on the CPU, with one thread and with two.
#include "../cpu/kernels.h"
#include "preference_case.h"

namespace rlfast::tests {

namespace {

struct OnCpu : PreferenceKernels {
  const Kernels& k;
  explicit OnCpu(const Kernels& k) : k(k) {}

  void pairs(const PreferenceCall& call, const PreferenceSide (&sides)[2], const PreferenceRest& rest, int64_t rows,
             const PreferenceOut& out, bool again) override {
    k.pair_loss(call, sides[0], sides[1], rest, rows, out, again ? 2 : 1);
  }
  void singles(const PreferenceCall& call, const PreferenceSide& side, const LossFlags& desirable,
               const PreferenceRest& rest, int64_t rows, const PreferenceOut& out, bool again) override {
    k.unpaired_loss(call, side, desirable, rest, rows, out, again ? 2 : 1);
  }
};

}  // namespace

void test_preference(const Kernels& k, const std::string& isa) {
  OnCpu kernels(k);
  check_preference(kernels, isa, false);
}

}  // namespace rlfast::tests
