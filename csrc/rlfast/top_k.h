// The k largest of a row, leaf by leaf, and what is outside of them.
#pragma once
#include <algorithm>

#include "row_stats.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

struct Ranked {
  float y;
  int64_t id;
};

// Ties go to the lower id.
struct Better {
  bool operator()(const Ranked& a, const Ranked& b) const { return a.y > b.y || (a.y == b.y && a.id < b.id); }
};

// Leaves are offered in ascending order. `rest` keeps each leaf without its columns that are in the heap, so that the
// tail's mass is a sum of what is outside, not a difference from 1.
struct TopK {
  Ranked* heap;    // [k], the worst in front
  LeafRest* rest;  // [leaves]
  int64_t k;
  int64_t count;

  // Whether a leaf has nothing for the heap; its rest is then all of it.
  bool skips(int64_t leaf, const LeafStats& stats) {
    rest[leaf] = {stats.peak, stats.sum};
    return count == k && !(stats.peak > heap[0].y);
  }

  void offer(const float* y, int n, int64_t leaf, const LeafStats& stats, const RowScale& s, float* buffer) {
    if (skips(leaf, stats)) return;
    const int64_t base = leaf * kLeaf;
    int i = 0;
    for (; i < n && count < k; ++i) {
      heap[count++] = {y[i] == y[i] ? y[i] : -kInf, base + i};
      std::push_heap(heap, heap + count, Better{});
    }
    for (; i < n; i += kLanes) {
      const F x = n - i < kLanes ? load_part(y + i, n - i, -kInf) : load(y + i);
      uint32_t found = bits(greater(x, set1(heap[0].y)));
      for (; found; found &= found - 1) insert(y[i + __builtin_ctz(found)], base + i + __builtin_ctz(found), base, s);
    }
    leave_out(y, n, leaf, s, buffer);
  }

private:
  void insert(float y, int64_t id, int64_t base, const RowScale& s) {
    if (!(y > heap[0].y)) return;
    std::pop_heap(heap, heap + k, Better{});
    const Ranked out = heap[k - 1];
    heap[k - 1] = {y, id};
    std::push_heap(heap, heap + k, Better{});
    if (out.id < base) put_back(out.y, &rest[out.id / kLeaf], s);
  }

  // Adds a column to its leaf again.
  static void put_back(float y, LeafRest* r, const RowScale& s) {
    if (y == -kInf) return;
    if (y > r->peak) {
      r->sum = r->peak == -kInf ? r->sum : r->sum * std::exp(s.c * (static_cast<double>(r->peak) - y));
      r->peak = y;
    }
    r->sum += std::exp(s.c * (static_cast<double>(y) - r->peak));
  }

  void leave_out(const float* y, int n, int64_t leaf, const RowScale& s, float* buffer) {
    const int64_t base = leaf * kLeaf;
    std::memcpy(buffer, y, static_cast<size_t>(n) * sizeof(float));
    for (int64_t j = 0; j < count; ++j) {
      if (heap[j].id >= base) buffer[heap[j].id - base] = -kInf;
    }
    rest[leaf] = leaf_rest(buffer, n, s.log2);
  }
};

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
