// The CUDA kernel of token_loss, run by simt.h on the CPU, against the definition: with a block for each piece and two for all,
// and with threads and blocks in either order; the bits must be the same.
#include "../cuda/token_loss.cu"
#include "loss_case.h"

namespace rlfast::tests {

namespace {

template <class T>
void append(std::vector<char>& to, Exact<T>& from) {
  const char* p = reinterpret_cast<const char*>(from.data.get());
  to.insert(to.end(), p, p + from.n * sizeof(T));
}

std::vector<char> run(LossCase& c, unsigned* finished, unsigned grid_limit, bool descending) {
  simt::grid_limit = grid_limit, simt::descending = descending;
  Exact<double> scratch(cuda::token_loss_scratch(c.objective(), c.fields()));
  cuda::token_loss(c.objective(), c.fields(), c.out(), scratch.get(), finished, 0, nullptr);
  std::vector<char> bits;
  append(bits, c.loss), append(bits, c.metrics), append(bits, c.dlogp), append(bits, c.dentropy);
  return bits;
}

}  // namespace

void test_cuda_loss(bool large) {
  unsigned finished = 0;
  for (const LossShape& s : loss_shapes(large)) {
    LossCase c(s);
    Report r{"cuda token_loss under simt, " + s.name + ", dtype " + std::to_string(int(s.dtype)) + ", " +
             std::to_string(c.sequences) + " of " + std::to_string(c.length) + ", given " + std::to_string(s.given) +
             ", surrogate " + std::to_string(s.surrogate)};
    std::vector<char> all = run(c, &finished, 0xffffffffu, false);
    c.check(r);
    std::vector<char> two = run(c, &finished, 2, true);
    ++checks;
    if (all != two) r.fail("bits differ between grids or thread orders", 1, 0, 0);
    r.same("blocks counted as finished afterwards", finished, 0);
  }
}

}  // namespace rlfast::tests
