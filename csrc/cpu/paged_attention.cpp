// paged_attention on the CPU: for a block of queries and a key head, split by split of the keys,
//
//   pack the split (keys transposed, values as they are, both float32 or pairs of bf16)
//   scores = q·kᵀ → weights → their sum and weights·v → merged with the splits before
//
// The heads of a group are rows beside each other, so that a decode step reads a sequence's cache once; the queries of
// sequences with the same leading pages are too. Products are gemm.h's, whose bits depend on neither the number of rows nor
// who stands beside a row, and what a row does not see has a weight of exactly 0: a query has the same bits in every block.
#include "../rlfast/paged_attention.h"

#include "attention_plan.h"
#include "attention_tile.h"
#include "gemm_pack.h"
#include "kernels.h"

namespace rlfast {
namespace RLFAST_ISA_NS {
namespace {

// Rows of a block: whole tiles of 14 and of 6. With 168 rows packing a split costs a twentieth of its products, and queries,
// scores and sums of 64 columns (130 KiB) stay in the second-level cache.
constexpr int64_t kMostRows = 168;
// Below so many multiplications a second thread costs more than it saves.
constexpr int64_t kSerial = 1 << 17;

template <class T>
class Attention {
  using Row = typename RowOf<T>::type;

public:
  Attention(const AttentionIn& in, T* out, int threads)
      : in_(in),
        out_(out),
        scale_(in.scale, in.softcap),
        group_(in.heads / in.kv_heads),
        blocks_(plan_blocks(in, most_queries(in, threads))),
        words_(Row::words(in.k.width)),
        lda_(pitch(words_)),
        width_(round_up(in.v.width, kTileCols)) {
    int64_t work = 0;
    for (const QueryBlock& block : blocks_) {
      rows_ = std::max(rows_, group_ * (block.end - block.begin));
      work += block.work;
    }
    threads_ = work * in.heads * (in.k.width + in.v.width) < kSerial ? 1 : threads;
  }

  void run() {
    const int64_t items = static_cast<int64_t>(blocks_.size()) * in_.kv_heads;
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
    {
      Scratch w(*this);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < items; ++i) attend(blocks_[i / in_.kv_heads], i % in_.kv_heads, w);
    }
  }

private:
  // Where the keys and values of a split lie that any of the rows sees.
  struct Places {
    Seen used;
    const T *k[kSplit], *v[kSplit];
  };

  // What one thread needs.
  struct Scratch {
    Buffer<float> keys, values, queries, scores, part, total, sums;
    Buffer<Seen> seen;
    Seen here[kTileRows];  // what a tile sees, relative to the split
    Places places[2];      // of a split and of the next

    explicit Scratch(const Attention& a)
        : keys(kSplit * a.words_),
          values(kSplit * a.width_),
          queries(a.rows_ * a.lda_),
          scores(kTileRows * kScorePitch),
          part(kTileRows * a.width_),
          total(a.rows_ * a.width_),
          sums(2 * (a.rows_ + kTilePad) + 2 * kTilePad),
          seen(a.rows_) {}

    RowSums so_far(const Attention& a, int64_t row) {
      return {sums.get() + row, sums.get() + a.rows_ + kTilePad + row, total.get() + row * a.width_};
    }
    RowSums next(const Attention& a) {
      float* own = sums.get() + 2 * (a.rows_ + kTilePad);
      return {own, own + kTilePad, part.get()};
    }
  };

  // Queries of a block: at least two items a thread, if there are so many.
  static int64_t most_queries(const AttentionIn& in, int threads) {
    const int64_t group = in.heads / in.kv_heads, rows = in.cu[in.sequences] * group;
    const int64_t fair = round_up(ceil_div(rows * in.kv_heads, 2 * threads), kTileRows);
    return std::max<int64_t>(1, std::min(kMostRows, fair) / group);
  }

  void attend(const QueryBlock& block, int64_t head, Scratch& w) {
    open(block, head, w);
    const int64_t rows = group_ * (block.end - block.begin);
    walk(block.first, head, 0, rows, 0, block.common, w);
    if (block.last > block.first + 1) {
      for (int64_t s = block.first; s < block.last; ++s) {
        const int64_t row = group_ * (in_.cu[s] - block.begin), count = group_ * (in_.cu[s + 1] - in_.cu[s]);
        walk(s, head, row, count, block.common, ceil_div(in_.kv_lens[s], kSplit), w);
      }
    }
    close(block, head, w);
  }

  // The queries side by side, and no key seen yet.
  void open(const QueryBlock& block, int64_t head, Scratch& w) {
    const T* q = static_cast<const T*>(in_.q);
    int64_t row = 0, s = block.first;
    for (int64_t token = block.begin; token < block.end; ++token) {
      while (token >= in_.cu[s + 1]) ++s;
      for (int64_t g = 0; g < group_; ++g, ++row) {
        Row::copy(q + token * in_.q_token + (head * group_ + g) * in_.q_head, in_.k.width, &w.queries[row * lda_]);
        w.seen[row] = seen_by(in_, s, token);
      }
    }
    const RowSums all = w.so_far(*this, 0);
    std::fill(all.peak, all.peak + row + kTilePad, kNothing);
    std::fill(all.sum, all.sum + row, 0.0f);
    std::fill(all.values, all.values + row * width_, 0.0f);
  }

