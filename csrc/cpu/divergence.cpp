// divergence on the CPU: one read of both logits forward, one read of both and one write backward.
//
// A row of both sides is walked leaf by leaf, as in token_logps. A JSD walks it again when both log Σe are known, out of the L2
// cache: two rows of 49152 float32 are 384 KiB.
#include <memory>
#include <vector>

#include "../rlfast/pair_grad.h"
#include "kernels.h"
#include "pages.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

namespace {

constexpr int64_t kSerial = 1 << 15;  // as in token_logps.cpp
constexpr int64_t kStreamBytes = 8 << 20;

// What one thread needs beside the logits.
struct Scratch {
  alignas(64) float own_buffer[kLeaf];
  alignas(64) float other_buffer[kLeaf];
  std::vector<LeafStats> own, other;
  std::vector<double> gap, scale;
  std::vector<TargetStats> target;
  std::vector<float> at_target;

  Scratch(int64_t leaves, int64_t candidates)
      : own(static_cast<size_t>(leaves)),
        other(static_cast<size_t>(leaves)),
        gap(static_cast<size_t>(leaves)),
        scale(static_cast<size_t>(2 * leaves)),
        target(static_cast<size_t>(candidates)),
        at_target(static_cast<size_t>(candidates)) {}
};

// Two rows of logits and how they become y.
template <class T>
struct Rows {
  const T *own, *other;
  RowScale s, t;
  int64_t vocab, leaves;

  Rows(const Logits& x, const Logits& y, const Transform& of_x, const Transform& of_y, int64_t row)
      : own(static_cast<const T*>(x.data) + x.offset(row)),
        other(static_cast<const T*>(y.data) + y.offset(row)),
        s(row_scale(of_x, row)),
        t(row_scale(of_y, row)),
        vocab(x.vocab),
        leaves((x.vocab + kLeaf - 1) / kLeaf) {}
};

template <class T>
Halves mixed_row(const Rows<T>& r, const PairTotals& totals, double beta, Scratch& w) {
  const Mixture m = mixture_of(totals, r.s, r.t, beta);
  Halves sum{0.0, 0.0};
  for (int64_t l = 0; l < r.leaves; ++l) {
    const int n = leaf_columns(r.vocab, l);
    float peak;
    const float* x = load_leaf(r.own + l * kLeaf, n, r.s, w.own_buffer, &peak);
    const float* y = load_leaf(r.other + l * kLeaf, n, r.t, w.other_buffer, &peak);
    const Halves leaf = mixed_sums(x, y, n, m);
    sum.s += leaf.s, sum.t += leaf.t;
  }
  return sum;
}

template <class T>
void forward_row(const Rows<T>& r, const Targets& targets, const Measure& measure, unsigned sums, const PairOut& out,
                 int64_t row, int64_t rows, Scratch& w) {
  for (int64_t l = 0; l < r.leaves; ++l) {
    const int n = leaf_columns(r.vocab, l);
    const T *own = r.own + l * kLeaf, *other = r.other + l * kLeaf;
    float own_peak, other_peak;
    const float* x = load_leaf(own, n, r.s, w.own_buffer, &own_peak);
    const float* y = load_leaf(other, n, r.t, w.other_buffer, &other_peak);
    const PairLeaf leaf =
        pair_leaf<sizeof(T)>(x, y, n, own_peak, other_peak, r.s, r.t, sums, measure.kind,
                             reinterpret_cast<const char*>(own + kLeaf), reinterpret_cast<const char*>(other + kLeaf));
    w.own[l] = leaf.own, w.other[l] = leaf.other, w.gap[l] = leaf.gap;
  }
  const PairTotals totals =
      merge_pair(w.own.data(), w.other.data(), w.gap.data(), r.leaves, r.s, r.t, measure.kind, w.scale.data());
  Halves halves{0.0, 0.0};
  if (measure.kind == Kind::jsd && totals.possible) halves = mixed_row(r, totals, measure.beta, w);
  find_targets(r.own, r.vocab, targets, r.s, row, w.own_buffer, w.other_buffer, w.target.data());
  write_row(w.own.data(), r.vocab, w.target.data(), targets.candidates, nullptr, r.s, sums, w.scale.data(), out.student,
            row, rows);
  write_pair(totals, halves, r.t, measure, out, row, rows);
}

template <class T>
void forward(const Logits& x, const Logits& y, const Transform& of_x, const Transform& of_y, const Targets& targets,
             const Measure& measure, const PairOut& out, int threads) {
  const int64_t rows = x.rows(), leaves = (x.vocab + kLeaf - 1) / kLeaf;
  const unsigned sums = wanted_sums(out.student);
  if (rows * x.vocab < kSerial) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<Scratch> w(new Scratch(leaves, targets.candidates));
#pragma omp for schedule(dynamic, 4)
    for (int64_t row = 0; row < rows; ++row) {
      if (skipped(targets, row)) {
        write_skipped_pair(targets.candidates, out, row, rows);
      } else {
        forward_row(Rows<T>(x, y, of_x, of_y, row), targets, measure, sums, out, row, rows, *w);
      }
    }
  }
}

