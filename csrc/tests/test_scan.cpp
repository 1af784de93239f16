// affine_scan and group_advantage at every instruction set, and the CUDA scan under simt.h.
#include "../cpu/kernels.h"
#include "../cuda/affine_scan.cu"
#include "scan_case.h"

namespace rlfast::tests {

std::vector<ScanShape> scan_shapes() {
  std::vector<ScanShape> all;
  for (int64_t steps : {0, 1, 5, 15, 16, 17, 64, 130})
    for (int mask : {0, 1, 2, 3, 4}) {
      ScanShape s;
      s.name = "steps", s.steps = steps, s.mask = mask, s.rows = steps == 17 ? 21 : 3;
      all.push_back(s);
      s.name = "steps, v-trace", s.vtrace = true, s.dtype = DType::bf16, s.pad = 3;
      all.push_back(s);
      s.name = "steps, bare", s.vtrace = false, s.bare = true, s.bootstrap = true, s.forward = steps % 2;
      all.push_back(s);
    }
  for (int mask : {0, 3})
    for (int option = 0; option < 10; ++option) {
      ScanShape s;
      s.name = "option " + std::to_string(option), s.mask = mask, s.rows = 9, s.steps = 70;
      s.dtype = option % 2 ? DType::f16 : DType::f32;
      s.ends = option == 0 || option == 1, s.vtrace = option == 1, s.by_row = option == 2, s.by_token = option == 3;
      s.row_rewards = option == 4 || option == 5, s.kl = option == 5, s.bootstrap = option == 6;
      s.decoupled = option == 7 || option == 5, s.packed = option == 8 || option == 3;
      s.forward = option == 9, s.zero = option >= 6 && option < 9;
      all.push_back(s);
    }
  ScanShape s;
  s.name = "packed", s.packed = true, s.rows = 40, s.steps = 90;
  all.push_back(s);
  s.name = "no rows", s.rows = 0;
  all.push_back(s);
  s.name = "long", s.packed = false, s.rows = 2, s.steps = 2 * kScanSegment + 301, s.mask = 3;
  all.push_back(s);
  s.name = "long, v-trace", s.vtrace = true, s.mask = 0, s.rows = 1;
  all.push_back(s);
  s.name = "long, packed", s.vtrace = false, s.packed = true, s.rows = 2, s.mask = 3;
  all.push_back(s);
  s.packed = false, s.rows = 1;
  s.name = "long, zero", s.vtrace = false, s.mask = 5, s.zero = s.bootstrap = s.row_rewards = true;
  all.push_back(s);
  s.name = "long, zero, ends", s.bootstrap = s.row_rewards = false, s.ends = true;
  all.push_back(s);
  return all;
}

void test_scan(const Kernels& k, const std::string& isa) {
  for (const ScanShape& s : scan_shapes())
    for (int threads : {1, 2}) {
      ScanCase c(s);
      Report r{isa + ", affine_scan, " + s.name + ", dtype " + std::to_string(int(s.dtype)) +
               ", T = " + std::to_string(s.steps) + ", mask " + std::to_string(s.mask)};
      k.affine_scan(c.records(), c.out(), {}, threads);
      c.check(r);
      if (s.bare || !c.dense()) continue;
      k.affine_scan(c.records(), c.out(), {true, true, true, false, true, 1e-8}, threads);
      c.check_whitened(r);
    }
}

void test_groups(const Kernels& k, const std::string& isa) {
  for (int64_t n : {0, 1, 7, 4000})
    for (bool sparse : {false, true}) {
      Exact<float> rewards(n), out(n);
      Exact<int64_t> ids(n);
      Exact<uint8_t> mask(n);
      Exact<double> statistics(4);
      for (int64_t i = 0; i < n; ++i)
        rewards[i] = float(i * 37 % 11), ids[i] = (i * 31 % 5 - 2) * (sparse ? 1'000'000'007 : 1), mask[i] = i % 6 != 0;
      Report r{isa + ", group_advantage, n = " + std::to_string(n) + (sparse ? ", sparse ids" : "")};
      k.group_advantage({n, rewards.get(), DType::f32, ids.get(), 1, mask.get(), nullptr},
                        {Baseline::mean, Scale::none, true, false, false, 0, 1}, {out.get(), statistics.get()}, 2);
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0, count = 0;
        for (int64_t j = 0; j < n; ++j)
          if (mask[j] && ids[j] == ids[i]) sum += rewards[j], count += 1;
        r.near("advantage[" + std::to_string(i) + "]", out[i], mask[i] && count > 1 ? rewards[i] - sum / count : 0.0,
               1e-6);
      }
    }
}

void test_cuda_scan() {
  for (const ScanShape& shape : scan_shapes()) {
    ScanShape s = shape;
    // a block of fibers is slow: of the sizes, those on either side of a warp's and of a thread's tokens
    if (s.name.rfind("steps", 0) == 0 && s.steps != 1 && s.steps != 17 && s.steps != 130) continue;
    if (s.steps > kScanSegment) s.steps = (s.packed ? 2 : 1) * 16384 + 301;  // beyond one segment of the GPU's
    std::vector<float> first[2];
    for (int multiprocessors : {0, 64}) {  // whole rows, then segments
      simt::multiprocessors = multiprocessors, simt::descending = multiprocessors > 0, simt::grid_limit = 0xffffffffu;
      ScanCase c(s);
      const int64_t longest = s.packed ? c.tokens : s.steps;
      Exact<double> scratch(cuda::affine_scan_scratch(s.rows, longest, s.packed, true, 0));
      Report r{"cuda scan under simt, " + s.name + ", T = " + std::to_string(s.steps) + ", mask " +
               std::to_string(s.mask)};
      cuda::affine_scan(c.records(), c.out(), {}, longest, scratch.get(), 0, nullptr);
      c.check(r);
      std::vector<float> got[2] = {{c.returns.get(), c.returns.get() + c.dense()}, {}};
      if (!s.bare) {
        cuda::affine_scan(c.records(), c.out(), {true, true, true, false, true, 1e-8}, longest, scratch.get(), 0,
                          nullptr);
        c.check_whitened(r);
        got[1].assign(c.advantages.get(), c.advantages.get() + c.dense());
      }
      ++checks;
      for (int i = 0; i < 2; ++i) {
        const size_t bytes = got[i].size() * sizeof(float);
        if (multiprocessors && bytes && std::memcmp(got[i].data(), first[i].data(), bytes) != 0)
          r.fail("bits differ between whole rows and segments", 1, 0, 0);
        first[i] = got[i];
      }
    }
  }
}

}  // namespace rlfast::tests
