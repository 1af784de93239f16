// What every token_logps kernel takes, on the CPU and on a GPU: raw pointers, sizes, strides. No torch in here.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define RLFAST_HOST_DEVICE __host__ __device__
#else
#define RLFAST_HOST_DEVICE
#endif

namespace rlfast {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Columns of one leaf of the vocabulary. Row statistics are kept per leaf and merged in ascending order, whatever the
// batch, the chunk, the thread count or the number of splits.
constexpr int64_t kLeaf = 1024;

constexpr int64_t kIgnoreIndex = -100;

// logits [outer, inner, vocab]: row r starts at (r / inner) * stride_outer + (r % inner) * stride_inner elements.
struct Logits {
  void* data;
  DType dtype;
  int64_t outer, inner, vocab;
  int64_t stride_outer, stride_inner;
  RLFAST_HOST_DEVICE int64_t rows() const { return outer * inner; }
  RLFAST_HOST_DEVICE int64_t offset(int64_t row) const {
    return (row / inner) * stride_outer + (row % inner) * stride_inner;
  }
};

// z = softcap·tanh(logit_scale·x / softcap) / temperature
struct Transform {
  const float* temperatures;  // [rows], or null: `temperature` for every row
  float temperature;
  float softcap;  // 0: none
  float logit_scale;
};

struct Targets {
  const int64_t* ids;   // [rows, candidates]
  const uint8_t* mask;  // [rows], or null; 0 skips the row
  int64_t candidates;
};

// Null where an output is not asked for. `aux` is the op's [Row.rows, rows] record: peak, log_sum, logp of each candidate, then
// entropy, log_sum_sq_probs, mean_logits and tail_mass as asked; each pointer below points at its row of it.
struct ForwardOut {
  float* logp;        // [rows, candidates]
  float* lse;         // [rows]
  float* entropy;     // [rows]
  uint8_t* is_top1;   // [rows, candidates]
  float* topk_logp;   // [rows, top_k], descending
  int64_t* topk_ids;  // [rows, top_k]
  int64_t top_k;
  float* peak;
  float* log_sum;
  float* saved_logp;  // [candidates, rows]
  float* saved_entropy;
  float* log_sum_sq_probs;
  float* mean_logits;
  float* tail_mass;
};

struct BackwardIn {
  const float* peak;
  const float* log_sum;
  const float* saved_logp;     // [candidates, rows]
  const float* saved_entropy;  // null if there is no g_entropy
  const float* g_logp;         // [rows, candidates], or null
  const float* g_lse;          // [rows], or null
  const float* g_entropy;      // [rows], or null
};

}  // namespace rlfast
