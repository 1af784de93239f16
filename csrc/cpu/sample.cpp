// sample on the CPU: one read of the logits from memory, then the race for the token over what can still win, out of the cache.
#include "../rlfast/sample.h"

#include <memory>

#include "kernels.h"
#include "sample_row.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

namespace {

// Below so many logits a second thread costs more than it saves, as in token_logps.cpp.
constexpr int64_t kSerialLogits = 1 << 15;

template <class T>
void by_row(const Logits& x, const SampleOptions& options, const SampleEdits& edits, const SampleOut& out,
            int threads) {
  const int64_t rows = x.rows(), leaves = leaf_count(x.vocab);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<SampleScratch> w(new SampleScratch);
    SampleRow<T> one(x, options, edits);
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < rows; ++row) {
      one.begin(row);
      for (int64_t l = 0; l < leaves; ++l) one.read(l, *w);
      one.plan(*w);
      one.finish(one.race(0, leaves, *w), out, *w);
    }
  }
}

// With fewer rows than threads, the leaves of a row are shared out: the same leaves, merged in the same order, and the leader of
// the leaders.
template <class T>
void by_leaf(const Logits& x, const SampleOptions& options, const SampleEdits& edits, const SampleOut& out,
             int threads) {
  const int64_t rows = x.rows(), leaves = leaf_count(x.vocab);
  std::vector<SampleRow<T>> all(static_cast<size_t>(rows), SampleRow<T>(x, options, edits));
  for (int64_t row = 0; row < rows; ++row) all[row].begin(row);
  std::vector<Leader> leaders(static_cast<size_t>(rows * threads));
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<SampleScratch> w(new SampleScratch);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows * leaves; ++i) all[i / leaves].read(i % leaves, *w);
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < rows; ++row) all[row].plan(*w);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < rows * threads; ++i) {
      const int64_t share = i % threads;
      leaders[i] = all[i / threads].race(leaves * share / threads, leaves * (share + 1) / threads, *w);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < rows; ++row) {
      Leader leader = leaders[row * threads];
      for (int64_t i = 1; i < threads; ++i) {
        if (leader.behind(leaders[row * threads + i])) leader = leaders[row * threads + i];
      }
      all[row].finish(leader, out, *w);
    }
  }
}

template <class T>
void run(const Logits& x, const SampleOptions& options, const SampleEdits& edits, const SampleOut& out, int threads) {
  if (x.rows() * x.vocab < kSerialLogits) threads = 1;
  if (x.rows() < threads && x.vocab > kLeaf) {
    by_leaf<T>(x, options, edits, out, threads);
  } else {
    by_row<T>(x, options, edits, out, threads);
  }
}

}  // namespace

void sample(const Logits& x, const SampleOptions& options, const SampleEdits& edits, const SampleOut& out,
            int threads) {
  switch (x.dtype) {
    case DType::f32:
      return run<float>(x, options, edits, out, threads);
    case DType::bf16:
      return run<bf16>(x, options, edits, out, threads);
    case DType::f16:
      return run<f16>(x, options, edits, out, threads);
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
