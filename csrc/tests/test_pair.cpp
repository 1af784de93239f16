// divergence at one instruction set, against double precision, on one thread and on three: the bits must be the same.
#include "../cpu/kernels.h"
#include "pair_case.h"

namespace rlfast::tests {

void test_divergence(const Kernels& k, const std::string& isa) {
  for (const PairShape& s : pair_shapes()) {
    Report r = pair_report(isa + " divergence", s);
    std::vector<char> bits[2];
    for (int i = 0; i < 2; ++i) {
      PairCase c(s);
      k.divergence_forward(c.records(c.own), c.records(c.other), c.transform(c.of_own), c.transform(c.of_other),
                           c.targets(), c.measure(), c.out(), 1 + 2 * i);
      k.divergence_backward(c.records(c.own), c.records(c.other), c.transform(c.of_own), c.transform(c.of_other),
                            c.targets(), c.measure(), c.in(), c.gradient_records(), 1 + 2 * i);
      if (i == 0) c.check(r);
      bits[i].assign(c.gradient.get(), c.gradient.get() + c.gradient.n);
      const char* aux = reinterpret_cast<const char*>(c.aux.get());
      bits[i].insert(bits[i].end(), aux, aux + c.aux.n * sizeof(float));
    }
    ++checks;
    if (bits[0] != bits[1]) r.fail("bits differ between thread counts", 1, 0, 0);
  }
}

}  // namespace rlfast::tests
