// group_advantage on the CPU: the samples of a group are gathered into float64, and everything about them is said at once.
#include "../rlfast/group_advantage.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "../rlfast/vec.h"
#include "kernels.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

namespace {

// Below so many samples a second thread costs more than it saves.
constexpr int64_t kSerialSamples = 1 << 13;

// Samples in the order of their groups; group g is order[start[g], start[g + 1]).
struct Groups {
  std::vector<int64_t> order, start;
  int64_t count() const { return static_cast<int64_t>(start.size()) - 1; }
};

// A counting sort where ids are dense, a stable sort of indices where they are not: the samples of a group keep their order.
Groups by_id(const int64_t* ids, int64_t n) {
  Groups g;
  g.order.resize(static_cast<size_t>(n));
  const auto ends = std::minmax_element(ids, ids + n);
  const int64_t low = n ? *ends.first : 0;
  const uint64_t range = n ? static_cast<uint64_t>(*ends.second) - static_cast<uint64_t>(low) + 1 : 0;
  if (range && range <= static_cast<uint64_t>(4 * n + 1024)) {
    std::vector<int64_t> at(range + 1, 0);
    for (int64_t i = 0; i < n; ++i) ++at[ids[i] - low + 1];
    for (uint64_t k = 0; k < range; ++k) {
      if (at[k + 1]) g.start.push_back(at[k]);
      at[k + 1] += at[k];
    }
    for (int64_t i = 0; i < n; ++i) g.order[at[ids[i] - low]++] = i;
  } else {
    std::iota(g.order.begin(), g.order.end(), 0);
    std::stable_sort(g.order.begin(), g.order.end(), [ids](int64_t a, int64_t b) { return ids[a] < ids[b]; });
    for (int64_t i = 0; i < n; ++i)
      if (i == 0 || ids[g.order[i]] != ids[g.order[i - 1]]) g.start.push_back(i);
  }
  g.start.push_back(n);
  return g;
}

double reward_at(const GroupIn& in, int64_t i) {
  switch (in.dtype) {
    case DType::f32:
      return static_cast<const float*>(in.rewards)[i];
    case DType::bf16:
      return to_float(static_cast<const bf16*>(in.rewards)[i]);
    case DType::f16:
      return to_float(static_cast<const f16*>(in.rewards)[i]);
  }
  return 0.0;
}

// The valid samples of one group.
struct Members {
  std::vector<int64_t> index;
  std::vector<double> r;
  double mean = 0.0, squares = 0.0, low = 0.0, high = 0.0;
  int64_t n() const { return static_cast<int64_t>(r.size()); }

