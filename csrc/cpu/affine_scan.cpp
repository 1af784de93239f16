// affine_scan on the CPU: one read of the inputs, one write of the outputs.
//
// A vector holds one token of each of kRows rows, and goes through time as the recurrence does: the bits of a row are those of
// the plain loop in float64, rounded once, whatever the padding, the rows beside it and the threads. Tiles of 16 tokens are
// turned in registers on their way in and out, which costs one shuffle a token; a scan along the row would take three steps of
// products, and would group its sums by where the padding ends. Rows are taken in the order of their lengths, so that the rows
// of a vector end together.
//
// A row of more than kScanSegment valid tokens is scanned in segments, each an affine map G = P·carry + Q of what comes after it.
// Where rows are few, the segments are the lanes: a first pass finds their maps, a second knows their carries.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "scan_steps.h"
#include "scan_whiten.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

namespace {

// Below so many tokens a second thread costs more than it saves.
constexpr int64_t kSerialTokens = 1 << 13;
// Outputs beyond the last-level cache of a small machine are written past the caches: it saves the read before a write.
constexpr int64_t kStreamedTokens = 1 << 20;

const uint8_t* flags_of(const ScanIn& in, const TokenFlags& x, int64_t row) {
  return x.data ? x.data + in.begin(row, x.stride) : nullptr;
}

// [low, high): from the first to the last valid token of a row; what lies outside leaves no trace in the recurrence.
Span span_of(const ScanIn& in, int64_t row) {
  Span s{row, 0, in.length(row), 0, 0};
  const uint8_t* mask = flags_of(in, in.mask, row);
  while (mask && s.low < s.high && !mask[s.low]) ++s.low;
  int64_t end = s.high;
  while (mask && s.low < end && !mask[end - 1]) --end;
  s.first = in.reverse ? end - 1 : s.low;
  // with masking "zero" a bootstrap value is discounted by what follows the last valid token
  if (!in.zero || !(in.bootstrap || in.next_values.data)) s.high = end;
  return s;
}

void zero_outside(const ScanIn& in, const Span& s, float* out) {
  if (!out) return;
  float* row = out + in.begin(s.row, in.steps);
  std::memset(row, 0, static_cast<size_t>(s.low) * sizeof(float));
  std::memset(row + s.high, 0, static_cast<size_t>(in.length(s.row) - s.high) * sizeof(float));
}

// The bare scan holds its state at masked tokens, before and after the valid ones too.
void hold_outside(const ScanIn& in, const Span& s, float* out) {
  float* row = out + in.begin(s.row, in.steps);
  const int64_t length = in.length(s.row);
  const float start = in.bootstrap ? static_cast<float>(in.bootstrap[s.row]) : 0.0f;
  const float before = s.low == s.high || !in.reverse ? start : row[s.low];
  const float after = s.low == s.high || in.reverse ? start : row[s.high - 1];
  std::fill(row, row + s.low, before);
  std::fill(row + s.high, row + length, after);
}

// Longest first, by counting tiles: rows of one length keep their order.
std::vector<Span> by_length(std::vector<Span> spans) {
  constexpr int64_t kBins = 4096;
  const auto bin = [](const Span& s) { return kBins - 1 - std::min((s.high - s.low) / kSteps, kBins - 1); };
  std::vector<int64_t> start(kBins + 1, 0);
  bool sorted = true;
  for (size_t i = 0; i < spans.size(); ++i) {
    ++start[bin(spans[i]) + 1];
    sorted = sorted && (i == 0 || bin(spans[i - 1]) <= bin(spans[i]));
  }
  if (sorted) return spans;
  for (int64_t i = 0; i < kBins; ++i) start[i + 1] += start[i];
  std::vector<Span> out(spans.size());
  for (const Span& s : spans) out[start[bin(s)]++] = s;
  return out;
}

void run(const ScanIn& in, const ScanOut& out, const std::vector<Span>& spans, Pass pass, bool streamed,
         std::vector<Map>* maps, int threads) {
  const int64_t n = static_cast<int64_t>(spans.size());
  const int64_t width = std::clamp<int64_t>((n + threads - 1) / threads, 1, kRows), groups = (n + width - 1) / width;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t from = i * width;
      scan_group(in, out, &spans[from], static_cast<int>(std::min(width, n - from)), pass, streamed,
                 maps ? &(*maps)[from] : nullptr);
    }
    if (streamed) stream_fence();
  }
}

// The segments of one row, from where the recurrence starts.
void split(const ScanIn& in, const Span& s, std::vector<Span>* to) {
  const uint8_t* mask = flags_of(in, in.mask, s.row);
  const auto valid = [&](int64_t t) { return in.zero || !mask || mask[t]; };
  int64_t at = in.reverse ? s.high : s.low, index = 0;
  const int64_t end = in.reverse ? s.low : s.high;
  while (at != end) {
    int64_t from = at;
    for (int64_t left = kScanSegment; left > 0 && at != end;) {
      left -= valid(in.reverse ? at - 1 : at);
      at += in.reverse ? -1 : 1;
    }
    to->push_back({s.row, std::min(from, at), std::max(from, at), index++, s.first});
  }
}

// Few long rows: the maps of all segments, then their carries, then the outputs.
void run_split(const ScanIn& in, const ScanOut& out, const std::vector<Span>& rows, bool streamed, int threads) {
  std::vector<Span> spans;
  for (const Span& s : rows) split(in, s, &spans);
  std::vector<Map> maps(spans.size());
  run(in, out, spans, Pass::maps, false, &maps, threads);
  Map carry[1];
  for (size_t i = 0; i < spans.size(); ++i) {
    if (spans[i].segment == 0) carry[0] = {};
    const Map here = maps[i];
    maps[i] = carry[0];
    for (int c = 0; c < 2; ++c) carry[0].q[c] = after_segment(here.p[c], carry[0].q[c], here.q[c]);
  }
  run(in, out, spans, Pass::outputs, streamed, &maps, threads);
}

}  // namespace

void affine_scan(const ScanIn& in, const ScanOut& out, const Whiten& whiten, int threads) {
  std::vector<Span> spans(static_cast<size_t>(in.rows));
  int64_t tokens = 0, longest = 0;
  for (int64_t row = 0; row < in.rows; ++row) tokens += in.length(row);
  if (tokens < kSerialTokens) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : longest) if (threads > 1 && in.mask.data)
  for (int64_t row = 0; row < in.rows; ++row) {
    spans[row] = span_of(in, row);
    longest = std::max(longest, spans[row].high - spans[row].low);
    if (in.coefficients.data) continue;
    zero_outside(in, spans[row], out.advantages);
    zero_outside(in, spans[row], out.returns);
  }
  const bool streamed = tokens >= kStreamedTokens && !whiten.on;
  if (longest > kScanSegment && in.rows <= kRows * threads / 2) {
    run_split(in, out, spans, streamed, threads);
  } else {
    run(in, out, by_length(spans), Pass::whole, streamed, nullptr, threads);
  }
  if (in.coefficients.data) {
    for (const Span& s : spans) hold_outside(in, s, out.returns);
  }
  if (whiten.on) whiten_rows(in, out.advantages, whiten, threads);
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
