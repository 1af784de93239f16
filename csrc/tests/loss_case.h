// A call of token_loss: its fields in buffers of exact size, and the check of loss, metrics and gradients against the definition
// in double precision.
#pragma once
#include "../cuda/float_words.cuh"
#include "../rlfast/token_loss.h"
#include "oracle.h"
#include "real.h"

namespace rlfast::tests {

// Which optional fields a case has, as bits.
enum Given : int {
  kOld = 1,
  kRef = 2,
  kRollout = 4,
  kEntropies = 8,
  kWeights = 16,
  kExtra = 32,
  kMask = 64,
  kKeep = 128
};
constexpr int kEverything = 255;

enum class Odd { none, masked_garbage, nan_token, rollout_limits, all_masked, on_policy };

struct LossShape {
  std::string name;
  int64_t rows = 3, length = 7;
  std::vector<int64_t> packed;  // lengths of the sequences, instead of rows and length
  int64_t lead = 0, pad = 0;    // elements before the first token, between rows
  bool is_packed = false, adv_by_row = false, num_items = false, coefs = false, no_gradients = false;
  int given = kOld | kMask;
  DType dtype = DType::f32;  // of logp and adv; the other fields take the next ones
  Odd odd = Odd::none;
  LossPlan plan{};
  LossSettings settings{0,         0,          -HUGE_VALF, HUGE_VALF, -HUGE_VALF, HUGE_VALF, 0,
                        HUGE_VALF, -HUGE_VALF, HUGE_VALF,  HUGE_VALF, 1,          1,         1};
  int surrogate = 0, estimator = -1;  // places in csrc/rlfast/formulas.gen.h; −1: none
  float hyper[4] = {0.2f, 0.25f, HUGE_VALF, HUGE_VALF}, kl_hyper[2] = {HUGE_VALF, HUGE_VALF};
};

inline const char* surrogate_name(int number) {
#define RLFAST_NAME(name, Hyper) #name,
  static const char* const names[] = {RLFAST_SURROGATE_FORMULAS(RLFAST_NAME)};
  return names[number];
}
inline const char* estimator_name(int number) {
  static const char* const names[] = {RLFAST_KL_FORMULAS(RLFAST_NAME)};
#undef RLFAST_NAME
  return names[number];
}

// A field of floats in a buffer of exact size.
struct FloatField {
  Exact<char> bytes;
  DType dtype;
  int64_t lead, row_stride, stride;
  bool there;

  FloatField(const LossShape& s, int64_t rows, int64_t length, DType type, bool there, bool by_row = false)
      : bytes(there ? extent(s, rows, length, by_row) * width(type) : 0),
        dtype(type),
        lead(s.lead),
        row_stride(by_row ? 1 : length + s.pad),
        stride(by_row ? 0 : 1),
        there(there) {}
  static int64_t extent(const LossShape& s, int64_t rows, int64_t length, bool by_row) {
    if (rows * length == 0) return 0;
    return s.lead + (by_row ? rows : (rows - 1) * (length + s.pad) + length);
  }
  void set(int64_t row, int64_t t, double x) {
    if (there) write(bytes.get(), dtype, lead + row * row_stride + t * stride, float(x));
  }
  double at(int64_t row, int64_t t) {
    return there ? read(bytes.get(), dtype, lead + row * row_stride + t * stride) : 0.0;
  }
  LossField record() {
    const char* data = bytes.get();
    return {there && data ? data + lead * width(dtype) : data, dtype, row_stride, stride};
  }
};

// A sum, and the size of what went into it.
struct Sum {
  double value = 0, size = 0;
  void add(double x) { value += x, size += std::fabs(x); }
};

struct LossCase {
  LossShape s;
  int64_t rows, length, sequences;
  FloatField logp, old_logp, ref, rollout, adv, entropy, weights, extra;
  Exact<uint8_t> mask, keep;
  Exact<int64_t> cu_seqlens;
  Exact<float> num_items, coefs, loss, dlogp, dentropy;
  Exact<LossMetrics> metrics;

