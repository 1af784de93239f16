// paged_attention in double precision by its definition: pages of every size with garbage between them, shared prefixes, widths on
// either side of a vector, windows, soft-caps and sinks.
#include "../cpu/kernels.h"
#include "oracle.h"

namespace rlfast::tests {

namespace {

struct AttentionShape {
  std::string name;
  DType dtype;
  std::vector<int32_t> lengths, fresh;  // positions and new tokens of each sequence
  int64_t heads, kv_heads, width, value_width, page_size, prefix;
  float softcap;
  int64_t window;
  bool sinks;
};

std::vector<AttentionShape> attention_shapes() {
  std::vector<AttentionShape> shapes;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    shapes.push_back({"decode", dtype, {1, 63, 64, 65, 200}, {1, 1, 1, 1, 1}, 9, 3, 64, 64, 16, 0, 0, 0, false});
    shapes.push_back({"prefill", dtype, {150, 17}, {150, 17}, 4, 2, 33, 21, 1, 0, 0, 0, false});
    shapes.push_back({"chunks", dtype, {260, 70, 5}, {100, 1, 0}, 6, 2, 80, 80, 16, 0, 20, 70, true});
    shapes.push_back({"shared", dtype, {150, 141, 170}, {2, 1, 9}, 6, 2, 24, 40, 4, 140, 0, 0, true});
    shapes.push_back({"shared window", dtype, {290, 281}, {2, 1}, 3, 1, 16, 16, 8, 256, 0, 50, false});
    shapes.push_back({"many heads", dtype, {66}, {2}, 200, 1, 16, 7, 64, 0, 0, 0, false});
    shapes.push_back({"narrow", dtype, {9, 3}, {3, 3}, 1, 1, 1, 1, 3, 0, 5, 2, true});
    shapes.push_back({"nothing", dtype, {}, {}, 2, 1, 8, 8, 16, 0, 0, 0, false});
  }
  return shapes;
}

// The bytes of n elements, in a buffer of exact size.
struct Elements {
  DType dtype;
  Exact<uint8_t> bytes;
  Elements(DType dtype, int64_t n) : dtype(dtype), bytes(n * width(dtype)) {}
  double operator[](int64_t i) { return read(bytes.get(), dtype, i); }
  void set(int64_t i, float x) { write(bytes.get(), dtype, i, x); }
};

struct AttentionCase {
  AttentionShape s;
  int64_t tokens, row, pages;
  Elements q, k, v, out;
  Exact<int32_t> table, cu, lens;
  Exact<float> sinks;

  static int64_t sum(const std::vector<int32_t>& x) {
    int64_t total = 0;
    for (int32_t n : x) total += n;
    return total;
  }
  static int64_t pages_of(int64_t positions, int64_t size) { return (positions + size - 1) / size; }
  static int64_t most(const AttentionShape& s) {
    int64_t found = 0;
    for (int32_t n : s.lengths) found = std::max(found, pages_of(n, s.page_size));
    return found;
  }

  explicit AttentionCase(const AttentionShape& s)
      : s(s),
        tokens(sum(s.fresh)),
        row(most(s)),
        pages(row * int64_t(s.lengths.size()) + 1),
        q(s.dtype, tokens * s.heads * s.width),
        k(s.dtype, pages * s.page_size * s.kv_heads * s.width),
        v(s.dtype, pages * s.page_size * s.kv_heads * s.value_width),
        out(s.dtype, tokens * s.heads * s.value_width),
        table(row * int64_t(s.lengths.size())),
        cu(int64_t(s.lengths.size()) + 1),
        lens(int64_t(s.lengths.size())),
        sinks(s.heads) {
    std::mt19937 draw(5);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < tokens * s.heads * s.width; ++i) q.set(i, 2 * normal(draw));
    for (int64_t h = 0; h < s.heads; ++h) sinks[h] = normal(draw);
    cu[0] = 0;
    for (size_t i = 0; i < s.lengths.size(); ++i) {
      cu[int64_t(i) + 1] = cu[int64_t(i)] + s.fresh[i];
      lens[int64_t(i)] = s.lengths[i];
      for (int64_t p = 0; p < pages_of(s.lengths[i], s.page_size); ++p) {
        const bool shared = i > 0 && (p + 1) * s.page_size <= s.prefix;
        table[int64_t(i) * row + p] = shared ? table[p] : int32_t(pages - 1 - (int64_t(i) * row + p));
      }
      for (int64_t p = 0; p < s.lengths[i]; ++p) fill(int64_t(i), p, draw, normal);
    }
  }

