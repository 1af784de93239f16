// linear_token_logps against the oracle: odd sizes, strided rows, bias, kept and recomputed logits, frozen parts.
#include "../cpu/kernels.h"
#include "oracle.h"

namespace rlfast::tests {

namespace {

struct LinearShape {
  DType dtype;
  int64_t rows, depth, vocab, candidates = 1, top_k = 0;
  bool bias = false, keep = false, masked = false, wild = false;
  RowOptions options = {};
  int needs = 7;  // hidden 1, weight 2, bias 4
  int64_t pad = 0;
  int threads = 1;
};

struct Matrix {
  Exact<char> data;
  DType dtype;
  int64_t rows, columns, stride;
  Matrix(DType type, int64_t rows, int64_t columns, int64_t pad)
      : data(rows ? ((rows - 1) * (columns + pad) + columns) * width(type) : 0),
        dtype(type),
        rows(rows),
        columns(columns),
        stride(columns + pad) {}
  double operator()(int64_t i, int64_t j) { return read(data.get(), dtype, i * stride + j); }
  void fill(std::mt19937& random, double sigma) {
    std::normal_distribution<double> normal(0, sigma);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) write(data.get(), dtype, i * stride + j, float(normal(random)));
  }
};

class LinearCase {
public:
  explicit LinearCase(const LinearShape& shape)
      : s(shape),
        hidden(s.dtype, s.rows, s.depth, s.pad),
        weight(s.dtype, s.vocab, s.depth, s.pad),
        bias(s.dtype, s.bias ? 1 : 0, s.vocab, 0),
        g_hidden(s.dtype, s.needs & 1 ? s.rows : 0, s.depth, 0),
        g_weight(s.dtype, s.needs & 2 ? s.vocab : 0, s.depth, 0),
        g_bias(s.dtype, s.bias && s.needs & 4 ? 1 : 0, s.vocab, 0),
        ids(s.rows * s.candidates),
        mask(s.masked ? s.rows : 0),
        logp(s.rows * s.candidates),
        lse(s.rows),
        entropy(s.rows),
        aux((2 + s.candidates + 1 + (s.top_k > 0)) * s.rows),
        topk_logp(s.rows * s.top_k),
        kept(s.keep ? s.rows * s.vocab : 0),
        g_logp(s.rows * s.candidates),
        g_entropy(s.rows),
        topk_ids(s.rows * s.top_k) {
    std::mt19937 random(unsigned(s.rows * 131 + s.vocab * 7 + s.depth));
    hidden.fill(random, 1), weight.fill(random, 2.0 / std::sqrt(double(s.depth))), bias.fill(random, 1);
    std::normal_distribution<float> normal;
    for (int64_t row = 0; row < s.rows; ++row) {
      if (s.masked) mask[row] = row % 3 != 1;
      g_entropy[row] = normal(random);
      for (int64_t k = 0; k < s.candidates; ++k) {
        int64_t i = row * s.candidates + k;
        ids[i] = k % 2 ? ids[i - 1] : int64_t(random() % uint64_t(s.vocab));
        if (row % 5 == 4) ids[i] = kIgnoreIndex;
        if (s.wild && row == 1) ids[i] = k % 2 ? -7 : s.vocab + 1000000;
        g_logp[i] = normal(random);
      }
    }
  }

  void run(const Kernels& k, Report& r) {
    Head head{hidden.data.get(), weight.data.get(), bias.data.get(), s.dtype,      s.rows,
              s.depth,           s.vocab,           hidden.stride,   weight.stride};
    Transform transform{nullptr, float(s.options.temperature), float(s.options.softcap), float(s.options.scale)};
    Targets targets{ids.get(), mask.get(), s.candidates};
    ForwardOut o{};
    o.logp = logp.get(), o.lse = lse.get(), o.entropy = entropy.get();
    o.topk_logp = topk_logp.get(), o.topk_ids = topk_ids.get(), o.top_k = s.top_k;
    o.peak = aux.get(), o.log_sum = o.peak + s.rows, o.saved_logp = o.log_sum + s.rows;
    o.saved_entropy = o.saved_logp + s.candidates * s.rows;
    o.tail_mass = s.top_k ? o.saved_entropy + s.rows : nullptr;
    k.linear_token_logps_forward(head, transform, targets, o, kept.get(), s.threads);
    BackwardIn in{o.peak, o.log_sum, o.saved_logp, o.saved_entropy, g_logp.get(), nullptr, g_entropy.get()};
    HeadGradients g{g_hidden.data.get(), g_weight.data.get(), g_bias.data.get()};
    k.linear_token_logps_backward(head, transform, targets, in, kept.get(), g, s.threads);
    check(r);
  }

private:
  bool live(int64_t row) { return ids[row * s.candidates] != kIgnoreIndex && (!s.masked || mask[row]); }
  bool wild(int64_t row) { return s.wild && row == 1; }

  std::vector<double> logits(int64_t row) {
    std::vector<double> x(s.vocab);
    for (int64_t v = 0; v < s.vocab; ++v) {
      x[v] = s.bias ? bias(0, v) : 0;
      for (int64_t d = 0; d < s.depth; ++d) x[v] += hidden(row, d) * weight(v, d);
    }
    return x;
  }

