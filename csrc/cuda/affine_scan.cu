// affine_scan on a GPU: a block a row, 1024 tokens at a time, in float64.
//
// A thread composes the affine maps of four tokens, (a, b)∘(a′, b′) = (a·a′, b + a·b′), a warp those of its threads by shuffles,
// and the warps' maps meet in shared memory; then each thread goes through its four tokens with the state before them. The tokens
// of a row are counted from where the recurrence starts, from the first valid one on, so that the padding changes no bits.
// A row of more than kRowSegment tokens is scanned in segments, each a map G = P·carry + Q of what comes before it:
//   many rows: a block a row, segment after segment: one launch;
//   few long rows: a block a segment, first its map, then with its carry the outputs: two launches, the same bits. Of packed rows
//   only the mean length is known: they are long where it is more than a segment.
// Whitened, a block adds up the moments of its segments on the way; two small launches more (scan_whiten.cuh).
// Bytes: 17 a token for GAE (r, V and a byte of mask read, two outputs written), 26 where rows are split, 9 more where whitened.
// Not yet measured on a GPU.
#include "affine_scan.h"

#include "launch.cuh"
#include "scan_whiten.cuh"

namespace rlfast::cuda {

namespace {

constexpr int kScanThreads = 256, kScanWarps = kScanThreads / kWarp, kEach = 4;
constexpr int64_t kTile = kScanThreads * kEach;
constexpr int64_t kRowSegment = 16384;  // a multiple of kTile
constexpr int kMap = 4;                 // numbers of a segment's map: P and Q for one or two λ

struct Scan {
  ScanIn in;
  ScanOut out;
  Places places;
  double* maps;     // [places, kMap], or null: a block takes whole rows
  double* moments;  // [places, kMoments] of the advantages, or null
  int64_t programs;
  bool only_maps;
};

struct Map {
  double p, q;
};

// First `a`, then `b`.
RLFAST_DEVICE Map then(const Map& a, const Map& b) { return {a.p * b.p, b.q + b.p * a.q}; }

// What a map makes of a state. A product of 0 says that an episode began: what was there before is forgotten.
RLFAST_DEVICE double state_of(const Map& m, double carry) { return m.p == 0.0 ? m.q : m.q + m.p * carry; }

RLFAST_DEVICE double number(const TokenInput& x, int64_t at) {
  switch (x.dtype) {
    case DType::f32:
      return static_cast<const float*>(x.data)[at];
    case DType::bf16:
      return BF16::to_float(static_cast<const uint16_t*>(x.data)[at]);
    case DType::f16:
      return F16::to_float(static_cast<const uint16_t*>(x.data)[at]);
  }
  return 0.0;
}

// One row: where its tokens lie in each tensor.
struct Row {
  const ScanIn& in;
  int64_t row, length, first, anchor;