  int64_t at(int64_t sequence, int64_t p, int64_t head, int64_t n) {
    const int64_t page = table[sequence * row + p / s.page_size];
    return ((page * s.page_size + p % s.page_size) * s.kv_heads + head) * n;
  }

  void fill(int64_t sequence, int64_t p, std::mt19937& draw, std::normal_distribution<float>& normal) {
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      for (int64_t d = 0; d < s.width; ++d) k.set(at(sequence, p, h, s.width) + d, normal(draw));
      for (int64_t e = 0; e < s.value_width; ++e) v.set(at(sequence, p, h, s.value_width) + e, normal(draw));
    }
  }

  float scale() const { return 1.0f / std::sqrt(float(s.width)); }

  void run(const Kernels& kernels, int threads) {
    const int64_t kw = s.kv_heads * s.width, vw = s.kv_heads * s.value_width;
    const AttentionIn in = {s.dtype,
                            q.bytes.get(),
                            s.heads * s.width,
                            s.width,
                            {k.bytes.get(), s.page_size * kw, kw, s.width, s.width},
                            {v.bytes.get(), s.page_size * vw, vw, s.value_width, s.value_width},
                            s.page_size,
                            table.get(),
                            row,
                            cu.get(),
                            lens.get(),
                            s.sinks ? sinks.get() : nullptr,
                            int64_t(s.lengths.size()),
                            s.heads,
                            s.kv_heads,
                            scale(),
                            s.softcap,
                            s.window};
    kernels.paged_attention(in, out.bytes.get(), threads);
  }

  void check(Report& report) {
    for (int64_t i = 0; i < int64_t(s.lengths.size()); ++i)
      for (int64_t t = cu[i]; t < cu[i + 1]; ++t)
        for (int64_t h = 0; h < s.heads; ++h) check(report, i, t, h);
  }

  void check(Report& report, int64_t sequence, int64_t t, int64_t h) {
    const int64_t own = lens[sequence] - (cu[sequence + 1] - t), head = h / (s.heads / s.kv_heads);
    const int64_t from = s.window ? std::max<int64_t>(0, own - s.window + 1) : 0;
    std::vector<double> scores;
    double total = s.sinks ? std::exp(double(sinks[h])) : 0, largest = 0;
    for (int64_t p = from; p <= own; ++p) {
      double x = 0;
      for (int64_t d = 0; d < s.width; ++d)
        x += q[(t * s.heads + h) * s.width + d] * k[at(sequence, p, head, s.width) + d];
      x *= double(scale());
      if (s.softcap) x = double(s.softcap) * std::tanh(x / double(s.softcap));
      scores.push_back(x);
      total += std::exp(x);
      largest = std::max(largest, std::fabs(x));
    }
    for (int64_t e = 0; e < s.value_width; ++e) {
      double value = 0, size = 0;
      for (int64_t p = from; p <= own; ++p) {
        const double term = std::exp(scores[p - from]) / total * v[at(sequence, p, head, s.value_width) + e];
        value += term, size += std::fabs(term);
      }
      const double bound = rounding(s.dtype) * std::fabs(value) + (1e-6 + largest * 0x1p-20) * size;
      report.near("attention", out[(t * s.heads + h) * s.value_width + e], value, bound);
    }
  }
};

}  // namespace

void test_attention(const Kernels& k, const std::string& isa) {
  for (const AttentionShape& shape : attention_shapes())
    for (int threads : {1, 2}) {
      AttentionCase c(shape);
      Report r{isa + ", paged_attention, " + shape.name + ", dtype " + std::to_string(int(shape.dtype))};
      c.run(k, threads);
      c.check(r);
    }
}

}  // namespace rlfast::tests
