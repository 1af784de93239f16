// sample in double precision by its definition, with a Philox of its own: vocabularies on either side of a vector and of a leaf,
// every way to cut, edits, masks, rows that have no token.
#include <array>
#include <numeric>

#include "../cpu/kernels.h"
#include "oracle.h"

namespace rlfast::tests {

namespace {

using Words = std::array<uint32_t, 4>;

Words philox(Words c, uint32_t k0, uint32_t k1) {
  for (int r = 0; r < 10; ++r, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t(c[0]) * 0xD2511F53u, b = uint64_t(c[2]) * 0xCD9E8D57u;
    c = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1, uint32_t(a)};
  }
  return c;
}

double noise_of(int64_t seed, int64_t position, int64_t token) {
  const uint64_t s = uint64_t(seed), p = uint64_t(position);
  const Words c = philox({uint32_t(p), uint32_t(p >> 32), uint32_t(token / 4), 0}, uint32_t(s), uint32_t(s >> 32));
  return -std::log(-std::log((double(c[token % 4] >> 8) + 0.5) * 0x1p-24));
}

struct SampleShape {
  int64_t rows, vocab;
  DType dtype;
  bool edits, allowed;
  int64_t pad = 0;
};

struct SampleCase {
  SampleShape s;
  Exact<uint8_t> logits;
  Exact<float> temperature, top_p, min_p, edit_values, logp_raw, logp, kept, entropy;
  Exact<int32_t> top_k, edit_ends, edit_ids, allowed;
  Exact<int64_t> seeds, positions, tokens;
  std::mt19937 draw{11};

  int64_t stride() const { return s.vocab + s.pad; }
  int64_t words() const { return (s.vocab + 31) / 32; }
  static int64_t edits_of(const SampleShape& s) { return s.edits ? 5 : 0; }

  explicit SampleCase(const SampleShape& s)
      : s(s),
        logits(((s.rows - 1) * (s.vocab + s.pad) + s.vocab) * width(s.dtype)),
        temperature(s.rows),
        top_p(s.rows),
        min_p(s.rows),
        edit_values(s.rows * edits_of(s)),
        logp_raw(s.rows),
        logp(s.rows),
        kept(s.rows),
        entropy(s.rows),
        top_k(s.rows),
        edit_ends(s.rows + 1),
        edit_ids(s.rows * edits_of(s)),
        allowed(s.rows * words()),
        seeds(s.rows),
        positions(s.rows),
        tokens(s.rows) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < logits.n / width(s.dtype); ++i) write(logits.get(), s.dtype, i, 3 * normal(draw));
    const float warm[] = {1.0f, 0.7f, 0.0f, 1.9f};
    for (int64_t r = 0; r < s.rows; ++r) {
      temperature[r] = warm[r % 4];
      top_k[r] = r % 3 == 1 ? 1 + int32_t(r) : 0;
      top_p[r] = r % 5 == 2 ? 0.8f : 1.0f;
      min_p[r] = r % 7 == 3 ? 0.02f : 0.0f;
      seeds[r] = (int64_t(draw()) << 32) - r, positions[r] = int64_t(draw()) << (r % 30);
      edit_ends[r] = int32_t(r * edits_of(s));
      for (int64_t e = 0; e < edits_of(s); ++e) {
        edit_ids[r * edits_of(s) + e] = int32_t(e < 4 ? draw() % uint64_t(s.vocab) : edit_ids[r * edits_of(s)]);
        edit_values[r * edits_of(s) + e] = e == 2 ? -float(kInfinity) : 3 * normal(draw);
      }
      for (int64_t w = 0; w < words(); ++w) allowed[r * words() + w] = int32_t(draw() | 1u);
    }
    edit_ends[s.rows] = int32_t(s.rows * edits_of(s));
  }

  void run(const Kernels& k, int threads) {
    const Logits x = {logits.get(), s.dtype, 1, s.rows, s.vocab, 0, stride()};
    k.sample(x, {temperature.get(), top_k.get(), top_p.get(), min_p.get(), seeds.get(), positions.get()},
             {s.edits ? edit_ends.get() : nullptr, edit_ids.get(), edit_values.get(), edit_ids.n,
              s.allowed ? allowed.get() : nullptr},
             {tokens.get(), logp_raw.get(), logp.get(), kept.get(), entropy.get()}, threads);
  }

  // w of a row; and whether it has a token.
  std::vector<double> changed(int64_t r, const std::vector<double>& x) const {
    std::vector<double> w = x;
    const SampleCase& c = *this;
    for (int64_t e = 0; e < edits_of(s); ++e)
      w[c.edit_ids.data[r * edits_of(s) + e]] = c.edit_values.data[r * edits_of(s) + e];
    for (int64_t v = 0; v < s.vocab && s.allowed; ++v)
      if (!(uint32_t(c.allowed.data[r * words() + v / 32]) >> (v % 32) & 1) && w[v] == w[v]) w[v] = -kInfinity;
    return w;
  }

  // The least w that is kept, and whether a mass was too near to top_p to say.
  double least(int64_t r, const std::vector<double>& w, const std::vector<double>& q, bool* near) {
    std::vector<size_t> order(w.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return w[a] > w[b]; });
    double cut = -kInfinity;
    if (top_k[r] > 0 && top_k[r] < s.vocab) cut = w[order[top_k[r] - 1]];
    double mass = 0, sum = 0;
    for (size_t v : order) mass += w[v] >= cut ? q[v] : 0;
    if (top_p[r] < 1)
      for (size_t v : order) {
        sum += q[v];
        *near |= std::fabs(sum / mass - double(top_p[r])) < 1e-5;
        if (sum < double(top_p[r]) * mass) continue;
        cut = std::max(cut, w[v]);
        break;
      }
    for (size_t v : order) {
      *near |= min_p[r] > 0 && std::fabs(q[v] / q[order[0]] / double(min_p[r]) - 1) < 1e-5;
      if (q[v] >= double(min_p[r]) * q[order[0]]) continue;
      return std::max(cut, w[v] + 1e-12 * (1 + std::fabs(w[v])));
    }
    return cut;
  }

  void check(Report& report) {
    for (int64_t r = 0; r < s.rows; ++r) {
      std::vector<double> x;
      for (int64_t v = 0; v < s.vocab; ++v) x.push_back(read(logits.get(), s.dtype, r * stride() + v));
      const std::vector<double> w = changed(r, x);
      const double t = temperature[r] == 0 ? 1 : double(temperature[r]);
      const OracleRow raw(x, {}), own(w, {t, 0, 1});
      if (std::isnan(raw.lse) || !std::isfinite(own.lse)) {
        report.same("no token", double(tokens[r]), -1);
        for (float y : {logp_raw[r], logp[r], kept[r], entropy[r]}) report.near("of no token", y, kNaN, 0);
        continue;
      }
      std::vector<double> q;
      for (double log_p : own.log_p) q.push_back(std::exp(log_p));
      bool near = false;
      const double cut = temperature[r] == 0 ? -kInfinity : least(r, w, q, &near);
      if (near) continue;
      double best = -kInfinity, mass = 0;
      const auto value = [&](int64_t v) {
        if (temperature[r] == 0) return w[v];
        return w[v] >= cut ? w[v] / t + noise_of(seeds[r], positions[r], v) : -kInfinity;
      };
      for (int64_t v = 0; v < s.vocab; ++v) best = std::max(best, value(v)), mass += w[v] >= cut ? q[v] : 0;
      const int64_t token = tokens[r];
      report.same("a token", token >= 0 && token < s.vocab, 1);
      if (token < 0 || token >= s.vocab) continue;
      report.near("perturbed", value(token), best, 1e-5 * (1 + std::fabs(best)));
      report.near("logp_raw", logp_raw[r], raw.logp(token), 2e-6 * (1 + std::fabs(raw.logp(token))));
      report.near("entropy", entropy[r], raw.entropy, 2e-6 * (1 + raw.entropy));
      const double logp_own = own.log_p[token];
      report.near("logp", logp[r], temperature[r] == 0 ? 0 : logp_own - std::log(mass),
                  4e-6 * (1 + std::fabs(logp_own)));
      report.near("kept", kept[r], temperature[r] == 0 ? q[token] : mass, 4e-6);
    }
  }
};

