// token_logps on the CPU: one read of the logits forward, one read and one write backward.
//
// A row is walked leaf by leaf. A leaf's maximum is taken as it comes from memory; its sums then find it in the L1 cache,
// while the next leaf is fetched. What a row needs of single columns (its targets, its top-k) is taken from the row's
// leaves afterwards, out of the L2 cache.
#include <memory>
#include <vector>

#include "../rlfast/row_grad.h"
#include "../rlfast/row_outputs.h"
#include "kernels.h"
#include "pages.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

namespace {

// Below so many logits a second thread costs more than it saves (waking one takes some 5 µs; 2^15 logits take 10).
constexpr int64_t kSerial = 1 << 15;
// A gradient beyond the last-level cache of a small machine is written past the caches: it saves the read before a write.
constexpr int64_t kStreamBytes = 8 << 20;

// What one thread needs beside the logits.
struct Scratch {
  alignas(64) float buffer[kLeaf];
  alignas(64) float copy[kLeaf];
  std::vector<LeafStats> leaf;
  std::vector<double> scale;
  std::vector<TargetStats> target;
  std::vector<Ranked> heap;
  std::vector<LeafRest> rest;
  std::vector<float> at_target;
};

template <class T>
const T* row_of(const Logits& x, int64_t row) {
  return static_cast<const T*>(x.data) + x.offset(row);
}

template <class T>
LeafStats one_leaf(const T* x, int64_t vocab, int64_t leaf, const RowScale& s, unsigned sums, float* buffer) {
  const int n = leaf_columns(vocab, leaf);
  float peak;
  const T* at = x + leaf * kLeaf;
  const float* y = load_leaf(at, n, s, buffer, &peak);
  return leaf_stats<sizeof(T)>(y, n, peak, s.log2, sums, reinterpret_cast<const char*>(at + kLeaf));
}

// The targets and the top-k of a row whose leaves are known, then its outputs.
template <class T>
void finish_row(const T* x, int64_t vocab, const LeafStats* leaf, const Targets& targets, const RowScale& s,
                unsigned sums, const ForwardOut& out, int64_t row, int64_t rows, Scratch& w) {
  const int64_t leaves = leaf_count(vocab), candidates = targets.candidates;
  float peak;
  w.target.resize(static_cast<size_t>(candidates));
  w.scale.resize(static_cast<size_t>(leaves));
  find_targets(x, vocab, targets, s, row, w.buffer, w.copy, w.target.data());
  TopK best{nullptr, nullptr, out.top_k, 0};
  if (out.top_k) {
    w.heap.resize(static_cast<size_t>(out.top_k));
    w.rest.resize(static_cast<size_t>(leaves));
    best.heap = w.heap.data();
    best.rest = w.rest.data();
    for (int64_t l = 0; l < leaves; ++l) {
      if (best.skips(l, leaf[l])) continue;
      const int n = leaf_columns(vocab, l);
      best.offer(load_leaf(x + l * kLeaf, n, s, w.buffer, &peak), n, l, leaf[l], s, w.copy);
    }
  }
  write_row(leaf, vocab, w.target.data(), candidates, out.top_k ? &best : nullptr, s, sums, w.scale.data(), out, row,
            rows);
}

template <class T>
void forward(const Logits& x, const Transform& t, const Targets& targets, const ForwardOut& out, int threads) {
  const int64_t rows = x.rows(), leaves = leaf_count(x.vocab);
  const unsigned sums = wanted_sums(out);
  if (rows * x.vocab < kSerial) threads = 1;
  // With fewer rows than threads, the leaves of all rows are shared out first: the same leaves, merged in the same order.
  const bool by_leaf = rows < threads && leaves > 1;
  std::vector<LeafStats> shared(by_leaf ? static_cast<size_t>(rows * leaves) : 0);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<Scratch> w(new Scratch);
    if (by_leaf) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < rows * leaves; ++i) {
        const int64_t row = i / leaves;
        if (skipped(targets, row)) continue;
        shared[i] = one_leaf(row_of<T>(x, row), x.vocab, i % leaves, row_scale(t, row), sums, w->buffer);
      }
    } else {
      w->leaf.resize(static_cast<size_t>(leaves));
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t row = 0; row < rows; ++row) {
      if (skipped(targets, row)) {
        write_skipped_row(targets.candidates, out, row, rows);
        continue;
      }
      const T* at = row_of<T>(x, row);
      const RowScale s = row_scale(t, row);
      LeafStats* leaf = by_leaf ? &shared[row * leaves] : w->leaf.data();
      for (int64_t l = 0; l < leaves && !by_leaf; ++l) leaf[l] = one_leaf(at, x.vocab, l, s, sums, w->buffer);
      finish_row(at, x.vocab, leaf, targets, s, sums, out, row, rows, *w);
    }
  }
}

