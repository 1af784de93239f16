// Tiles of affine_scan: kRows rows × 16 tokens, turned so that a vector holds one token of each row.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../rlfast/affine_scan.h"
#include "../rlfast/vec.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

constexpr int kSteps = 16;  // a cache line of float32 a row

// [token][row]
struct Tile {
  alignas(64) float x[kSteps][kRows];
};

// Where the k-th tile of each row lies: its first token is `at` tokens from where the row is scanned from; tokens
// [first, last) of it are there.
struct Window {
  int64_t at;
  bool whole;     // every token of every row
  int64_t left;   // whole tiles that may be taken at a time, this one among them
  int64_t ahead;  // tokens to what is fetched next
  int first[kRows], last[kRows];
};

// One array of one number a token: for each row, the address that tiles are counted from.
template <class T>
struct Column {
  T* from[kRows];
};

inline float one_float(uint8_t x) { return x; }
template <class T>
inline float one_float(T x) {
  return to_float(x);
}

// x[l] = the 16 tokens of row l, turned into one vector a token.
inline void turn(const float* const* x, Tile* to) {
  for (int t = 0; t < kSteps; t += kRows) {
    R part[kRows];
#pragma GCC unroll 8
    for (int l = 0; l < kRows; ++l) part[l] = load_rows(x[l] + t);
    transpose(part);
#pragma GCC unroll 8
    for (int l = 0; l < kRows; ++l) store_rows(to->x[t + l], part[l]);
  }
}

template <class T>
void load_tile(const Column<const T>& c, const Window& w, Tile* to) {
  const float* at[kRows];
  alignas(64) float staged[kRows][kSteps];
  for (int l = 0; l < kRows; ++l) {
    const T* x = c.from[l] + w.at;
    if constexpr (std::is_same<T, float>::value) {
      if (w.whole) {
        at[l] = x;
        prefetch(x + w.ahead);
        continue;
      }
    }
    at[l] = staged[l];
    const int first = w.whole ? 0 : w.first[l], last = w.whole ? kSteps : w.last[l];
    if (first == 0 && last == kSteps) {
      for (int t = 0; t < kSteps; ++t) staged[l][t] = one_float(x[t]);
    } else {
      std::memset(staged[l], 0, sizeof staged[l]);
      for (int t = first; t < last; ++t) staged[l][t] = one_float(x[t]);
    }
  }
  turn(at, to);
}

// Tokens of a row that are taken, or written, at a time.
constexpr int kHeld = 128;

// Whole tiles of float32 rows. What lies in a cache is taken kHeld tokens of a row at a time: rows that lie a power of two apart
// share a few sets of the L1, where lines that are taken in turn drive each other out (a fifth faster at [64, 1024]). From memory
// that is a fifth slower: fewer lines are on their way at a time.
class Reader {
public:
  Column<const float> from;

  void load(const Window& w, Tile* to) {
    const int64_t at = w.at - low_;
    if (!w.whole || ((at < 0 || at >= kHeld) && w.left < kHeld / kSteps)) return load_tile(from, w, to);
    if (at < 0 || at >= kHeld) hold(w);
    const float* rows[kRows];
    for (int l = 0; l < kRows; ++l) {
      rows[l] = x_[l] + (w.at - low_);
      prefetch(from.from[l] + w.at + w.ahead);
    }
    turn(rows, to);
  }

private:
  int64_t low_ = INT64_MAX / 2;
  alignas(64) float x_[kRows][kHeld + kSteps];  // and these rows do not lie a power of two apart

  void hold(const Window& w) {
    low_ = w.ahead < 0 ? w.at + kSteps - kHeld : w.at;
    for (int l = 0; l < kRows; ++l) {
      const float* row = from.from[l] + low_;
      for (int t = 0; t < kHeld; t += kRows) store_rows(x_[l] + t, load_rows(row + t));
    }
  }
};

// Tiles on their way back to their rows. Whole tiles are gathered until a row has kHeld tokens, and go out a row at a time: rows
// that lie a power of two apart share a few sets of the L1, where 16 lines written in turn would drive each other out.
class Writer {
public:
  void place(float* out, int lane, int64_t at) { to_.from[lane] = out ? out + at : nullptr; }
  bool wanted() const { return to_.from[0] != nullptr; }

  void write(const Tile& from, const Window& w, bool streamed) {
    if (!w.whole) {
      flush(streamed);
      return write_part(from, w);
    }
    if (held_ == 0) first_ = w.at;
    // upwards or downwards in time, from the middle of the buffer
    turn_back(from, static_cast<int>(w.at - first_) + kHeld - kSteps);
    low_ = std::min(first_, w.at);
    held_ += kSteps;
    if (held_ == kHeld) flush(streamed);
  }

  void flush(bool streamed) {
    for (int l = 0; held_ && l < kRows; ++l) {
      float* to = to_.from[l] + low_;
      const float* from = x_[l] + (low_ - first_) + kHeld - kSteps;
      if (streamed && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
        for (int t = 0; t < held_; t += kRows) stream_rows(to + t, load_rows(from + t));
      } else {
        for (int t = 0; t < held_; t += kRows) store_rows(to + t, load_rows(from + t));
      }
    }
    held_ = 0;
  }

private:
  Column<float> to_;
  int held_ = 0;
  int64_t first_ = 0, low_ = 0;
  alignas(64) float x_[kRows][2 * kHeld - kSteps];  // and these rows do not lie a power of two apart

  void turn_back(const Tile& from, int at) {
    for (int t = 0; t < kSteps; t += kRows) {
      R x[kRows];
#pragma GCC unroll 8
      for (int l = 0; l < kRows; ++l) x[l] = load_rows(from.x[t + l]);
      transpose(x);
#pragma GCC unroll 8
      for (int l = 0; l < kRows; ++l) store_rows(x_[l] + at + t, x[l]);
    }
  }

  void write_part(const Tile& from, const Window& w) {
    turn_back(from, 0);
    for (int l = 0; l < kRows; ++l)
      for (int t = w.first[l]; t < w.last[l]; ++t) to_.from[l][w.at + t] = x_[l][t];
  }
};

// Whether all flags of a whole tile are 1.
inline bool all_set(const Column<const uint8_t>& c, const Window& w) {
  uint64_t both = ~0ull;
  for (int l = 0; l < kRows; ++l) {
    uint64_t x[2];
    std::memcpy(x, c.from[l] + w.at, sizeof x);
    both &= x[0] & x[1];
  }
  return both == 0x0101010101010101u;
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
