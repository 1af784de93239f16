// What the linear_token_logps kernels take beside token_logps.h: logits = hidden·weightᵀ + bias, never given.
#pragma once
#include "token_logps.h"

namespace rlfast {

struct Head {
  const void* hidden;  // [rows, depth], stride_hidden elements from row to row
  const void* weight;  // [vocab, depth], stride_weight elements from row to row
  const void* bias;    // [vocab], or null
  DType dtype;         // of all three
  int64_t rows, depth, vocab;
  int64_t stride_hidden, stride_weight;
};

// Of the head's dtype and contiguous; null where not needed.
struct HeadGradients {
  void* hidden;       // [rows, depth]
  void* weight;       // [vocab, depth]
  void* bias;         // [vocab]
  bool wide = false;  // all are float32, whatever the dtype
  bool add = false;   // weight and bias, which are float32 then too, are added to
};

}  // namespace rlfast