template <class T>
void backward_row(const T* x, T* out, int64_t vocab, const Transform& t, const Targets& targets, const BackwardIn& in,
                  bool streamed, int64_t row, int64_t rows, Scratch& w) {
  const int64_t candidates = targets.candidates;
  const int64_t* ids = targets.ids + row * candidates;
  const RowScale s = row_scale(t, row);
  const RowGrad g = row_grad(s, in, ids, candidates, vocab, row);
  const auto counted = [&](int64_t k) { return ids[k] >= 0 && ids[k] < vocab; };
  // before the span, which may be written over the logits
  w.at_target.resize(static_cast<size_t>(candidates));
  for (int64_t k = 0; k < candidates; ++k) {
    if (counted(k)) w.at_target[k] = target_dlogit(to_float(x[ids[k]]), k, s, g, in, ids, candidates, row, rows);
  }
  if (streamed) {
    dlogits_span<Store::streamed>(x, out, vocab, s, g);
  } else {
    dlogits_span<Store::cached>(x, out, vocab, s, g);
  }
  for (int64_t k = 0; k < candidates; ++k) {
    if (counted(k)) from_float(w.at_target[k], out + ids[k]);
  }
}

template <class T>
void backward(const Logits& x, const Transform& t, const Targets& targets, const BackwardIn& in, const Logits& to,
              int threads) {
  const int64_t rows = x.rows();
  if (rows * x.vocab < kSerial) threads = 1;
  const bool streamed = to.data != x.data && rows * x.vocab * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  if (streamed && to.offset(rows - 1) == (rows - 1) * x.vocab) {
    prefer_huge_pages(to.data, rows * x.vocab * static_cast<int64_t>(sizeof(T)));
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<Scratch> w(new Scratch);
#pragma omp for schedule(dynamic, 4)
    for (int64_t row = 0; row < rows; ++row) {
      T* out = static_cast<T*>(to.data) + to.offset(row);
      if (skipped(targets, row)) {
        std::memset(static_cast<void*>(out), 0, static_cast<size_t>(x.vocab) * sizeof(T));
      } else {
        backward_row(row_of<T>(x, row), out, x.vocab, t, targets, in, streamed, row, rows, *w);
      }
    }
    if (streamed) stream_fence();
  }
}

}  // namespace

void token_logps_forward(const Logits& x, const Transform& t, const Targets& targets, const ForwardOut& out,
                         int threads) {
  switch (x.dtype) {
    case DType::f32:
      return forward<float>(x, t, targets, out, threads);
    case DType::bf16:
      return forward<bf16>(x, t, targets, out, threads);
    case DType::f16:
      return forward<f16>(x, t, targets, out, threads);
  }
}

void token_logps_backward(const Logits& x, const Transform& t, const Targets& targets, const BackwardIn& in,
                          const Logits& out, int threads) {
  switch (x.dtype) {
    case DType::f32:
      return backward<float>(x, t, targets, in, out, threads);
    case DType::bf16:
      return backward<bf16>(x, t, targets, in, out, threads);
    case DType::f16:
      return backward<f16>(x, t, targets, in, out, threads);
  }
}

double read_sum(const void* data, size_t bytes, int threads) {
  const float* x = static_cast<const float*>(data);
  const int64_t block = 16384, blocks = static_cast<int64_t>(bytes / sizeof(float)) / block;
  double total = 0.0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    F sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    for (int64_t i = b * block; i < (b + 1) * block; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) sum[u] = add(sum[u], load(x + i + u * kLanes));
    }
    total += reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  }
  return total;
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