void check_known_answers(Report& report) {
  const Words pi = philox({0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}, 0xA4093822, 0x299F31D0);
  const Words wanted = {0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1};
  for (int i = 0; i < 4; ++i) report.same("a word of Random123", pi[i], wanted[i]);
}

}  // namespace

void test_sample(const Kernels& k, const std::string& isa) {
  Report known{isa + ", sample, the noise of its test"};
  check_known_answers(known);
  for (int64_t vocab : {1, 3, 17, 130, 1023, 1024, 1025, 2100})
    for (DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (int change = 0; change < 4; ++change)
        for (int threads : {1, 3}) {
          // few rows of a large vocabulary share their leaves out
          SampleCase c({vocab > 2000 ? 16 + 5 * change : 21, vocab, dtype, change % 2 == 1, change > 1, change});
          Report r{isa + ", sample, V = " + std::to_string(vocab) + ", dtype " + std::to_string(int(dtype))};
          c.run(k, threads);
          c.check(r);
        }
  for (int threads : {1, 2, 5}) {
    SampleCase c({1, 40000, DType::f32, true, true});
    Report r{isa + ", sample, one row of many leaves"};
    c.top_p[0] = 0.9f, c.run(k, threads), c.check(r);
    c.edit_ids[1] = 40000, c.run(k, threads);
    r.same("an id that is none", double(c.tokens[0]), -1);
  }
  SampleCase c({7, 1100, DType::f32, false, false});
  const float wrong[] = {kNaN, float(kInfinity)};
  for (int i = 0; i < 2; ++i) write(c.logits.get(), DType::f32, i * c.stride() + 1090, wrong[i]);
  for (int64_t v = 0; v < 1100; ++v) write(c.logits.get(), DType::f32, 2 * c.stride() + v, -float(kInfinity));
  Report r{isa + ", sample, rows without a token"};
  c.run(k, 1), c.check(r);
}

}  // namespace rlfast::tests
