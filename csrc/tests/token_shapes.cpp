#include "token_case.h"

namespace rlfast::tests {

namespace {

void add_vocabularies(std::vector<Shape>& all, bool large) {
  std::vector<int64_t> sizes = {1, 2, 7, 8, 15, 16, 17, 31, 33, 255, 257, 1023, 1024, 1025, 2047, 2049, 5003};
  if (large) sizes.push_back(50257);
  for (DType type : {DType::f32, DType::bf16, DType::f16})
    for (int64_t vocab : sizes) {
      Shape s;
      s.name = "vocabulary", s.dtype = type, s.vocab = vocab, s.inner = vocab > 5000 ? 2 : 3;
      s.moments = vocab % 3 != 0, s.top_k = vocab % 2 ? std::min<int64_t>(5, vocab) : 0;
      all.push_back(s);
    }
}

void add_values(std::vector<Shape>& all) {
  for (DType type : {DType::f32, DType::bf16, DType::f16})
    for (Fill fill : {Fill::large_offset, Fill::negative_offset, Fill::leading_block, Fill::half_masked, Fill::margins,
                      Fill::nan_row, Fill::inf_row, Fill::ties}) {
      if (type == DType::f16 && fill == Fill::large_offset) continue;
      Shape s;
      s.name = "values", s.dtype = type, s.vocab = 5119, s.inner = 5, s.fill = fill;
      s.top_k = fill == Fill::ties ? 40 : 3;
      if (fill == Fill::margins) s.moments = false;
      all.push_back(s);
    }
}

void add_layouts(std::vector<Shape>& all) {
  for (DType type : {DType::f32, DType::bf16})
    for (int64_t lead = 0; lead < 8; lead += type == DType::f32 ? 1 : 3)
      for (bool inplace : {false, true}) {
        Shape s;
        s.name = "layout", s.dtype = type, s.outer = 2, s.inner = 3, s.vocab = 2053, s.lead = lead;
        s.pad_inner = lead % 5, s.pad_outer = s.vocab, s.inplace = inplace, s.masked = true;
        all.push_back(s);
      }
  for (int64_t inner : {0, 1}) {
    Shape s;
    s.name = "rows", s.inner = inner, s.outer = inner ? 1 : 2, s.vocab = 1031, s.masked = true;
    all.push_back(s);
  }
}

void add_candidates(std::vector<Shape>& all) {
  for (int64_t candidates : {2, 5, 33})
    for (bool wild : {false, true}) {
      Shape s;
      s.name = "candidates", s.vocab = 1500, s.inner = 4, s.candidates = candidates, s.duplicates = true, s.wild = wild;
      s.dtype = wild ? DType::bf16 : DType::f32, s.top_k = wild ? 2 : 0;
      all.push_back(s);
    }
  Shape s;
  s.name = "wild target", s.vocab = 3000, s.inner = 4, s.wild = true;
  all.push_back(s);
  s.name = "wild target in place", s.inplace = true, s.lead = 3;
  all.push_back(s);
}

void add_transforms(std::vector<Shape>& all) {
  const RowOptions options[] = {{0.6, 0, 1}, {1.3, 30, 1}, {1, 0, 0.0625}, {0.8, 15, -0.5}};
  for (DType type : {DType::f32, DType::f16})
    for (const RowOptions& o : options)
      for (bool per_row : {false, true}) {
        Shape s;
        s.name = "transform", s.dtype = type, s.vocab = 1100, s.inner = 4, s.options = o,
        s.per_row_temperature = per_row;
        s.top_k = 3, s.fill = per_row ? Fill::half_masked : Fill::normal;
        if (s.fill == Fill::half_masked && o.scale < 0) s.fill = Fill::normal;
        all.push_back(s);
      }
}

}  // namespace

std::vector<Shape> token_shapes(bool large) {
  std::vector<Shape> all;
  add_vocabularies(all, large);
  add_values(all);
  add_layouts(all);
  add_candidates(all);
  add_transforms(all);
  Shape s;
  s.name = "top-k of everything", s.vocab = 1200, s.top_k = 1200, s.inner = 2, s.fill = Fill::half_masked;
  all.push_back(s);
  return all;
}

}  // namespace rlfast::tests
