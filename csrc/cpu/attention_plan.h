// Which queries are worked on together, so that they read their keys and values once.
//
// A block is some queries of one sequence, or all queries of neighbouring sequences whose tables begin with the same pages:
// the samples of one prompt. Nothing in a query's arithmetic depends on its block.
#pragma once
#include <algorithm>
#include <vector>

#include "../rlfast/paged_attention.h"
#include "buffer.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// Positions [from, to).
struct Seen {
  int64_t from, to;
};

// What the query `token` of sequence s sees.
inline Seen seen_by(const AttentionIn& in, int64_t s, int64_t token) {
  const int64_t to = in.kv_lens[s] - (in.cu[s + 1] - token) + 1;
  return {in.window ? std::max<int64_t>(0, to - in.window) : 0, to};
}

// What any of the queries [begin, end) of sequence s sees.
inline Seen seen_by(const AttentionIn& in, int64_t s, int64_t begin, int64_t end) {
  return {seen_by(in, s, begin).from, seen_by(in, s, end - 1).to};
}

struct QueryBlock {
  int64_t first, last;  // sequences [first, last)
  int64_t begin, end;   // queries
  int64_t common;       // leading splits that lie in the same pages for all of them
  int64_t work;         // queries × keys
};

// Leading splits, whole ones, that two sequences have in the same pages.
inline int64_t shared_splits(const AttentionIn& in, int64_t a, int64_t b) {
  const int32_t *x = in.table + a * in.table_row, *y = in.table + b * in.table_row;
  const int64_t keys = std::min(in.kv_lens[a], in.kv_lens[b]), pages = ceil_div(keys, in.page_size);
  int64_t same = 0;
  while (same < pages && x[same] == y[same]) ++same;
  return std::min(same * in.page_size, keys) / kSplit;
}

// The block of `first` and of those after it that share splits with it, at most `most` queries. One that shares fewer than the
// block has in common begins another.
inline QueryBlock gathered(const AttentionIn& in, int64_t first, int64_t most) {
  QueryBlock block{first, first + 1, in.cu[first], in.cu[first + 1], ceil_div(in.kv_lens[first], kSplit), 0};
  for (int64_t s = first + 1; s < in.sequences && in.cu[s + 1] > in.cu[s]; ++s) {
    if (in.cu[s + 1] - block.begin > most) break;
    const int64_t shared = shared_splits(in, s - 1, s);
    if (shared == 0 || (s > first + 1 && shared < block.common)) break;
    if (s == first + 1) block.common = shared;
    block.last = s + 1, block.end = in.cu[s + 1];
  }
  return block;
}

inline int64_t work_of(const AttentionIn& in, const QueryBlock& block) {
  int64_t work = 0;
  for (int64_t s = block.first; s < block.last; ++s) {
    const int64_t begin = std::max<int64_t>(block.begin, in.cu[s]), end = std::min<int64_t>(block.end, in.cu[s + 1]);
    const Seen seen = seen_by(in, s, begin, end);
    work += (end - begin) * (seen.to - seen.from);
  }
  return work;
}

// Every query in one block of `most` queries or fewer; the blocks with the most work come first.
inline std::vector<QueryBlock> plan_blocks(const AttentionIn& in, int64_t most) {
  std::vector<QueryBlock> blocks;
  for (int64_t s = 0; s < in.sequences;) {
    const int64_t end = in.cu[s + 1];
    if (end - in.cu[s] <= most) {
      if (end > in.cu[s]) blocks.push_back(gathered(in, s, most));
      s = end > in.cu[s] ? blocks.back().last : s + 1;
      continue;
    }
    for (int64_t begin = in.cu[s]; begin < end; begin += most)
      blocks.push_back({s, s + 1, begin, std::min(begin + most, end), ceil_div(in.kv_lens[s], kSplit), 0});
    ++s;
  }
  for (QueryBlock& block : blocks) block.work = work_of(in, block);
  std::sort(blocks.begin(), blocks.end(), [](const QueryBlock& a, const QueryBlock& b) { return a.work > b.work; });
  return blocks;
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
