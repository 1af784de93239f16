// token_loss on the CPU against the definition, and the same bits with two threads as with one.
#include "../cpu/kernels.h"
#include "loss_case.h"

namespace rlfast::tests {

namespace {

template <class T>
bool same_bits(Exact<T>& a, Exact<T>& b) {
  return !a.n || !std::memcmp(a.get(), b.get(), a.n * sizeof(T));
}

}  // namespace

void test_loss(const Kernels& k, const std::string& isa, bool large) {
  for (const LossShape& s : loss_shapes(large)) {
    LossCase one(s), two(s);
    Report r{isa + ", token_loss, " + s.name + ", dtype " + std::to_string(int(s.dtype)) + ", " +
             std::to_string(one.sequences) + " of " + std::to_string(one.length) + ", given " +
             std::to_string(s.given) + ", surrogate " + std::to_string(s.surrogate)};
    k.token_loss(one.objective(), one.fields(), one.out(), 1);
    one.check(r);
    if (one.rows * one.length < 10000) continue;
    k.token_loss(two.objective(), two.fields(), two.out(), 2);
    ++checks;
    if (!same_bits(one.loss, two.loss) || !same_bits(one.metrics, two.metrics) || !same_bits(one.dlogp, two.dlogp) ||
        !same_bits(one.dentropy, two.dentropy))
      r.fail("bits differ between one thread and two", 1, 0, 0);
  }
}

}  // namespace rlfast::tests
