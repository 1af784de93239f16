// A call of divergence: two rows of logits in buffers of exact size, and the check of every value against double precision.
#pragma once
#include "../rlfast/divergence.h"
#include "oracle.h"

namespace rlfast::tests {

struct PairShape {
  DType dtype = DType::f32;
  int64_t outer = 1, inner = 4, vocab = 17, candidates = 0, pad = 0;
  Kind kind = Kind::forward;
  double beta = 0.5;
  bool plain = true, masked = false, holes = false;
};

struct PairCase {
  PairShape s;
  int64_t rows, stride;
  Exact<char> own, other, gradient;
  Exact<float> value, logp, lse, entropy, ref_lse, aux, g_value, g_logp, g_lse, g_entropy;
  Exact<int64_t> ids;
  Exact<uint8_t> mask;
  RowOptions of_own, of_other;

  static int64_t bytes(const PairShape& s) {
    return ((s.outer * s.inner - 1) * (s.vocab + s.pad) + s.vocab) * width(s.dtype);
  }

  explicit PairCase(const PairShape& shape)
      : s(shape),
        rows(s.outer * s.inner),
        stride(s.vocab + s.pad),
        own(bytes(s)),
        other(bytes(s)),
        gradient(rows * s.vocab * width(s.dtype)),
        value(rows),
        logp(rows * s.candidates),
        lse(rows),
        entropy(rows),
        ref_lse(rows),
        aux((2 + s.candidates + 1 + 6) * rows),
        g_value(rows),
        g_logp(rows * s.candidates),
        g_lse(rows),
        g_entropy(rows),
        ids(rows * s.candidates),
        mask(s.masked ? rows : 0) {
    std::mt19937 random(unsigned(s.vocab * 31 + int(s.kind)));
    std::normal_distribution<double> normal(0, 2);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < s.vocab; ++j) {
        double x = normal(random), y = x + normal(random);
        if (s.holes && j % 3 == 1) x = y = -kInfinity;
        write(own.get(), s.dtype, row * stride + j, float(x)), write(other.get(), s.dtype, row * stride + j, float(y));
      }
      if (s.masked) mask[row] = row % 3 != 1;
      for (int64_t k = 0; k < s.candidates; ++k) {
        ids[row * s.candidates + k] = k == 1 ? kIgnoreIndex : int64_t(random() % uint64_t(s.vocab)) / 3 * 3;
        g_logp[row * s.candidates + k] = float(normal(random));
      }
      g_value[row] = float(normal(random)), g_lse[row] = float(normal(random)), g_entropy[row] = float(normal(random));
    }
    if (!s.plain) of_own = {double(0.7f), 5, double(1.3f)}, of_other = {double(1.1f), 0, double(0.8f)};
  }

  Logits records(Exact<char>& x) { return {x.get(), s.dtype, s.outer, s.inner, s.vocab, s.inner * stride, stride}; }
  Logits gradient_records() { return {gradient.get(), s.dtype, s.outer, s.inner, s.vocab, s.inner * s.vocab, s.vocab}; }
  static Transform transform(const RowOptions& o) {
    return {nullptr, float(o.temperature), float(o.softcap), float(o.scale)};
  }
  Targets targets() { return {ids.get(), mask.get(), s.candidates}; }
  Measure measure() { return {s.kind, s.beta}; }
  float* at(int64_t row) { return aux.get() + row * rows; }

  PairOut out() {
    ForwardOut o{};
    o.logp = logp.get(), o.lse = lse.get(), o.entropy = entropy.get();
    o.peak = at(0), o.log_sum = at(1), o.saved_logp = at(2), o.saved_entropy = at(2 + s.candidates);
    int64_t t = 3 + s.candidates;
    return {o, value.get(), ref_lse.get(), at(t), at(t + 1), at(t + 2), at(t + 4)};
  }
  PairIn in() {
    PairOut o = out();
    return {{o.student.peak, o.student.log_sum, o.student.saved_logp, o.student.saved_entropy,
             s.candidates ? g_logp.get() : nullptr, g_lse.get(), g_entropy.get()},
            o.ref_peak,
            o.ref_log_sum,
            o.centre,
            g_value.get()};
  }

  std::vector<double> row_of(Exact<char>& x, int64_t row) {
    std::vector<double> v(s.vocab);
    for (int64_t j = 0; j < s.vocab; ++j) v[j] = read(x.get(), s.dtype, row * stride + j);
    return v;
  }

  void check(Report& r) {
    for (int64_t row = 0; row < rows; ++row) {
      if (s.masked && !mask[row]) {
        r.same("value of a skipped row", value[row], 0), r.same("its ref_lse", ref_lse[row], 0);
        for (int64_t j = 0; j < s.vocab; ++j)
          r.same("its gradient", read(gradient.get(), s.dtype, row * s.vocab + j), 0);
        continue;
      }
      OracleRow p(row_of(own, row), of_own), q(row_of(other, row), of_other);
      check_row(r, row, p, q);
    }
  }

  void check_row(Report& r, int64_t row, const OracleRow& p, const OracleRow& q) {
    double kl_s = 0, kl_t = 0, b = s.beta;
    std::vector<double> m_over_s(s.vocab);
    for (int64_t j = 0; j < s.vocab; ++j) {
      double a = p.log_p[j], c = q.log_p[j], m = c;
      if (a == -kInfinity && c == -kInfinity) continue;
      if (s.kind == Kind::jsd) m = std::log((1 - b) * std::exp(a) + b * std::exp(c));
      m_over_s[j] = m - a;
      if (a > -kInfinity) kl_s += std::exp(a) * (a - m);
      if (c > -kInfinity) kl_t += std::exp(c) * (c - (s.kind == Kind::jsd ? m : a));
    }
    double wanted = s.kind == Kind::forward ? kl_t : s.kind == Kind::reverse ? kl_s : b * kl_t + (1 - b) * kl_s;
    r.near("value", value[row], wanted, 1e-5 * (1 + wanted));
    r.near("lse", lse[row], p.lse, 1e-5 * (1 + std::fabs(p.lse)));
    r.near("ref_lse", ref_lse[row], q.lse, 1e-5 * (1 + std::fabs(q.lse)));
    r.near("entropy", entropy[row], p.entropy, 1e-5 * (1 + p.entropy));
    for (int64_t k = 0; k < s.candidates; ++k) {
      int64_t id = ids[row * s.candidates + k];
      double expected = id == kIgnoreIndex ? 0 : p.logp(id);
      r.near("logp", logp[row * s.candidates + k], expected, 1e-5 * (1 + std::fabs(expected)));
    }
    std::vector<double> x = row_of(own, row);
    for (int64_t j = 0; j < s.vocab; ++j) {
      double a = p.log_p[j], c = q.log_p[j], e = std::exp(a), d = 0;
      if (s.kind == Kind::forward) d = e - std::exp(c);
      if (s.kind == Kind::reverse && e > 0) d = e * (a - c - kl_s);
      if (s.kind == Kind::jsd && e > 0) d = -(1 - b) * e * (m_over_s[j] + kl_s);
      d = d * g_value[row] + g_lse[row] * e - (e > 0 ? g_entropy[row] * e * (a + p.entropy) : 0);
      for (int64_t k = 0; k < s.candidates; ++k) {
        int64_t id = ids[row * s.candidates + k];
        if (id != kIgnoreIndex) d += g_logp[row * s.candidates + k] * ((id == j) - e);
      }
      double u = of_own.softcap ? std::tanh(x[j] * of_own.scale / of_own.softcap) : 0;
      d *= of_own.scale / of_own.temperature * (1 - u * u);
      r.near("gradient", read(gradient.get(), s.dtype, row * s.vocab + j), d,
             1e-5 + 2 * rounding(s.dtype) * std::fabs(d));
    }
  }
};

inline std::vector<PairShape> pair_shapes() {
  std::vector<PairShape> shapes;
  for (DType type : {DType::f32, DType::bf16, DType::f16})
    for (int64_t vocab : {1, 3, 17, 1023, 1024, 1025, 2600})
      for (Kind kind : {Kind::forward, Kind::reverse, Kind::jsd})
        for (bool plain : {true, false})
          shapes.push_back({type, 2, vocab > 1000 ? 2 : 3, vocab, vocab % 2 ? 3 : 0, vocab % 5, kind,
                            plain ? 0.5 : 0.25, plain, vocab % 2 == 0 || !plain, plain && vocab > 3});
  return shapes;
}

inline Report pair_report(const std::string& where, const PairShape& s) {
  return {where + ", dtype " + std::to_string(int(s.dtype)) + ", V = " + std::to_string(s.vocab) + ", kind " +
          std::to_string(int(s.kind)) + (s.plain ? "" : ", transformed")};
}

}  // namespace rlfast::tests
