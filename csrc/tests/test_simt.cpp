// The CUDA kernels, run by simt.h on the CPU: the same source, index for index, against the oracle. Every case runs with its rows
// split over blocks and whole, with a block for each piece of work and two for all, and with the fibers in either order; the bits
// must be the same.
#include "../cuda/token_logps.cu"
#include "token_case.h"

namespace rlfast::tests {

namespace {

struct Bits {
  std::vector<char> forward, backward;
};

template <class T>
void append(std::vector<char>& to, Exact<T>& from) {
  const char* p = reinterpret_cast<const char*>(from.data.get());
  to.insert(to.end(), p, p + from.n * sizeof(T));
}

Bits run(TokenCase& c, int multiprocessors, unsigned grid_limit, bool descending) {
  simt::multiprocessors = multiprocessors, simt::grid_limit = grid_limit, simt::descending = descending;
  Exact<float> scratch(cuda::token_logps_scratch(c.rows, c.s.vocab, c.s.top_k, 0));
  if (c.logits.n) std::memcpy(c.logits.get(), c.original.get(), c.logits.n);
  Bits bits;
  cuda::token_logps_forward(c.records(c.logits.get()), c.transform(), c.targets(), c.forward_out(), scratch.get(), 0,
                            nullptr);
  append(bits.forward, c.logp), append(bits.forward, c.lse), append(bits.forward, c.aux);
  append(bits.forward, c.topk_ids), append(bits.forward, c.topk_logp), append(bits.forward, c.is_top1);
  cuda::token_logps_backward(c.records(c.logits.get()), c.transform(), c.targets(), c.backward_in(),
                             c.gradient_records(), 0, nullptr);
  append(bits.backward, c.s.inplace ? c.logits : c.gradient);
  return bits;
}

}  // namespace

void test_cuda_kernels(bool large) {
  for (const Shape& s : token_shapes(large)) {
    TokenCase c(s);
    Report r{"cuda kernels under simt, " + s.name + ", dtype " + std::to_string(int(s.dtype)) +
             ", V = " + std::to_string(s.vocab) + ", fill " + std::to_string(int(s.fill))};
    Bits split = run(c, 64, 0xffffffffu, false);
    c.check_forward(r);
    c.check_backward(r);
    Bits whole = run(c, 0, 2, true);
    ++checks;
    if (split.forward != whole.forward) r.fail("bits differ between splits, grids or thread orders", 1, 0, 0);
    if (split.backward != whole.backward) r.fail("gradient bits differ between grids or thread orders", 1, 0, 0);
  }
}

}  // namespace rlfast::tests
