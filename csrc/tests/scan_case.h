// affine_scan in double precision by its definition, and the shapes that break scans.
#pragma once
#include "../rlfast/affine_scan.h"
#include "../rlfast/group_advantage.h"
#include "oracle.h"

namespace rlfast::tests {

struct ScanShape {
  std::string name;
  int64_t rows = 3, steps = 37, pad = 0;
  DType dtype = DType::f32;
  int mask = 0;  // 0 none, 1 right, 2 left, 3 holes, 4 nothing is valid, 5 only the first 40
  bool packed = false, vtrace = false, bare = false, forward = false, zero = false, decoupled = false;
  bool ends = false, by_row = false, by_token = false, row_rewards = false, bootstrap = false, kl = false;
};

// Buffers of exact size; what is masked is NaN in the inputs.
struct ScanCase {
  ScanShape s;
  std::vector<int64_t> cu;
  int64_t tokens, stride;
  Exact<uint32_t> buffers[6];  // rewards, values, log_ratio, kl, coefficients, next_values
  Exact<uint8_t> mask, done, truncated;
  Exact<double> row_rewards, bootstrap, gamma, lam;
  Exact<float> advantages, returns;
  std::vector<double> want_a, want_g;

  static int64_t total(const ScanShape& s) {
    if (!s.packed) return s.rows * (s.steps + s.pad) - (s.rows ? s.pad : 0);
    int64_t n = 0;
    for (int64_t r = 0; r < s.rows; ++r) n += length_of(s, r);
    return n;
  }
  static int64_t length_of(const ScanShape& s, int64_t r) {
    if (!s.packed) return s.steps;
    return s.steps > 10000 ? s.steps - r * 7919 : (r * 7919 + 3) % (s.steps + 1);
  }

  explicit ScanCase(const ScanShape& shape)
      : s(shape),
        tokens(total(s)),
        stride(s.packed ? 0 : s.steps + s.pad),
        buffers{Exact<uint32_t>(words()), Exact<uint32_t>(words()), Exact<uint32_t>(words()),
                Exact<uint32_t>(words()), Exact<uint32_t>(words()), Exact<uint32_t>(words())},
        mask(tokens),
        done(tokens),
        truncated(tokens),
        row_rewards(s.rows),
        bootstrap(s.rows),
        gamma(s.by_token ? dense() : s.rows),
        lam(s.rows),
        advantages(dense()),
        returns(dense()) {
    cu.push_back(0);
    for (int64_t r = 0; r < s.rows; ++r) cu.push_back(cu.back() + length_of(s, r));
    fill();
    solve();
  }

  int64_t words() const { return (total(s) * width(s.dtype) + 3) / 4; }
  int64_t dense() const { return s.packed ? total(s) : s.rows * s.steps; }
  int64_t at(int64_t r, int64_t t) const { return s.packed ? cu[r] + t : r * stride + t; }
  int64_t out_at(int64_t r, int64_t t) const { return s.packed ? cu[r] + t : r * s.steps + t; }
  double in(int which, int64_t i) { return read(buffers[which].get(), s.dtype, i); }
  bool valid(int64_t i) { return s.mask == 0 || mask[i]; }

  void fill() {
    std::mt19937 rng(7);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<double> uniform;
    for (int64_t r = 0; r < s.rows; ++r) {
      row_rewards[r] = normal(rng), bootstrap[r] = normal(rng), lam[r] = uniform(rng);
      if (!s.by_token) gamma[r] = uniform(rng);
      const int64_t n = length_of(s, r), some = n ? int64_t(rng() % uint32_t(n + 1)) : 0;
      for (int64_t t = 0; t < n; ++t) {
        const int64_t i = at(r, t);
        const bool holes[] = {true, t < some, t >= n - some, rng() % 10 > 2, false, t < 40};
        mask[i] = holes[s.mask];
        done[i] = rng() % 16 == 0, truncated[i] = rng() % 16 == 0;
        if (s.by_token) gamma[out_at(r, t)] = uniform(rng);
        for (int w = 0; w < 6; ++w) {
          const float x = w == 4 ? float(uniform(rng)) : normal(rng) * (w == 2 ? 0.3f : 1.0f);
          write(buffers[w].get(), s.dtype, i, holes[s.mask] ? x : kNaN);
        }
      }
    }
  }

  TokenInput input(int which, bool given) { return {given ? buffers[which].get() : nullptr, s.dtype, stride}; }

