// ranked_loss in double precision by its definition: groups of every size on either side of a vector, padded with garbage
// under the mask, and packed; the gradient by central differences.
#include "../cpu/kernels.h"
#include "oracle.h"

namespace rlfast::tests {

namespace {

using Numbers = std::vector<double>;

double log_sum(const Numbers& z) {
  double peak = -kInfinity, sum = 0;
  for (double v : z) peak = std::fmax(peak, v);
  for (double v : z) sum += std::exp(v - peak);
  return peak + std::log(sum);
}

double softplus(double z) { return std::fmax(z, 0) + std::log1p(std::exp(-std::fabs(z))); }

// The loss of one group whose candidates are in order, the best first.
double value_of(const std::string& form, const Numbers& x, const Numbers& r, double tau, double top) {
  const size_t n = x.size();
  double value = 0, pairs = 0;
  Numbers scaled;
  for (double v : r) scaled.push_back(v / tau);
  const double x_sum = log_sum(x), r_sum = log_sum(scaled);
  for (size_t i = 0; i < n; ++i) {
    const double log_p = x[i] - x_sum, log_q = scaled[i] - r_sum, q = std::exp(log_q);
    Numbers z{form == "pro" ? x[i] * (r[i] - r[n - 1]) : x[i]};
    for (size_t j = i + 1; j < n; ++j) {
      z.push_back(form == "pro" ? x[j] * (r[i] - r[j]) : x[j]);
      if (r[i] <= r[j]) continue;
      pairs += 1;
      if (form == "bradley_terry") value += softplus(x[j] - x[i]);
      if (form == "hinge") value += std::fmax(x[j] - x[i], 0);
    }
    if ((form == "pro" || form == "plackett_luce") && double(i) < top) value += log_sum(z) - z[0];
    if (form == "reverse_kl") value += std::exp(log_p) * (log_p - log_q);
    if (form == "cross_entropy") value -= q * log_p;
    if (form == "nca") value += q * softplus(-x[i]) + softplus(x[i]) / double(n);
  }
  return form == "bradley_terry" ? value / std::fmax(pairs, 1) : value;
}

// Some groups, most of them of `size` candidates or fewer, in buffers of exact size.
struct RankedCase {
  int64_t rows, size;
  bool packed;
  std::vector<int64_t> cu{0};
  Exact<float> scores, ref_scores, rewards, divisor, weights, d_scores, losses;
  Exact<uint8_t> mask;
  float loss = kNaN, num_items = 3;
  RankedMetrics metrics{};
  RankedCall call{"", 0, 0.7f, 0.9f, 5.0f, 0.3f, 1.0f, 2.0f};

  static int64_t length_of(int64_t row, int64_t size, bool packed) {
    return packed ? (row * 5 + 1) % (size + 1) : size;
  }
  static int64_t total(int64_t rows, int64_t size, bool packed) {
    int64_t n = 0;
    for (int64_t r = 0; r < rows; ++r) n += length_of(r, size, packed);
    return n;
  }

  RankedCase(int64_t rows, int64_t size, bool packed)
      : rows(rows),
        size(size),
        packed(packed),
        scores(total(rows, size, packed)),
        ref_scores(scores.n),
        rewards(scores.n),
        divisor(scores.n),
        weights(rows),
        d_scores(scores.n),
        losses(rows),
        mask(scores.n) {
    std::mt19937 draw(7);
    std::normal_distribution<float> normal;
    for (int64_t r = 0; r < rows; ++r) {
      cu.push_back(cu.back() + length_of(r, size, packed));
      weights[r] = r % 7 == 5 ? 0.0f : 0.5f + 0.1f * float(r % 9);
    }
    for (int64_t i = 0; i < scores.n; ++i) {
      mask[i] = draw() % 5 != 0;
      if (!mask[i]) continue;  // its fields stay NaN
      scores[i] = 2 * normal(draw), ref_scores[i] = normal(draw), divisor[i] = float(1 + draw() % 3);
      rewards[i] = 0.5f * std::round(2 * normal(draw));
    }
  }

  void run(const Kernels& k, int threads) {
    const auto field = [&](Exact<float>& x) { return LossField{x.get(), DType::f32, packed ? 0 : size, 1}; };
    const RankedGroups groups = {field(scores),
                                 field(ref_scores),
                                 field(rewards),
                                 field(divisor),
                                 {mask.get(), packed ? 0 : size},
                                 packed ? cu.data() : nullptr,
                                 {weights.get(), DType::f32, 1, 0},
                                 &num_items,
                                 rows,
                                 size};
    k.ranked_loss(call, groups, {&loss, &metrics, d_scores.get(), losses.get()}, threads);
  }

  void check(Report& report) {
    double sum = 0;
    const double scale = double(call.factor) / double(num_items);
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<int64_t> at;
      for (int64_t i = cu[row]; i < cu[row + 1]; ++i) {
        report.near("gradient of what is masked", mask[i] ? 0 : d_scores[i], 0, 0);
        if (mask[i]) at.push_back(i);
      }
      std::stable_sort(at.begin(), at.end(), [&](int64_t a, int64_t b) { return rewards[a] > rewards[b]; });
      const bool used = at.size() > 1 && weights[row] != 0;
      const auto of = [&](size_t moved, double by) {
        Numbers x, r;
        for (size_t i = 0; i < at.size(); ++i) {
          const double s = double(scores[at[i]]) + (i == moved ? by : 0);
          x.push_back(double(call.beta) * (s - double(ref_scores[at[i]])) / double(divisor[at[i]]));
          r.push_back(rewards[at[i]]);
        }
        const double others = double(at.size()) - 1, s_best = double(scores[at[0]]) + (moved == 0 ? by : 0);
        const double likelihood = double(call.nll) * others * others * s_best;
        return double(weights[row]) * (value_of(call.form, x, r, call.tau, call.top) - likelihood);
      };
      const double value = used ? of(at.size(), 0) : 0;
      report.near("loss of a group", losses[row], value, 1e-5 * (1 + std::fabs(value)));
      sum += value;
      for (size_t i = 0; i < at.size(); ++i) {
        const double slope = used ? scale * (of(i, 1e-5) - of(i, -1e-5)) / 2e-5 : 0;
        report.near("gradient", d_scores[at[i]], slope, 1e-4 * (1 + std::fabs(slope)));
      }
    }
    report.near("loss", loss, scale * sum, 1e-4 * (1 + std::fabs(scale * sum)));
  }
};

}  // namespace

void test_ranked(const Kernels& k, const std::string& isa) {
  for (const char* form : {"plackett_luce", "pro", "bradley_terry", "hinge", "reverse_kl", "cross_entropy", "nca"})
    for (bool packed : {false, true})
      for (int64_t size : {0, 1, 2, 5, 9, 40})
        for (int64_t rows : {0, 1, 17, 600}) {
          if (rows == 600 && size > 9) continue;
          RankedCase c(rows, size, packed);
          c.call.form = form;
          Report r{isa + ", ranked_loss " + form + (packed ? ", packed" : "") + ", " + std::to_string(rows) + " of " +
                   std::to_string(size)};
          c.run(k, 2);
          c.check(r);
        }
}

}  // namespace rlfast::tests
