// A call of token_logps: its inputs and outputs in buffers of exact size, and the check of every value against the oracle.
#pragma once
#include <functional>

#include "oracle.h"

namespace rlfast::tests {

// How the logits of a row are drawn; rows differ by their seed.
enum class Fill { normal, large_offset, negative_offset, leading_block, half_masked, margins, nan_row, inf_row, ties };

struct Shape {
  std::string name;
  DType dtype = DType::f32;
  int64_t outer = 1, inner = 3, vocab = 17, candidates = 1, top_k = 0;
  int64_t pad_inner = 0, pad_outer = 0, lead = 0;  // elements between rows, between blocks of rows, before the first
  Fill fill = Fill::normal;
  RowOptions options;
  bool per_row_temperature = false, masked = false, wild = false, duplicates = false, moments = true, inplace = false;
};

struct TokenCase {
  Shape s;
  int64_t rows, stride_inner, stride_outer;
  Exact<char> logits, original, gradient;
  Exact<float> temperatures;
  Exact<int64_t> ids;
  Exact<uint8_t> mask;
  Exact<float> logp, lse, entropy, aux, topk_logp, g_logp, g_lse, g_entropy;
  Exact<uint8_t> is_top1;
  Exact<int64_t> topk_ids;
  std::vector<RowOptions> options;
  std::vector<std::vector<double>> x;

  static int64_t extent(const Shape& s) {
    if (s.outer * s.inner == 0) return 0;
    int64_t inner = s.vocab + s.pad_inner, outer = s.inner * inner + s.pad_outer;
    return s.lead + (s.outer - 1) * outer + (s.inner - 1) * inner + s.vocab;
  }

  explicit TokenCase(const Shape& shape)
      : s(shape),
        rows(s.outer * s.inner),
        stride_inner(s.vocab + s.pad_inner),
        stride_outer(s.inner * stride_inner + s.pad_outer),
        logits(extent(s) * width(s.dtype)),
        original(extent(s) * width(s.dtype)),
        gradient(rows * s.vocab * width(s.dtype)),
        temperatures(s.per_row_temperature ? rows : 0),
        ids(rows * s.candidates),
        mask(s.masked ? rows : 0),
        logp(rows * s.candidates),
        lse(rows),
        entropy(s.moments ? rows : 0),
        aux((2 + s.candidates + (s.moments ? 3 : 0) + (s.top_k > 0)) * rows),
        topk_logp(rows * s.top_k),
        g_logp(rows * s.candidates),
        g_lse(rows),
        g_entropy(rows),
        is_top1(rows * s.candidates),
        topk_ids(rows * s.top_k) {
    std::mt19937 random(unsigned(s.vocab * 31 + rows * 7 + int(s.fill)));
    for (int64_t row = 0; row < rows; ++row) draw_row(row, random);
    if (logits.n) std::memcpy(original.get(), logits.get(), logits.n);
  }

  Logits records(void* data) const {
    return {static_cast<char*>(data) + s.lead * width(s.dtype),
            s.dtype,
            s.outer,
            s.inner,
            s.vocab,
            stride_outer,
            stride_inner};
  }
  Logits gradient_records() {
    if (s.inplace) return records(logits.get());
    return {gradient.get(), s.dtype, s.outer, s.inner, s.vocab, s.inner * s.vocab, s.vocab};
  }
  Transform transform() {
    return {temperatures.get(), float(s.options.temperature), float(s.options.softcap), float(s.options.scale)};
  }
  Targets targets() { return {ids.get(), mask.get(), s.candidates}; }

