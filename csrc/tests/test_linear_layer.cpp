// linear against sums in double precision, and against itself: a row alone, from one thread, gives the bits that it has among others.
#include "../cpu/kernels.h"
#include "oracle.h"

namespace rlfast::tests {

namespace {

struct LayerShape {
  DType dtype;
  int64_t rows, depth, columns;
  bool bias = false, wide = false;
  int64_t pad = 0;  // elements between the rows of x and of the weight
};

class LayerCase {
public:
  explicit LayerCase(const LayerShape& shape)
      : s(shape),
        out_type(s.wide ? DType::f32 : s.dtype),
        x(extent(s.rows) * width(s.dtype)),
        weight(extent(s.columns) * width(s.dtype)),
        bias((s.bias ? s.columns : 0) * width(s.dtype)) {
    std::mt19937 random(unsigned(s.rows * 131 + s.columns * 7 + s.depth));
    fill(random, x, s.rows, s.depth, s.depth + s.pad, 1);
    fill(random, weight, s.columns, s.depth, s.depth + s.pad, 1 / std::sqrt(double(s.depth)));
    if (s.bias) fill(random, bias, 1, s.columns, s.columns, 1);
  }

  void run(const Kernels& k, Report& r) {
    Exact<char> whole = result(k, 0, s.rows, 1);
    check(r, whole);
    for (int threads : {1, 2, 5}) same(r, "threads", result(k, 0, s.rows, threads), whole, 0, s.rows);
    for (int64_t rows : {1, 2, 3, 4, 7})
      for (int64_t first : {int64_t(0), s.rows / 2, s.rows - rows})
        if (first >= 0 && first + rows <= s.rows) same(r, "rows alone", result(k, first, rows, 2), whole, first, rows);
  }

private:
  int64_t extent(int64_t rows) const { return rows ? (rows - 1) * (s.depth + s.pad) + s.depth : 0; }

  void fill(std::mt19937& random, Exact<char>& to, int64_t rows, int64_t columns, int64_t stride, double sigma) {
    std::normal_distribution<double> normal(0, sigma);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) write(to.get(), s.dtype, i * stride + j, float(normal(random)));
  }

  Exact<char> result(const Kernels& k, int64_t first, int64_t rows, int threads) {
    const int64_t stride = s.depth + s.pad;
    Exact<char> out(rows * s.columns * width(out_type));
    const char* from = x.get() + first * stride * width(s.dtype);
    k.linear({from, weight.get(), bias.get(), s.dtype, rows, s.depth, s.columns, stride, stride}, {out.get(), s.wide},
             threads);
    return out;
  }

  void same(Report& r, const std::string& what, Exact<char> got, Exact<char>& whole, int64_t first, int64_t rows) {
    const int64_t bytes = s.columns * width(out_type);
    r.same(what, rows ? std::memcmp(got.get(), whole.get() + first * bytes, rows * bytes) : 0, 0);
  }

  void check(Report& r, Exact<char>& y) {
    const int64_t stride = s.depth + s.pad;
    for (int64_t i = 0; i < s.rows; ++i)
      for (int64_t j = 0; j < s.columns; ++j) {
        double sum = s.bias ? read(bias.get(), s.dtype, j) : 0, size = std::fabs(sum);
        for (int64_t d = 0; d < s.depth; ++d) {
          const double product =
              double(read(x.get(), s.dtype, i * stride + d)) * double(read(weight.get(), s.dtype, j * stride + d));
          sum += product, size += std::fabs(product);
        }
        const double bound = 4e-7 * size + std::fabs(sum) * rounding(out_type) + 1e-6 * (out_type == DType::f16);
        r.near("y", read(y.get(), out_type, i * s.columns + j), sum, bound);
      }
  }

  LayerShape s;
  DType out_type;
  Exact<char> x, weight, bias;
};

}  // namespace

void test_linear_layer(const Kernels& k, const std::string& isa) {
  std::vector<LayerShape> all;
  for (DType type : {DType::f32, DType::bf16, DType::f16})
    for (bool wide : {false, true}) {
      for (int64_t depth : {1, 3, 15, 16, 17, 31, 32, 33, 63, 65})
        for (int64_t columns : {1, 7, 8, 9}) all.push_back({type, 5, depth, columns, depth % 2 == 0, wide, depth % 3});
      for (int64_t rows : {0, 1, 2, 3, 4, 64, 260}) all.push_back({type, rows, 40, 19, rows % 2 == 1, wide});
      all.push_back({type, 30, 7001, 12, true, wide, 5});  // several panels, several blocks of the depth
      all.push_back({type, 16, 30001, 5, false, wide});
      all.push_back({type, 3, 2049, 17, false, wide});
      all.push_back({type, 17, 576, 100, true, wide});
    }
  for (const LayerShape& s : all) {
    Report r{isa + ", linear, dtype " + std::to_string(int(s.dtype)) + (s.wide ? ", wide, " : ", ") +
             std::to_string(s.rows) + "x" + std::to_string(s.depth) + "x" + std::to_string(s.columns)};
    LayerCase(s).run(k, r);
  }
}

}  // namespace rlfast::tests