  RLFAST_DEVICE int64_t token(int64_t j) const { return in.reverse ? length - 1 - j : j; }
  RLFAST_DEVICE double at(const TokenInput& x, int64_t t) const { return number(x, in.begin(row, x.stride) + t); }
  RLFAST_DEVICE bool flag(const TokenFlags& x, int64_t t) const { return x.data[in.begin(row, x.stride) + t] != 0; }
  RLFAST_DEVICE bool valid(int64_t t) const { return !in.mask.data || flag(in.mask, t); }
  RLFAST_DEVICE double rate(const Rate& r, int64_t t) const {
    return !r.data ? r.one : r.data[r.by_token ? in.begin(row, in.steps) + t : row];
  }
  // V of the last valid token before the j-th; with masking "zero" of the one before it.
  RLFAST_DEVICE double value_before(int64_t j) const {
    if (!in.values.data) return 0.0;
    int64_t k = j - 1;
    while (!in.zero && k > first && !valid(token(k))) --k;
    return valid(token(k)) ? at(in.values, token(k)) : 0.0;
  }
};

// What the recurrence does at one token: the state before it is V' and G', after it p·G' + q.
struct Step {
  bool there, valid;
  double value, ahead, delta, ratio, later, goes_on;
  Map map[2];
};

RLFAST_DEVICE double clipped(double ratio, double clip) { return ratio > clip ? clip : ratio; }

RLFAST_DEVICE Step step_of(const Row& r, int64_t j, int64_t high, double ahead) {
  const ScanIn& in = r.in;
  Step s = {j < high, false, 0.0, ahead, 0.0, 1.0, 0.0, 1.0, {{1.0, 0.0}, {1.0, 0.0}}};
  if (!s.there) return s;
  const int64_t t = r.token(j);
  s.valid = r.valid(t);
  if (s.valid && in.values.data) s.value = r.at(in.values, t);
  double reward = 0.0;
  if (s.valid) {
    if (in.rewards.data) reward = r.at(in.rewards, t);
    if (in.row_rewards && j == r.first) reward += in.row_rewards[r.row];
    if (in.kl.data) reward -= in.kl_coef * r.at(in.kl, t);
    const bool cut = (in.next_values.data && j == r.first) || (in.truncated.data && r.flag(in.truncated, t));
    if (cut) s.goes_on = 0.0, s.ahead = in.next_values.data ? r.at(in.next_values, t) : 0.0;
    if (in.done.data && r.flag(in.done, t)) s.goes_on = 0.0, s.ahead = 0.0;
  }
  if (!s.valid && !in.zero) return s;
  if (in.coefficients.data) {
    s.map[0] = s.map[1] = {r.at(in.coefficients, t), reward};
    return s;
  }
  const double gamma = r.rate(in.gamma, t), lam = r.rate(in.lam, t);
  s.later = gamma * lam;
  s.delta = reward + gamma * s.ahead - s.value;
  if (in.vtrace) {
    if (s.valid) s.ratio = exp(r.at(in.log_ratio, t));
    const double a = s.later * clipped(s.ratio, in.clip_c) * s.goes_on;
    s.map[0] = {a, s.value + clipped(s.ratio, in.clip_rho) * s.delta - a * s.ahead};
    return s;
  }
  for (int c = 0; c < 2; ++c) {
    const double later = gamma * (c && in.decoupled ? r.rate(in.critic_lam, t) : lam) * s.goes_on;
    s.map[c] = {later, reward + (gamma - later) * s.ahead};
  }
  return s;
}

// What a block shares of a tile.
struct Shared {
  double value[kScanWarps], p[2][kScanWarps], q[2][kScanWarps];
  int there[kScanWarps];
  Map last[2];
  double ahead;
};

// The j of the first valid token, or the length of the row.
RLFAST_DEVICE int64_t first_valid(const Row& r, Shared* shared) {
  if (!r.in.mask.data) return 0;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t base = 0; base < r.length; base += kScanThreads) {
    const int64_t j = base + threadIdx.x;
    const unsigned votes = __ballot_sync(kAllLanes, j < r.length && r.valid(r.token(j)));
    if (lane == 0) shared->there[warp] = __ffs(votes);
    const bool found = __syncthreads_or(votes != 0);
    int64_t first = r.length;
    for (int w = kScanWarps - 1; w >= 0; --w)
      if (shared->there[w]) first = base + w * kWarp + shared->there[w] - 1;
    __syncthreads();
    if (found) return first;
  }
  return r.length;
}

// V' of each thread's first token: the last valid value among the threads before it, else what went before the tile.
RLFAST_DEVICE double value_ahead(bool has, double value, double before, Shared* shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double there = has ? 1.0 : 0.0;
  for (int d = 1; d < kWarp; d <<= 1) {
    const double other = __shfl_up_sync(kAllLanes, value, d), other_there = __shfl_up_sync(kAllLanes, there, d);
    if (lane >= d && there == 0.0) value = other, there = other_there;
  }
  if (lane == kWarp - 1) shared->value[warp] = value, shared->there[warp] = there != 0.0;
  double near = __shfl_up_sync(kAllLanes, value, 1), near_there = __shfl_up_sync(kAllLanes, there, 1);
  __syncthreads();
  for (int w = 0; w < warp; ++w)
    if (shared->there[w]) before = shared->value[w];
  if (lane == 0) near_there = 0.0;
  return near_there != 0.0 ? near : before;
}

// The map of all threads before this one in the tile.
RLFAST_DEVICE Map map_before(Map m, int c, Shared* shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int d = 1; d < kWarp; d <<= 1) {
    const Map other = {__shfl_up_sync(kAllLanes, m.p, d), __shfl_up_sync(kAllLanes, m.q, d)};
    if (lane >= d) m = then(other, m);
  }
  if (lane == kWarp - 1) shared->p[c][warp] = m.p, shared->q[c][warp] = m.q;
  Map near = {__shfl_up_sync(kAllLanes, m.p, 1), __shfl_up_sync(kAllLanes, m.q, 1)};
  if (lane == 0) near = {1.0, 0.0};
  __syncthreads();
  Map before = {1.0, 0.0};
  for (int w = 0; w < warp; ++w) before = then(before, {shared->p[c][w], shared->q[c][w]});
  return then(before, near);
}

