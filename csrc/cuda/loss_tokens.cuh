// The batch of token_loss on a GPU: what a call is, where its pieces lie, and what a piece adds up to.
#pragma once
#include "tokens.cuh"

namespace rlfast::cuda {

namespace {

// What a piece adds up to. The last two are maxima.
enum LossSlot {
  kSumPolicy,
  kSumKlPart,
  kSumEntropyPart,
  kSumKl,
  kSumEntropy,
  kSumK1,
  kSumK3,
  kSumRatio,
  kSumW,
  kSumW2,
  kSumDrift,
  kCountTokens,
  kCountKept,
  kCountLow,
  kCountHigh,
  kCountDropped,
  kCountSequences,
  kMaxRatio,
  kMaxDrift,
  kLossSlots
};

constexpr int kMaxHyper = 4;

// Formulas by their places in csrc/rlfast/formulas.gen.h.
struct LossFormulas {
  int surrogate, estimator;  // −1: none
  float hyper[kMaxHyper], kl_hyper[2];
};

struct LossCall {
  LossFields fields;
  LossPlan plan;
  LossSettings settings;
  LossFormulas formulas;
  LossOut out;
};

struct Loss {
  LossCall call;
  double* partial;     // [kLossSlots, pieces]
  unsigned* finished;  // blocks that are done
  int64_t pieces;      // of the batch
  int64_t tile;        // tokens of a piece; with kWhole a piece is a sequence
  int64_t tiles;       // of a row, if not packed
};

constexpr int64_t kWhole = INT64_MAX;

// Packed sequences take ⌈n / tile⌉ pieces at most, and the first of each is known without a look at the others.
RLFAST_DEVICE int64_t first_piece(const Loss& a, int64_t sequence) {
  const LossFields& f = a.call.fields;
  return f.cu_seqlens ? boundary(f.cu_seqlens, sequence, f.length) / a.tile + sequence : sequence * a.tiles;
}

RLFAST_DEVICE Piece piece_of(const Loss& a, int64_t index) {
  const LossFields& f = a.call.fields;
  if (!f.cu_seqlens) {
    int64_t row = index / a.tiles, begin = index % a.tiles * a.tile;
    return {row, 0, begin, f.length - begin < a.tile ? f.length : begin + a.tile};
  }
  int64_t low = 0, high = f.rows - 1;  // the last sequence whose first piece is not beyond this one
  while (low < high) {
    int64_t middle = (low + high + 1) / 2;
    if (first_piece(a, middle) <= index)
      low = middle;
    else
      high = middle - 1;
  }
  int64_t first = boundary(f.cu_seqlens, low, f.length), length = boundary(f.cu_seqlens, low + 1, f.length) - first;
  int64_t begin = (index - first_piece(a, low)) * a.tile;
  return {0, first, begin, length - begin < a.tile ? length : begin + a.tile};
}

}  // namespace

}  // namespace rlfast::cuda