  explicit LossCase(const LossShape& shape)
      : s(shape),
        rows(s.is_packed ? 1 : s.rows),
        length(s.is_packed ? total(s.packed) : s.length),
        sequences(s.is_packed ? int64_t(s.packed.size()) : s.rows),
        logp(s, rows, length, s.dtype, true),
        old_logp(s, rows, length, next(1), s.given & kOld),
        ref(s, rows, length, next(2), s.given & kRef),
        rollout(s, rows, length, next(1), s.given & kRollout),
        adv(s, rows, length, s.dtype, true, s.adv_by_row),
        entropy(s, rows, length, next(2), s.given & kEntropies),
        weights(s, rows, length, next(1), s.given & kWeights),
        extra(s, rows, length, next(2), s.given & kExtra),
        mask(s.given & kMask ? FloatField::extent(s, rows, length, false) : 0),
        keep(s.given & kKeep ? FloatField::extent(s, rows, length, false) : 0),
        cu_seqlens(s.is_packed ? sequences + 1 : 0),
        num_items(s.num_items),
        coefs(s.coefs ? 2 : 0),
        loss(1),
        dlogp(s.no_gradients ? 0 : rows * length),
        dentropy(s.no_gradients ? 0 : rows * length),
        metrics(1) {
    std::mt19937 random(unsigned(length * 31 + rows * 7 + s.given));
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t t = 0; t < length; ++t) draw(row, t, random);
    if (s.num_items) num_items[0] = 5;
    if (s.coefs) coefs[0] = 0.5f, coefs[1] = 3;
    if (!s.is_packed) return;
    cu_seqlens[0] = 0;
    for (int64_t i = 0; i < sequences; ++i) cu_seqlens[i + 1] = cu_seqlens[i] + s.packed[i];
  }

  static int64_t total(const std::vector<int64_t>& lengths) {
    int64_t sum = 0;
    for (int64_t n : lengths) sum += n;
    return sum;
  }
  DType next(int step) const { return static_cast<DType>((int(s.dtype) + step) % 3); }
  int64_t flag(int64_t row, int64_t t) const { return s.lead + row * (length + s.pad) + t; }
  bool masked_in(int64_t row, int64_t t) { return !(s.given & kMask) || mask[flag(row, t)]; }

  void draw(int64_t row, int64_t t, std::mt19937& random) {
    std::normal_distribution<double> normal(0, 1);
    std::uniform_real_distribution<double> uniform(0, 1);
    double base = -3 * uniform(random);
    double x[] = {base + 0.02 * normal(random), base + 0.2 * normal(random), base + 0.2 * normal(random),
                  base + 0.2 * normal(random),  1 + 0.3 * normal(random),    normal(random)};
    bool counts = uniform(random) < 0.7 && s.odd != Odd::all_masked && !(row == 1 && s.given & kKeep);
    if (s.given & kMask) mask[flag(row, t)] = counts;
    if (s.given & kKeep) keep[flag(row, t)] = uniform(random) < 0.7;
    double weight = uniform(random) < 0.2 ? 0 : uniform(random), chosen = uniform(random) < 0.3;
    double advantage = normal(random);
    if (s.odd == Odd::nan_token && row == 0 && t == length / 2) x[0] = NAN;
    if (s.odd == Odd::on_policy) x[1] = x[0] + 1e-3 * normal(random);
    if (s.odd == Odd::rollout_limits && t < 3) x[3] = t == 0 ? NAN : row % 2 ? kInfinity : -kInfinity;
    if (s.odd == Odd::masked_garbage && (s.given & kMask) && !counts) {
      for (double& v : x) v = t % 3 == 0 ? NAN : t % 3 == 1 ? kInfinity : -kInfinity;
      weight = chosen = NAN;
      advantage = s.adv_by_row ? advantage : NAN;
    }
    logp.set(row, t, x[0]), old_logp.set(row, t, x[1]), ref.set(row, t, x[2]), rollout.set(row, t, x[3]);
    entropy.set(row, t, x[4]), weights.set(row, t, weight), extra.set(row, t, chosen), adv.set(row, t, advantage);
  }

  LossFields fields() {
    const uint8_t* flags[] = {mask.get(), keep.get()};
    for (const uint8_t*& p : flags) p = p ? p + s.lead : p;
    return {logp.record(),
            old_logp.record(),
            ref.record(),
            rollout.record(),
            adv.record(),
            entropy.record(),
            weights.record(),
            extra.record(),
            {flags[0], length + s.pad},
            {flags[1], length + s.pad},
            cu_seqlens.get(),
            num_items.get(),
            coefs.get(),
            sequences,
            length};
  }
  LossObjective objective() const {
    return {s.plan,  s.settings, surrogate_name(s.surrogate), s.estimator < 0 ? "" : estimator_name(s.estimator),
            s.hyper, s.kl_hyper};
  }
  LossOut out() { return {loss.get(), metrics.get(), dlogp.get(), dentropy.get()}; }

  void check(Report& r);
};

// The shapes, plans and values that every kernel must take.
std::vector<LossShape> loss_shapes(bool large);

}  // namespace rlfast::tests