// Returns the advantage.
RLFAST_DEVICE float write(const Scan& f, const Row& r, int64_t j, const Step& s, double before, double after,
                          double last) {
  const ScanIn& in = f.in;
  const int64_t at = in.begin(r.row, in.steps) + r.token(j);
  double advantage = after - s.value;
  if (in.vtrace) advantage = clipped(s.ratio, in.clip_pg) * (s.delta + s.later * s.goes_on * (before - s.ahead));
  const bool shown = s.valid || in.coefficients.data;
  if (f.out.advantages) f.out.advantages[at] = shown ? float(advantage) : 0.0f;
  if (f.out.returns) f.out.returns[at] = shown ? float(last) : 0.0f;
  return float(advantage);
}

// Tokens [base, base + kTile) of a row, whose state before them is segment[c] of carry[c].
template <bool kWhitened>
RLFAST_DEVICE void tile(const Scan& f, const Row& r, int64_t base, int64_t high, double* ahead, Map* segment,
                        const double* carry, Sums* sums, Shared* shared) {
  const ScanIn& in = f.in;
  const int chains = in.decoupled ? 2 : 1;
  const int64_t j = base + int64_t(threadIdx.x) * kEach;
  bool has = false;
  double value = 0.0;
  for (int i = 0; i < kEach; ++i) {
    if (j + i >= high) continue;
    const bool valid = r.valid(r.token(j + i));
    if (!valid && !in.zero) continue;
    has = true, value = valid && in.values.data ? r.at(in.values, r.token(j + i)) : 0.0;
  }
  double v = value_ahead(has, value, *ahead, shared);
  Step s[kEach];
  Map own[2] = {{1.0, 0.0}, {1.0, 0.0}};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    s[i] = step_of(r, j + i, high, v);
    if (s[i].there && (s[i].valid || in.zero)) v = s[i].value;
    for (int c = 0; c < chains; ++c) own[c] = then(own[c], s[i].map[c]);
  }
  Map m[2];
  for (int c = 0; c < chains; ++c) m[c] = then(segment[c], map_before(own[c], c, shared));
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const double before = state_of(m[0], carry[0]);
    for (int c = 0; c < chains; ++c) m[c] = then(m[c], s[i].map[c]);
    const double after = state_of(m[0], carry[0]);
    if (!s[i].there || f.only_maps) continue;
    const float advantage = write(f, r, j + i, s[i], before, after, chains == 2 ? state_of(m[1], carry[1]) : after);
    if (kWhitened && s[i].valid) sums->add(advantage);
  }
  if (threadIdx.x == kScanThreads - 1) {
    for (int c = 0; c < chains; ++c) shared->last[c] = m[c];
    shared->ahead = v;
  }
  __syncthreads();
  for (int c = 0; c < chains; ++c) segment[c] = shared->last[c];
  *ahead = shared->ahead;
  __syncthreads();
}

RLFAST_DEVICE void outside(const Scan& f, const Row& r, double start) {
  const float x = f.in.coefficients.data ? float(start) : 0.0f;
  for (int64_t j = threadIdx.x; j < r.anchor; j += kScanThreads) {
    const int64_t at = f.in.begin(r.row, f.in.steps) + r.token(j);
    if (f.out.advantages) f.out.advantages[at] = x;
    if (f.out.returns) f.out.returns[at] = x;
  }
}

template <bool kWhitened>
RLFAST_DEVICE void scan_row(const Scan& f, int64_t row, int64_t part, Shared* shared) {
  const ScanIn& in = f.in;
  Row r = {in, row, in.length(row), 0, 0};
  r.first = first_valid(r, shared);
  // with masking "zero" a value from beyond is discounted by what follows the last valid token
  r.anchor = in.zero && (in.bootstrap || in.next_values.data) ? 0 : r.first;
  const double start = in.bootstrap ? in.bootstrap[row] : 0.0;
  int64_t low = r.anchor, high = r.length;
  double carry[2] = {start, start}, ahead = in.coefficients.data ? 0.0 : start;
  if (f.maps) {
    low += part * kRowSegment;
    high = min(r.length, low + kRowSegment);
    if (part > 0 && low < r.length) ahead = r.value_before(low);
    for (int64_t k = 0; k < part && !f.only_maps; ++k) {
      const double* m = f.maps + (f.places.begin(row) + k) * kMap;
      for (int c = 0; c < 2; ++c) carry[c] = state_of({m[2 * c], m[2 * c + 1]}, carry[c]);
    }
  }
  if (part == 0 && !f.only_maps) outside(f, r, start);
  Map segment[2] = {{1.0, 0.0}, {1.0, 0.0}};
  Sums sums;
  int64_t place = f.places.begin(row) + part;
  for (int64_t base = low; base < high; base += kTile) {
    if (!f.maps && base > low && (base - low) % kRowSegment == 0) {
      for (int c = 0; c < 2; ++c) carry[c] = state_of(segment[c], carry[c]), segment[c] = {1.0, 0.0};
      if (kWhitened) put(f.moments, place++, together(sums.moments())), sums = {};
    }
    tile<kWhitened>(f, r, base, high, &ahead, segment, carry, &sums, shared);
  }
  if (kWhitened && !f.only_maps) {
    put(f.moments, place++, together(sums.moments()));
    // the places of segments that the row does not have
    for (; !f.maps && place < f.places.begin(row + 1); ++place) put(f.moments, place, {0.0, 0.0, 0.0});
  }
  if (f.only_maps && threadIdx.x == 0) {
    double* m = f.maps + place * kMap;
    for (int c = 0; c < 2; ++c) m[2 * c] = segment[c].p, m[2 * c + 1] = segment[c].q;
  }
}