  void check(Report& r) {
    std::vector<double> gh(s.rows * s.depth), gw(s.vocab * s.depth), gb(s.vocab), size_w(s.vocab * s.depth),
        size_b(s.vocab);
    double noise = 4e-7 * std::sqrt(double(s.depth)) + 4e-6;
    for (int64_t row = 0; row < s.rows; ++row) {
      std::string at = " of row " + std::to_string(row);
      if (!live(row) || wild(row)) {
        if (!live(row)) r.same("skipped lse" + at, lse[row], 0);
        for (int64_t k = 0; k < s.candidates; ++k)
          r.same("logp" + at, logp[row * s.candidates + k], live(row) ? NAN : 0);
        for (int64_t d = 0; !live(row) && d < s.depth && g_hidden.rows; ++d)
          r.same("skipped gradient" + at, g_hidden(row, d), 0);
        continue;
      }
      std::vector<double> x = logits(row);
      OracleRow truth(x, s.options);
      r.near("lse" + at, lse[row], truth.lse, noise * 3);
      r.near("entropy" + at, entropy[row], truth.entropy, noise * 10);
      for (int64_t k = 0; k < s.candidates; ++k)
        r.near("logp" + at, logp[row * s.candidates + k], truth.logp(ids[row * s.candidates + k]), noise * 4);
      if (s.top_k) {
        std::vector<double> sorted = truth.log_p;
        std::sort(sorted.begin(), sorted.end(), std::greater<>());
        for (int64_t k = 0; k < s.top_k; ++k)
          r.near("topk logp" + at, topk_logp[row * s.top_k + k], sorted[k], noise * 4);
      }
      std::vector<double> size_h(s.depth);
      for (int64_t v = 0; v < s.vocab; ++v) {
        double l = truth.log_p[v], p = std::exp(l), g = -g_entropy[row] * p * (l + truth.entropy);
        for (int64_t k = 0; k < s.candidates; ++k) {
          int64_t i = row * s.candidates + k;
          g += g_logp[i] * (ids[i] == v ? truth.rest(v) : -p);
        }
        g *= s.options.scale / s.options.temperature;
        if (s.options.softcap) g /= std::pow(std::cosh(x[v] * s.options.scale / s.options.softcap), 2);
        gb[v] += g, size_b[v] += std::fabs(g);
        for (int64_t d = 0; d < s.depth; ++d) {
          gh[row * s.depth + d] += g * weight(v, d), size_h[d] += std::fabs(g * weight(v, d));
          gw[v * s.depth + d] += g * hidden(row, d), size_w[v * s.depth + d] += std::fabs(g * hidden(row, d));
        }
      }
      for (int64_t d = 0; d < s.depth && g_hidden.rows; ++d)
        compare(r, "hidden gradient" + at, g_hidden(row, d), gh[row * s.depth + d], size_h[d]);
    }
    if (s.wild) return;  // one row's NaN is in every weight
    for (int64_t v = 0; v < s.vocab; ++v) {
      for (int64_t d = 0; d < s.depth && g_weight.rows; ++d)
        compare(r, "weight gradient", g_weight(v, d), gw[v * s.depth + d], size_w[v * s.depth + d]);
      if (g_bias.rows) compare(r, "bias gradient", g_bias(0, v), gb[v], size_b[v]);
    }
  }

  void compare(Report& r, const std::string& what, double got, double wanted, double size) {
    // dlogits may be rounded to the inputs' 16-bit type before the products
    double bound = size * (s.dtype == DType::f32 ? 2e-5 : rounding(s.dtype)) + std::fabs(wanted) * rounding(s.dtype);
    r.near(what, got, wanted, bound + (s.dtype == DType::f16 ? 1e-6 : 1e-30));
  }

  LinearShape s;
  Matrix hidden, weight, bias, g_hidden, g_weight, g_bias;
  Exact<int64_t> ids;
  Exact<uint8_t> mask;
  Exact<float> logp, lse, entropy, aux, topk_logp, kept, g_logp, g_entropy;
  Exact<int64_t> topk_ids;
};

}  // namespace

void test_linear(const Kernels& k, const std::string& isa) {
  std::vector<LinearShape> all;
  for (DType type : {DType::f32, DType::bf16, DType::f16}) {
    for (bool keep : {false, true}) {
      all.push_back({type, 1, 1, 1, 1, 0, false, keep});
      all.push_back({type, 3, 5, 17, 1, 2, true, keep});
      all.push_back({type, 17, 33, 1023, 1, 0, false, keep, true});
      all.push_back({type, 15, 31, 1025, 3, 0, true, keep, true});
      all.push_back({type, 29, 64, 1100, 1, 0, true, keep, false, false, {0.7, 0, 1}, 7, 3, 2});
      all.push_back({type, 9, 67, 2100, 2, 3, true, keep, false, true, {1.2, 20, 0.5}, 7, 1, 2});
    }
    for (int needs = 0; needs < 7; ++needs)
      all.push_back({type, 7, 19, 130, 1, 0, true, needs % 2 == 0, false, false, {}, needs});
    all.push_back({type, 0, 8, 40});
  }
  for (const LinearShape& s : all) {
    Report r{isa + ", linear_token_logps, dtype " + std::to_string(int(s.dtype)) + ", " + std::to_string(s.rows) + "x" +
             std::to_string(s.depth) + "x" + std::to_string(s.vocab) + (s.keep ? ", kept" : ", recomputed") +
             ", needs " + std::to_string(s.needs)};
    LinearCase(s).run(k, r);
  }
}

}  // namespace rlfast::tests