template <class T>
void backward_row(const Rows<T>& r, T* out, const Targets& targets, const Measure& measure, const PairIn& in,
                  bool streamed, int64_t row, int64_t rows, Scratch& w) {
  const int64_t candidates = targets.candidates;
  const int64_t* ids = targets.ids + row * candidates;
  const PairGrad g = pair_grad(r.s, r.t, measure, in, ids, candidates, r.vocab, row, rows);
  const auto counted = [&](int64_t k) { return ids[k] >= 0 && ids[k] < r.vocab; };
  for (int64_t k = 0; k < candidates; ++k) {
    if (!counted(k)) continue;
    w.at_target[k] = target_pair(to_float(r.own[ids[k]]), to_float(r.other[ids[k]]), k, measure.kind, r.s, r.t, g,
                                 in.own, ids, candidates, row, rows);
  }
  if (streamed) {
    pair_span<Store::streamed>(r.own, r.other, out, r.vocab, measure.kind, r.s, r.t, g);
  } else {
    pair_span<Store::cached>(r.own, r.other, out, r.vocab, measure.kind, r.s, r.t, g);
  }
  for (int64_t k = 0; k < candidates; ++k) {
    if (counted(k)) from_float(w.at_target[k], out + ids[k]);
  }
}

template <class T>
void backward(const Logits& x, const Logits& y, const Transform& of_x, const Transform& of_y, const Targets& targets,
              const Measure& measure, const PairIn& in, const Logits& to, int threads) {
  const int64_t rows = x.rows(), bytes = rows * x.vocab * static_cast<int64_t>(sizeof(T));
  if (rows * x.vocab < kSerial) threads = 1;
  const bool streamed = bytes > kStreamBytes;
  if (streamed && to.offset(rows - 1) == (rows - 1) * x.vocab) prefer_huge_pages(to.data, bytes);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<Scratch> w(new Scratch(0, targets.candidates));
#pragma omp for schedule(dynamic, 4)
    for (int64_t row = 0; row < rows; ++row) {
      T* out = static_cast<T*>(to.data) + to.offset(row);
      if (skipped(targets, row)) {
        std::memset(static_cast<void*>(out), 0, static_cast<size_t>(x.vocab) * sizeof(T));
      } else {
        backward_row(Rows<T>(x, y, of_x, of_y, row), out, targets, measure, in, streamed, row, rows, *w);
      }
    }
    if (streamed) stream_fence();
  }
}

}  // namespace

void divergence_forward(const Logits& x, const Logits& y, const Transform& of_x, const Transform& of_y,
                        const Targets& targets, const Measure& measure, const PairOut& out, int threads) {
  switch (x.dtype) {
    case DType::f32:
      return forward<float>(x, y, of_x, of_y, targets, measure, out, threads);
    case DType::bf16:
      return forward<bf16>(x, y, of_x, of_y, targets, measure, out, threads);
    case DType::f16:
      return forward<f16>(x, y, of_x, of_y, targets, measure, out, threads);
  }
}

void divergence_backward(const Logits& x, const Logits& y, const Transform& of_x, const Transform& of_y,
                         const Targets& targets, const Measure& measure, const PairIn& in, const Logits& out,
                         int threads) {
  switch (x.dtype) {
    case DType::f32:
      return backward<float>(x, y, of_x, of_y, targets, measure, in, out, threads);
    case DType::bf16:
      return backward<bf16>(x, y, of_x, of_y, targets, measure, in, out, threads);
    case DType::f16:
      return backward<f16>(x, y, of_x, of_y, targets, measure, in, out, threads);
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
