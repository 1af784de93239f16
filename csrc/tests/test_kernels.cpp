// Stand-alone test of the C++ kernels, for sanitizers and for machines without Python: every instruction set in turn, then the
// CUDA kernels under simt.h. Arguments: `large` adds a real vocabulary, `no-simt` leaves the CUDA kernels out, `simt` all else, `first`
// stops at the first failure.
#include <chrono>

#include "../cpu/kernels.h"
#include "token_case.h"

namespace rlfast::tests {

void test_linear(const Kernels& k, const std::string& isa);
void test_linear_layer(const Kernels& k, const std::string& isa);
void test_loss(const Kernels& k, const std::string& isa, bool large);
void test_cuda_kernels(bool large);
void test_cuda_loss(bool large);
void test_scan(const Kernels& k, const std::string& isa);
void test_groups(const Kernels& k, const std::string& isa);
void test_divergence(const Kernels& k, const std::string& isa);
void test_preference(const Kernels& k, const std::string& isa);
void test_ranked(const Kernels& k, const std::string& isa);
void test_attention(const Kernels& k, const std::string& isa);
void test_sample(const Kernels& k, const std::string& isa);
void test_cuda_divergence();
void test_cuda_scan();
void test_cuda_preference();

namespace {

void test_token_logps(const Kernels& k, const std::string& isa, bool large) {
  for (const Shape& s : token_shapes(large))
    for (int threads : {1, 2}) {
      if (threads == 2 && s.vocab * s.inner < 10000) continue;
      TokenCase c(s);
      Report r{isa + ", token_logps, " + s.name + ", dtype " + std::to_string(int(s.dtype)) +
               ", V = " + std::to_string(s.vocab) + ", fill " + std::to_string(int(s.fill))};
      k.token_logps_forward(c.records(c.logits.get()), c.transform(), c.targets(), c.forward_out(), threads);
      c.check_forward(r);
      k.token_logps_backward(c.records(c.logits.get()), c.transform(), c.targets(), c.backward_in(),
                             c.gradient_records(), threads);
      c.check_backward(r);
    }
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <class Test>
void timed(const std::string& name, Test test) {
  auto start = std::chrono::steady_clock::now();
  int64_t checks_before = checks, failures_before = failures;
  test();
  std::printf("%-44s %9lld checks %6lld failures %6.1f s\n", name.c_str(),
              static_cast<long long>(checks - checks_before), static_cast<long long>(failures - failures_before),
              seconds_since(start));
  std::fflush(stdout);
}

int run(int argc, char** argv) {
  bool large = false, simt = true, isas = true;
  for (int i = 1; i < argc; ++i) {
    large |= !std::strcmp(argv[i], "large");
    stop_at_first |= !std::strcmp(argv[i], "first");
    simt &= std::strcmp(argv[i], "no-simt") != 0;
    isas &= std::strcmp(argv[i], "simt") != 0;
  }
  for (int i = 0; isas && i < isa_count(); ++i) {
    Isa isa = static_cast<Isa>(i);
    if (!isa_usable(isa)) {
      std::printf("%-44s not on this processor\n", isa_name(isa));
      continue;
    }
    std::string name = isa_name(isa);
    timed(name + ": token_logps", [&] { test_token_logps(kernels(isa), name, large); });
    timed(name + ": linear_token_logps", [&] { test_linear(kernels(isa), name); });
    timed(name + ": linear", [&] { test_linear_layer(kernels(isa), name); });
    timed(name + ": token_loss", [&] { test_loss(kernels(isa), name, large); });
    timed(name + ": affine_scan", [&] { test_scan(kernels(isa), name); });
    timed(name + ": pair_loss, unpaired_loss", [&] { test_preference(kernels(isa), name); });
    timed(name + ": divergence", [&] { test_divergence(kernels(isa), name); });
    timed(name + ": group_advantage", [&] { test_groups(kernels(isa), name); });
    timed(name + ": ranked_loss", [&] { test_ranked(kernels(isa), name); });
    timed(name + ": paged_attention", [&] { test_attention(kernels(isa), name); });
    timed(name + ": sample", [&] { test_sample(kernels(isa), name); });
  }
  if (simt) timed("cuda kernels under simt: token_logps", [&] { test_cuda_kernels(large); });
  if (simt) timed("cuda kernel under simt: token_loss", [&] { test_cuda_loss(large); });
  if (simt) timed("cuda kernels under simt: divergence", [&] { test_cuda_divergence(); });
  if (simt) timed("cuda kernels under simt: affine_scan", [&] { test_cuda_scan(); });
  if (simt) timed("cuda kernels under simt: preference losses", [&] { test_cuda_preference(); });
  std::printf("%lld checks, %lld failures\n", static_cast<long long>(checks), static_cast<long long>(failures));
  return failures != 0;
}

}  // namespace

}  // namespace rlfast::tests

int main(int argc, char** argv) { return rlfast::tests::run(argc, argv); }
