// What the linear kernel takes: out = x·weightᵀ + bias.
#pragma once
#include "token_logps.h"

namespace rlfast {

struct LinearIn {
  const void* x;       // [rows, depth], stride_x elements from row to row
  const void* weight;  // [columns, depth], stride_weight elements from row to row
  const void* bias;    // [columns], or null
  DType dtype;         // of all three
  int64_t rows, depth, columns;
  int64_t stride_x, stride_weight;
};

struct LinearOut {
  void* data;  // [rows, columns], contiguous
  bool wide;   // float32, whatever the dtype of the inputs
};

}  // namespace rlfast