  ForwardOut forward_out() {
    ForwardOut o{};
    o.logp = logp.get(), o.lse = lse.get(), o.entropy = entropy.get();
    o.is_top1 = is_top1.get();
    o.topk_logp = topk_logp.get(), o.topk_ids = topk_ids.get(), o.top_k = s.top_k;
    float* row = aux.get();
    o.peak = row, o.log_sum = row + rows, o.saved_logp = row + 2 * rows;
    row += (2 + s.candidates) * rows;
    if (s.moments) {
      o.saved_entropy = row, o.log_sum_sq_probs = row + rows, o.mean_logits = row + 2 * rows;
      row += 3 * rows;
    }
    if (s.top_k) o.tail_mass = row;
    return o;
  }
  BackwardIn backward_in() {
    ForwardOut o = forward_out();
    return {o.peak,
            o.log_sum,
            o.saved_logp,
            o.saved_entropy,
            g_logp.get(),
            g_lse.get(),
            s.moments ? g_entropy.get() : nullptr};
  }

  bool counted(int64_t row, int64_t k) { return ids[row * s.candidates + k] != kIgnoreIndex; }
  bool live(int64_t row) {
    bool any = false;
    for (int64_t k = 0; k < s.candidates; ++k) any |= counted(row, k);
    return any && (!s.masked || mask[row]);
  }
  bool wild(int64_t row, int64_t k) {
    int64_t id = ids[row * s.candidates + k];
    return id != kIgnoreIndex && (id < 0 || id >= s.vocab);
  }

  void draw_row(int64_t row, std::mt19937& random) {
    std::normal_distribution<double> normal(0, 3);
    static const double kMargins[] = {10, 16.6, 17, 20, 40};
    std::vector<double> v(s.vocab);
    for (double& e : v) e = normal(random);
    int64_t target = int64_t(random() % uint64_t(s.vocab));
    double common = s.dtype == DType::f32 ? 1e6 : 3e4;
    for (int64_t j = 0; j < s.vocab; ++j) {
      switch (s.fill) {
        case Fill::normal:
          break;
        case Fill::large_offset:
          v[j] += common;
          break;
        case Fill::negative_offset:
          v[j] -= s.dtype == DType::f32 ? 1e6 : 1e4;
          break;
        case Fill::leading_block:
          v[j] = j < std::min<int64_t>(4096, s.vocab - 1) ? -kInfinity : v[j];
          break;
        case Fill::half_masked:
          v[j] = j % 2 && j != target ? -kInfinity : v[j];
          break;
        case Fill::margins:
          v[j] = j == target ? kMargins[row % 5] + std::log(double(s.vocab)) : 0;
          break;
        case Fill::nan_row:
          v[j] = row == 1 && j == s.vocab / 2 ? NAN : v[j];
          break;
        case Fill::inf_row:
          v[j] = row == 1 && j == s.vocab / 2 ? kInfinity : v[j];
          break;
        case Fill::ties:
          // the target holds the maximum, and is the first of its own leaf that does; earlier leaves hold it too
          v[j] = j == target || (j % 128 == 0 && j + 1024 < target) ? 15.0 : std::round(v[j]);
          break;
      }
    }
    RowOptions o = s.options;
    if (s.per_row_temperature) o.temperature = temperatures[row] = 0.6f + 0.1f * float(row % 8);
    o.temperature = float(o.temperature), o.softcap = float(o.softcap), o.scale = float(o.scale);
    options.push_back(o);
    if (s.masked) mask[row] = row % 3 != 1;
    Logits r = records(logits.get());
    for (int64_t j = 0; j < s.vocab; ++j) {
      write(r.data, s.dtype, r.offset(row) + j, float(v[j]));
      v[j] = read(r.data, s.dtype, r.offset(row) + j);
    }
    x.push_back(v);
    for (int64_t k = 0; k < s.candidates; ++k) {
      int64_t id = k == 0 ? target : int64_t(random() % uint64_t(s.vocab));
      if (s.duplicates && k % 2) id = ids[row * s.candidates + k - 1];
      if (s.masked && row % 4 == 3) id = kIgnoreIndex;
      if (k == 2) id = kIgnoreIndex;
      if (s.wild && row == 1) id = k % 2 ? s.vocab : -1;
      if (s.wild && row == 2) id = k % 2 ? INT64_MAX : -(int64_t(1) << 40);
      ids[row * s.candidates + k] = id;
      g_logp[row * s.candidates + k] = float(normal(random));
    }
    g_lse[row] = float(normal(random)), g_entropy[row] = float(normal(random));
  }