  ScanIn records() {
    ScanIn x{};
    x.rows = s.rows, x.steps = s.packed ? 0 : s.steps, x.cu = s.packed ? cu.data() : nullptr;
    x.rewards = input(0, !s.row_rewards), x.values = input(1, !s.bare), x.log_ratio = input(2, s.vtrace);
    x.kl = input(3, s.kl), x.coefficients = input(4, s.bare), x.next_values = input(5, s.ends);
    x.mask = {s.mask ? mask.get() : nullptr, stride};
    x.done = {s.ends ? done.get() : nullptr, stride}, x.truncated = {s.ends ? truncated.get() : nullptr, stride};
    x.row_rewards = s.row_rewards ? row_rewards.get() : nullptr, x.bootstrap = s.bootstrap ? bootstrap.get() : nullptr;
    x.gamma = {0.97, s.by_token || s.by_row ? gamma.get() : nullptr, s.by_token};
    x.lam = {0.9, s.by_row ? lam.get() : nullptr, false}, x.critic_lam = {1.0, nullptr, false};
    x.kl_coef = 0.3, x.clip_rho = 1.0f, x.clip_c = 0.9f, x.clip_pg = 1.1f;
    x.vtrace = s.vtrace, x.zero = s.zero, x.reverse = !s.forward, x.decoupled = s.decoupled;
    return x;
  }
  ScanOut out() { return {s.bare ? nullptr : advantages.get(), returns.get()}; }

  // One row by δ_t and A_t = δ_t + γλ·A_{t+1}.
  void solve_row(int64_t r) {
    const int64_t n = length_of(s, r);
    double state[2] = {0, 0}, ahead = s.bootstrap ? bootstrap[r] : 0.0, hold = ahead;
    bool seen = false;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t t = s.forward ? k : n - 1 - k, i = at(r, t), o = out_at(r, t);
      if (s.bare) {
        if (valid(i)) hold = in(0, i) + in(4, i) * hold;
        want_g[o] = hold;
        continue;
      }
      const bool v = valid(i);
      if (v && s.ends) {
        if (!seen || truncated[i]) ahead = in(5, i), state[0] = state[1] = 0;
        if (done[i]) ahead = 0, state[0] = state[1] = 0;
      }
      if (!v && !s.zero) continue;
      double reward = s.row_rewards ? (seen || !v ? 0.0 : row_rewards[r]) : v ? in(0, i) : 0.0;
      if (v && s.kl) reward -= 0.3 * in(3, i);
      const double value = v ? in(1, i) : 0.0, g = s.by_token ? gamma[o] : s.by_row ? gamma[r] : 0.97;
      const double l = s.by_row ? lam[r] : 0.9, delta = reward + g * ahead - value;
      const double ratio = s.vtrace && v ? std::exp(in(2, i)) : 1.0;
      const double advantage = delta + g * l * state[0];
      if (s.vtrace) {
        state[0] = std::min(1.0, ratio) * delta + g * l * std::min(double(0.9f), ratio) * state[0];
        state[1] = state[0];
      } else {
        state[0] = advantage, state[1] = delta + g * (s.decoupled ? 1.0 : l) * state[1];
      }
      seen = seen || v, ahead = value;
      want_a[o] = v ? (s.vtrace ? std::min(double(1.1f), ratio) : 1.0) * advantage : 0.0;
      want_g[o] = v ? value + state[1] : 0.0;
    }
  }
  void solve() {
    want_a.assign(size_t(dense()), 0.0), want_g.assign(size_t(dense()), 0.0);
    for (int64_t r = 0; r < s.rows; ++r) solve_row(r);
  }
  // The advantages, whitened with Bessel's correction and an eps of 1e-8 inside.
  void check_whitened(Report& report) {
    double n = 0, sum = 0, squares = 0;
    std::vector<char> counted(static_cast<size_t>(dense()), 0);
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t t = 0; t < length_of(s, r); ++t) counted[out_at(r, t)] = valid(at(r, t));
    for (int64_t i = 0; i < dense(); ++i)
      if (counted[i]) n += 1, sum += want_a[i];
    const double mean = sum / std::max(n, 1.0);
    for (int64_t i = 0; i < dense(); ++i)
      if (counted[i]) squares += (want_a[i] - mean) * (want_a[i] - mean);
    const double deviation = std::sqrt(squares / std::max(n - 1.0, 1.0) + 1e-8);
    for (int64_t i = 0; i < dense(); ++i)
      report.near("whitened[" + std::to_string(i) + "]", advantages[i],
                  counted[i] ? (want_a[i] - mean) / deviation : 0.0, 1e-5);
  }
  void check(Report& report) {
    double largest = 1.0;
    for (double x : want_g) largest = std::max(largest, std::fabs(x));
    for (int64_t i = 0; i < dense(); ++i) {
      report.near("returns[" + std::to_string(i) + "]", returns[i], want_g[i], 4e-7 * largest);
      if (!s.bare) report.near("advantages[" + std::to_string(i) + "]", advantages[i], want_a[i], 4e-7 * largest);
    }
  }
};

std::vector<ScanShape> scan_shapes();

}  // namespace rlfast::tests
