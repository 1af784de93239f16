// What paged_attention takes: queries that are packed, keys and values in pages.
#pragma once
#include "token_logps.h"

namespace rlfast {

// Keys of one split of the softmax. Splits begin at the multiples of it, whatever the pages, the chunks or the batch.
constexpr int64_t kSplit = 64;

// [pages, page_size, kv_heads, width], strides in elements, the last dimension contiguous.
struct Pages {
  const void* data;
  int64_t page, slot, head;  // strides
  int64_t width;
};

// Sequence s has kv_lens[s] positions, position p in page table[s, p / page_size], slot p % page_size. Its last
// cu[s + 1] − cu[s] positions are those of the queries cu[s] to cu[s + 1].
struct AttentionIn {
  DType dtype;
  const void* q;            // [tokens, heads, k.width]
  int64_t q_token, q_head;  // strides
  Pages k, v;
  int64_t page_size;
  const int32_t* table;
  int64_t table_row;       // stride
  const int32_t* cu;       // [sequences + 1]
  const int32_t* kv_lens;  // [sequences]
  const float* sinks;      // [heads]: logits that have no value; or null
  int64_t sequences, heads, kv_heads;
  float scale;     // > 0
  float softcap;   // 0: none
  int64_t window;  // positions that a query sees, its own among them; 0: all
};

}  // namespace rlfast