  // Splits [first, last) of sequence s, for rows [row, row + count).
  void walk(int64_t s, int64_t head, int64_t row, int64_t count, int64_t first, int64_t last, Scratch& w) {
    Seen any = w.seen[row];
    for (int64_t r = row; r < row + count; r += group_)
      any = {std::min(any.from, w.seen[r].from), std::max(any.to, w.seen[r].to)};
    first = std::max(first, any.from / kSplit), last = std::min(last, ceil_div(any.to, kSplit));
    if (first >= last) return;
    locate(s, head, first * kSplit, any, w.places[first % 2]);
    for (int64_t split = first; split < last; ++split) {
      const int64_t start = split * kSplit;
      const Places &here = w.places[split % 2], &next = w.places[(split + 1) % 2];
      locate(s, head, start + kSplit, split + 1 < last ? any : Seen{0, 0}, w.places[(split + 1) % 2]);
      const int64_t columns = round_up(here.used.to, kTileCols);
      pack(here, next, columns, w);
      for (int64_t r = row; r < row + count; r += kTileRows)
        take(start, columns, r, std::min<int64_t>(kTileRows, row + count - r), w);
    }
  }

  // Addresses of the keys and values of the split at `start` that are seen, a division by the page size for all of them.
  void locate(int64_t s, int64_t head, int64_t start, const Seen& seen, Places& to) {
    to.used = {std::max<int64_t>(seen.from - start, 0), std::min(seen.to - start, kSplit)};
    const int32_t* table = in_.table + s * in_.table_row;
    const T* k = static_cast<const T*>(in_.k.data) + head * in_.k.head;
    const T* v = static_cast<const T*>(in_.v.data) + head * in_.v.head;
    int64_t page = (start + to.used.from) / in_.page_size, slot = (start + to.used.from) % in_.page_size;
    for (int64_t i = to.used.from; i < to.used.to; ++i) {
      to.k[i] = k + table[page] * in_.k.page + slot * in_.k.slot;
      to.v[i] = v + table[page] * in_.v.page + slot * in_.v.slot;
      if (++slot == in_.page_size) slot = 0, ++page;
    }
  }

  static bool has(const Places& places, int64_t i) { return i >= places.used.from && i < places.used.to; }

  static void prefetch_row(const T* x, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) prefetch(x + i);
  }

  // Keys as [columns / kTileCols][width][kTileCols], values as [width / kTileCols][kSplit][kTileCols]; zeros where nobody looks.
  // Rows of one head lie apart, where no hardware fetches them ahead.
  void pack(const Places& here, const Places& next, int64_t columns, Scratch& w) {
    for (int64_t c = 0; c < columns; c += kTileCols) {
      const auto key = [&](int64_t r) -> const T* {
        if (!has(here, c + r)) return nullptr;
        prefetch_row(here.v[c + r], in_.v.width);
        return here.k[c + r];
      };
      pack_transposed<Row>(key, kTileCols, in_.k.width, &w.keys[c * words_]);
    }
    for (int64_t i = 0; i < columns; ++i) {
      if (has(next, i)) prefetch_row(next.k[i], in_.k.width);
      for (int64_t c = 0; c < width_; c += kTileCols) {
        float* to = &w.values[c * kSplit + i * kTileCols];
        const int64_t n = has(here, i) ? std::min<int64_t>(kTileCols, in_.v.width - c) : 0;
        if (n > 0) Widened<T>::copy(here.v[i] + c, n, to);
        std::fill(to + n, to + kTileCols, 0.0f);
      }
    }
  }

  // The split for the rows of one tile.
  void take(int64_t start, int64_t columns, int64_t row, int64_t rows, Scratch& w) {
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) {
      const Seen& seen = w.seen[row + r];
      w.here[r] = {std::max<int64_t>(seen.from - start, 0), std::min(seen.to - start, columns)};
      any |= w.here[r].from < w.here[r].to;
    }
    if (!any) return;
    float* x = w.scores.get();
    gemm<typename Row::Words>(rows, columns, words_, {&w.queries[row * lda_], lda_, 1},
                              {w.keys.get(), kTileCols * words_}, x, kScorePitch, false);
    const RowSums next = w.next(*this);
    for (int64_t r = 0; r < rows; ++r) {
      const RowWeights found = weigh(x + r * kScorePitch, columns, w.here[r], scale_);
      next.peak[r] = found.peak, next.sum[r] = found.sum;
    }
    for (int64_t r = rows; r < kTilePad; ++r) next.peak[r] = kNothing;
    gemm<Float32Words>(rows, width_, columns, {x, kScorePitch, 1}, {w.values.get(), kSplit * kTileCols}, next.values,
                       width_, false);
    merge(w.so_far(*this, row), next, w.here, rows, width_, scale_.log2);
  }

  // Σw·v / (Σw + exp(sink − peak)): a sink is a key without a value.
  void close(const QueryBlock& block, int64_t head, Scratch& w) {
    const int64_t rows = group_ * (block.end - block.begin), n = in_.v.width;
    const RowSums all = w.so_far(*this, 0);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t h = head * group_ + row % group_;
      double sum = all.sum[row];
      if (in_.sinks) sum += std::exp(in_.sinks[h] - scale_.c * all.peak[row]);
      const F total = set1(static_cast<float>(sum));
      const float* x = all.values + row * width_;
      T* to = out_ + ((block.begin + row / group_) * in_.heads + h) * n;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(to + i, div(load(x + i), total));
      if (i < n) store_part(to + i, div(load(x + i), total), static_cast<int>(n - i));
    }
  }

  const AttentionIn& in_;
  T* out_;
  ScoreScale scale_;
  int64_t group_;
  std::vector<QueryBlock> blocks_;
  int64_t words_, lda_, width_, rows_ = 0;
  int threads_;
};

}  // namespace

void paged_attention(const AttentionIn& in, void* out, int threads) {
  switch (in.dtype) {
    case DType::f32:
      return Attention<float>(in, static_cast<float*>(out), threads).run();
    case DType::bf16:
      return Attention<bf16>(in, static_cast<bf16*>(out), threads).run();
    case DType::f16:
      return Attention<f16>(in, static_cast<f16*>(out), threads).run();
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