  void check_forward(Report& r) {
    ForwardOut o = forward_out();
    for (int64_t row = 0; row < rows; ++row) {
      std::string at = " of row " + std::to_string(row);
      if (!live(row)) {
        check_skipped(r, o, row, at);
        continue;
      }
      OracleRow truth(x[row], options[row]);
      bool wild_row = false;
      for (int64_t k = 0; k < s.candidates; ++k) wild_row |= wild(row, k);
      for (int64_t k = 0; k < s.candidates; ++k) {
        int64_t i = row * s.candidates + k;
        double wanted = !counted(row, k) ? 0 : wild(row, k) ? NAN : truth.logp(ids[i]);
        if (wild_row && counted(row, k) && std::isnan(o.logp[i])) continue;
        r.near("logp" + at, o.logp[i], wanted, 1e-5 * std::fabs(wanted) + 2 * truth.slack + 1e-37);
        r.same("saved logp" + at, o.saved_logp[k * rows + row], o.logp[i]);
        if (o.logp[i] > 0) r.fail("logp > 0" + at, o.logp[i], 0, 0);
        if (!truth.slack && !std::isnan(wanted))
          r.same("is_top1" + at, o.is_top1[i], counted(row, k) && truth.first_argmax(ids[i]));
      }
      if (wild_row) continue;
      bool broken = std::isnan(truth.log_p[0]);
      auto check = [&](const char* name, double got, double wanted, double bound) {
        r.near(name + at, got, broken ? NAN : wanted, bound + 2 * truth.slack);
      };
      if (!broken) check("lse", o.lse[row], truth.lse, 2e-6 + 1.2e-7 * std::fabs(truth.lse));
      // a backend may keep the peak before its transform
      if (!truth.slack) check("peak + log_sum", double(o.peak[row]) + o.log_sum[row], truth.lse, 2e-6);
      if (s.moments) {
        check("entropy", o.entropy[row], truth.entropy, 2e-6 * (1 + truth.entropy));
        r.same("saved entropy" + at, o.saved_entropy[row], o.entropy[row]);
        check("log sum p^2", o.log_sum_sq_probs[row], truth.log_sum_sq, 4e-6 * (1 + std::fabs(truth.log_sum_sq)));
        if (!broken) check("mean", o.mean_logits[row], truth.mean, 4e-6 + 1e-6 * std::fabs(truth.mean));
      }
      if (s.top_k && !broken) check_top_k(r, o, truth, row, at);
    }
  }

  void check_skipped(Report& r, const ForwardOut& o, int64_t row, const std::string& at) {
    for (int64_t k = 0; k < s.candidates; ++k) {
      r.same("skipped logp" + at, o.logp[row * s.candidates + k], 0);
      r.same("skipped saved logp" + at, o.saved_logp[k * rows + row], 0);
      r.same("skipped is_top1" + at, o.is_top1[row * s.candidates + k], 0);
    }
    for (const float* out :
         {o.lse, o.peak, o.log_sum, o.entropy, o.saved_entropy, o.log_sum_sq_probs, o.mean_logits, o.tail_mass})
      if (out) r.same("skipped" + at, out[row], 0);
    for (int64_t k = 0; k < s.top_k; ++k) {
      r.same("skipped topk_ids" + at, double(o.topk_ids[row * s.top_k + k]), -1);
      r.same("skipped topk_logp" + at, o.topk_logp[row * s.top_k + k], 0);
    }
  }