template <bool kWhitened>
__global__ void __launch_bounds__(kScanThreads) scan_kernel(Scan f) {
  RLFAST_SHARED(Shared, block);  // what block_total has there comes after a barrier
  for (int64_t i = blockIdx.x; i < f.programs; i += gridDim.x) {
    const int64_t row = f.maps ? f.places.row_of(i) : i;
    scan_row<kWhitened>(f, row, f.maps ? i - f.places.begin(row) : 0, block);
    __syncthreads();
  }
}

// What a call has room for: maps, moments, sums of rows.
struct Scratch {
  int64_t places, maps, moments, sums;
};

Scratch scratch_of(int64_t rows, int64_t longest, bool packed, bool whiten, int device) {
  const int64_t places = packed ? rows + longest / kRowSegment : rows * ceil_div(longest, kRowSegment);
  const int64_t tokens = packed ? longest : rows * longest;
  const bool split = tokens > rows * kRowSegment && rows < busy_blocks(device);
  return {places, split ? places * kMap : 0, whiten ? places * kMoments : 0,
          whiten ? ceil_div(rows, kLossThreads) * kMoments : 0};
}

}  // namespace

int64_t affine_scan_scratch(int64_t rows, int64_t longest, bool packed, bool whiten, int device) {
  const Scratch s = scratch_of(rows, longest, packed, whiten, device);
  return s.maps + s.moments + s.sums;
}

void affine_scan(const ScanIn& in, const ScanOut& out, const Whiten& whiten, int64_t longest, double* scratch,
                 int device, void* stream) {
  const int64_t size = in.cu ? longest : in.rows * in.steps;
  if (in.rows == 0 || size == 0) return;
  OnDevice guard(device);
  const Scratch room = scratch_of(in.rows, longest, in.cu != nullptr, whiten.on, device);
  const Places places = {in.cu, in.rows, kRowSegment, ceil_div(in.steps, kRowSegment)};
  double* moments = scratch + room.maps;
  Scan f = {in,
            out,
            places,
            room.maps ? scratch : nullptr,
            whiten.on ? moments : nullptr,
            room.maps ? room.places : in.rows,
            false};
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  const size_t shared = std::max(sizeof(Shared), shared_bytes(2));
  const int grid = int(std::min(f.programs, kMaxGrid));
  if (room.maps) {
    f.only_maps = true;
    RLFAST_LAUNCH(scan_kernel<false>, grid, kScanThreads, shared, s, f);
    check(cudaGetLastError(), "affine_scan maps");
    f.only_maps = false;
  }
  if (!whiten.on) {
    RLFAST_LAUNCH(scan_kernel<false>, grid, kScanThreads, shared, s, f);
    return check(cudaGetLastError(), "affine_scan");
  }
  RLFAST_LAUNCH(scan_kernel<true>, grid, kScanThreads, shared, s, f);
  check(cudaGetLastError(), "affine_scan, moments");
  const Whitening w = {in, out.advantages, whiten, places, moments, moments + room.moments, size};
  const int blocks = int(std::min(ceil_div(in.rows, kLossThreads), kMaxGrid));
  RLFAST_LAUNCH(add_rows, blocks, kLossThreads, shared_bytes(2), s, w);
  const int most = int(std::max<int64_t>(busy_blocks(device), 1));
  RLFAST_LAUNCH(whiten_tokens, int(std::min<int64_t>(ceil_div(size, kLossThreads * kEach), most)), kLossThreads,
                shared_bytes(2), s, w);
  check(cudaGetLastError(), "affine_scan, whitening");
}

}  // namespace rlfast::cuda