  void sum_up() {
    double sum = 0.0;
    low = high = r[0];
    for (double x : r) {
      sum += x;
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    mean = sum / static_cast<double>(n());
    squares = 0.0;
    for (double x : r) squares += (x - mean) * (x - mean);
  }
  bool equal() const { return low == high; }
  double std(bool bessel) const {
    const double degrees = static_cast<double>(n() - (bessel ? 1 : 0));
    return degrees > 0.0 ? std::sqrt(squares / degrees) : 0.0;
  }
  // Of the group without its k-th sample: Σ_{j≠k}(r_j − mean')² = Σ(r − mean)² − (r_k − mean)²·n/(n − 1); of equal ones 0,
  // not what rounding leaves of it.
  double others_std(int64_t k, bool bessel) const {
    const double degrees = static_cast<double>(n() - (bessel ? 2 : 1)), d = r[k] - mean;
    if (degrees <= 0.0 || equal_without(k)) return 0.0;
    const double left = squares - d * d * static_cast<double>(n()) / static_cast<double>(n() - 1);
    return std::sqrt(std::max(left, 0.0) / degrees);
  }
  bool equal_without(int64_t k) const {
    const double other = r[k == 0 ? 1 : 0];
    if (equal()) return true;
    if (r[k] != low && r[k] != high) return false;
    for (int64_t j = 0; j < n(); ++j)
      if (j != k && r[j] != other) return false;
    return true;
  }
};

// b of every sample alike; leave-one-out and second take it from there.
double shared_baseline(const GroupIn& in, const GroupOptions& o, const Members& m) {
  if (o.baseline == Baseline::weighted) {
    double sum = 0.0, weight = 0.0;
    for (int64_t k = 0; k < m.n(); ++k) {
      sum += in.weights[m.index[k]] * m.r[k];
      weight += in.weights[m.index[k]];
    }
    return sum / weight;
  }
  if (o.baseline == Baseline::soft) {
    double sum = 0.0;
    for (double x : m.r) sum += std::exp((x - m.high) / o.tau);
    return m.high + o.tau * std::log(sum / static_cast<double>(m.n()));
  }
  return m.mean;
}

double divisor(const GroupOptions& o, double std) { return o.skip_zero && std == 0.0 ? 1.0 : std + o.eps; }

// Only the first of the best gets r − the second largest.
void write_best(const GroupOptions& o, const Members& m, double std, float* out) {
  int64_t best = 0;
  for (int64_t k = 1; k < m.n(); ++k) best = m.r[k] > m.r[best] ? k : best;
  double second = -std::numeric_limits<double>::infinity();
  for (int64_t k = 0; k < m.n(); ++k) second = k != best && m.r[k] > second ? m.r[k] : second;
  for (int64_t k = 0; k < m.n(); ++k) {
    const double s = o.scale == Scale::none ? 1.0 : divisor(o, o.scale == Scale::std ? std : m.others_std(k, o.bessel));
    out[m.index[k]] = k == best ? static_cast<float>((m.r[k] - second) / s) : 0.0f;
  }
}

void write_group(const GroupIn& in, const GroupOptions& o, const Members& m, double std, float* out) {
  const double n = static_cast<double>(m.n());
  if (m.n() == 1) {
    const double s = o.scale == Scale::none ? 1.0 : 1.0 + o.eps;
    out[m.index[0]] = o.lone_raw ? static_cast<float>(m.r[0] / s) : 0.0f;
    return;
  }
  if (o.baseline == Baseline::second) return write_best(o, m, std, out);
  const double b = shared_baseline(in, o, m);
  const double s = o.scale == Scale::none ? 1.0 : divisor(o, std);
  for (int64_t k = 0; k < m.n(); ++k) {
    const double from = o.baseline == Baseline::leave_one_out ? (n * m.mean - m.r[k]) / (n - 1.0) : b;
    const double by = o.scale == Scale::others_std ? divisor(o, m.others_std(k, o.bessel)) : s;
    out[m.index[k]] = static_cast<float>((m.r[k] - from) / by);
  }
}

}  // namespace

void group_advantage(const GroupIn& in, const GroupOptions& o, const GroupOut& out, int threads) {
  Groups g;
  if (in.ids) g = by_id(in.ids, in.samples);
  const int64_t count = in.ids ? g.count() : in.samples / in.size;
  std::vector<double> by_group(static_cast<size_t>(4 * count));
  if (in.samples < kSerialSamples) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Members m;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = in.ids ? g.start[i] : i * in.size, to = in.ids ? g.start[i + 1] : from + in.size;
      m.index.clear(), m.r.clear();
      for (int64_t j = from; j < to; ++j) {
        const int64_t sample = in.ids ? g.order[j] : j;
        out.advantages[sample] = 0.0f;
        if (in.mask && !in.mask[sample]) continue;
        m.index.push_back(sample), m.r.push_back(reward_at(in, sample));
      }
      double* s = &by_group[4 * i];
      s[0] = s[1] = s[2] = s[3] = 0.0;
      if (m.n() == 0) continue;
      m.sum_up();
      const double std = m.std(o.bessel);
      s[0] = 1.0, s[1] = m.equal(), s[2] = m.mean, s[3] = std;
      write_group(in, o, m, std, out.advantages);
    }
  }
  for (int k = 0; k < 4; ++k) out.statistics[k] = 0.0;
  for (int64_t i = 0; i < 4 * count; ++i) out.statistics[i % 4] += by_group[i];
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