  void check_top_k(Report& r, const ForwardOut& o, const OracleRow& truth, int64_t row, const std::string& at) {
    std::vector<int64_t> order(s.vocab);
    for (int64_t j = 0; j < s.vocab; ++j) order[j] = j;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return truth.z[a] > truth.z[b]; });
    double tail = 0;
    for (int64_t k = s.top_k; k < s.vocab; ++k) tail += std::exp(truth.log_p[order[k]]);
    r.near("tail mass" + at, o.tail_mass[row], tail, 4e-6 * tail + truth.slack + 1e-30);
    for (int64_t k = 0; k < s.top_k; ++k) {
      int64_t i = row * s.top_k + k;
      double wanted = truth.log_p[order[k]];
      if (!truth.slack) r.same("topk id" + at, double(o.topk_ids[i]), double(order[k]));
      if (o.topk_ids[i] < 0 || o.topk_ids[i] >= s.vocab) r.fail("topk id range" + at, double(o.topk_ids[i]), 0, 0);
      r.near("topk logp" + at, o.topk_logp[i], wanted, 4e-6 * (1 + std::fabs(wanted)) + 2 * truth.slack);
    }
  }

  void check_backward(Report& r) {
    Logits g = gradient_records();
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<double> got(s.vocab);
      for (int64_t j = 0; j < s.vocab; ++j) got[j] = read(g.data, s.dtype, g.offset(row) + j);
      check_gradient(r, row, got);
    }
    if (s.inplace) {
      check_padding(r);
    } else if (logits.n && std::memcmp(logits.get(), original.get(), logits.n) != 0) {
      r.fail("the logits were changed", 1, 0, 0);
    }
  }

  // Elements between the rows are no part of them.
  void check_padding(Report& r) {
    Exact<char> expected(logits.n);
    std::memcpy(expected.get(), original.get(), logits.n);
    Logits g = gradient_records();
    int64_t bytes = width(s.dtype);
    for (int64_t row = 0; row < rows; ++row) {
      int64_t begin = (s.lead + g.offset(row)) * bytes;
      std::memcpy(expected.get() + begin, logits.get() + begin, s.vocab * bytes);
    }
    if (std::memcmp(expected.get(), logits.get(), logits.n) != 0)
      r.fail("bytes outside the rows were written", 1, 0, 0);
  }

  // ∂L/∂z_j = g_logp·(1[j = target] − p_j) + g_lse·p_j − g_entropy·p_j·(log p_j + H), then ∂z/∂x.
  void check_gradient(Report& r, int64_t row, const std::vector<double>& got) {
    std::string at = " of row " + std::to_string(row);
    if (!live(row)) {
      for (double v : got) r.same("skipped gradient" + at, v, 0);
      return;
    }
    for (int64_t k = 0; k < s.candidates; ++k)
      if (wild(row, k)) return;
    const RowOptions& o = options[row];
    OracleRow truth(x[row], o);
    double h = s.moments ? g_entropy[row] : 0;
    for (int64_t j = 0; j < s.vocab; ++j) {
      double l = truth.log_p[j], p = std::exp(l), size = 0, value = g_lse[row] * p;
      if (p != 0) value -= h * p * (l + truth.entropy), size = p * std::fabs(h) * (std::fabs(l) + truth.entropy);
      size += p * std::fabs(g_lse[row]);
      for (int64_t k = 0; k < s.candidates; ++k) {
        int64_t i = row * s.candidates + k;
        if (!counted(row, k)) continue;
        double part = g_logp[i] * (ids[i] == j ? truth.rest(j) : -p);
        value += part, size += std::fabs(part);
      }
      double slope = o.scale / o.temperature;
      if (o.softcap) slope /= std::pow(std::cosh(x[row][j] * o.scale / o.softcap), 2);
      value *= slope, size *= std::fabs(slope);
      double bound = size * (2e-5 + 8 * truth.slack) + std::fabs(value) * rounding(s.dtype);
      r.near("gradient" + at, got[j], value, bound + (s.dtype == DType::f16 ? 0x1p-25 : 1e-37));
    }
  }
};

// The shapes and values that every kernel must take.
std::vector<Shape> token_shapes(bool large);

}  // namespace rlfast::tests
