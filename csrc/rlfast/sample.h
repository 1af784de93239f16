// What the sample kernel takes: raw pointers and sizes. No torch in here.
#pragma once
#include "token_logps.h"

namespace rlfast {

// One of each a row.
struct SampleOptions {
  const float* temperature;  // 0: the first of the largest
  const int32_t* top_k;      // 0: off
  const float* top_p;        // 1: off
  const float* min_p;        // 0: off
  const int64_t* seeds;
  const int64_t* positions;
};

// What is changed before anything else: logits that are replaced, and ids that are not allowed.
struct SampleEdits {
  const int32_t* ends;  // [rows + 1], or null: row r's are [ends[r], ends[r + 1])
  const int32_t* ids;
  const float* values;
  int64_t count;
  const int32_t* allowed;  // [rows, ⌈vocab / 32⌉], a bit an id, or null
};

struct SampleOut {
  int64_t* tokens;  // −1 in a row that has none
  float* logp_raw;
  float* logp;
  float* kept;
  float* entropy;
};

}  // namespace rlfast
