// The CUDA kernels of divergence, run by simt.h on the CPU: the same source against double precision, with the fibers and the blocks
// in either order and with few blocks: the bits must be the same.
#include "../cuda/divergence.cu"
#include "pair_case.h"

namespace rlfast::tests {

void test_cuda_divergence() {
  for (const PairShape& s : pair_shapes()) {
    Report r = pair_report("cuda divergence under simt", s);
    std::vector<char> bits[2];
    for (int i = 0; i < 2; ++i) {
      simt::descending = i == 1, simt::grid_limit = i ? 2u : 0xffffffffu;
      PairCase c(s);
      Exact<float> scratch(cuda::divergence_scratch(c.rows, s.vocab, 0));
      cuda::divergence_forward(c.records(c.own), c.records(c.other), c.transform(c.of_own), c.transform(c.of_other),
                               c.targets(), c.measure(), c.out(), scratch.get(), 0, nullptr);
      cuda::divergence_backward(c.records(c.own), c.records(c.other), c.transform(c.of_own), c.transform(c.of_other),
                                c.targets(), c.measure(), c.in(), c.gradient_records(), 0, nullptr);
      if (i == 0) c.check(r);
      bits[i].assign(c.gradient.get(), c.gradient.get() + c.gradient.n);
      const char* aux = reinterpret_cast<const char*>(c.aux.get());
      bits[i].insert(bits[i].end(), aux, aux + c.aux.n * sizeof(float));
    }
    ++checks;
    if (bits[0] != bits[1]) r.fail("bits differ between grids or thread orders", 1, 0, 0);
  }
  simt::descending = false, simt::grid_limit = 0xffffffffu;
}

}  // namespace rlfast::tests
