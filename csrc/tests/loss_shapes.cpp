#include "loss_case.h"

namespace rlfast::tests {

namespace {

int count_surrogates() {
  int n = 0;
#define RLFAST_COUNT(name, Hyper) ++n;
  RLFAST_SURROGATE_FORMULAS(RLFAST_COUNT)
#undef RLFAST_COUNT
  return n;
}

void add_formulas(std::vector<LossShape>& all) {
  for (int surrogate = 0; surrogate < count_surrogates(); ++surrogate)
    for (int estimator = -1; estimator < 4; ++estimator) {
      if (estimator >= 0 && surrogate % 4 != estimator) continue;
      LossShape s;
      s.name = "formula", s.given = kEverything, s.rows = 2, s.length = 65;
      s.surrogate = surrogate, s.estimator = estimator;
      const float hyper[] = {0.15f, 0.25f, 1.5f, 0.7f};
      std::copy(hyper, hyper + 4, s.hyper);
      s.kl_hyper[0] = 0.3f, s.kl_hyper[1] = surrogate % 2 ? 0.2f : HUGE_VALF;
      s.settings.beta = 0.3f, s.settings.entropy_coef = 0.01f;
      all.push_back(s);
    }
}

void add_layouts(std::vector<LossShape>& all) {
  for (bool rowwise : {false, true})
    for (DType type : {DType::f32, DType::bf16, DType::f16})
      for (int64_t length : {0, 1, 3, 4, 5, 8, 31, 1023, 1024, 1025, 2050})
        for (bool packed : {false, true}) {
          LossShape s;
          s.name = "layout", s.dtype = type, s.rows = length % 2 ? 3 : 2, s.length = length;
          s.lead = length % 5, s.pad = length % 3, s.adv_by_row = !packed && length % 2;
          s.given = length % 3 ? kEverything : kOld | kRollout;
          s.odd = s.given & kMask ? Odd::masked_garbage : Odd::none;
          s.plan.reduce = rowwise ? kSeqMeanTokenMean : kTokenMean, s.plan.entropy_mean = rowwise;
          s.settings.entropy_coef = 0.1f, s.no_gradients = length == 31;
          s.is_packed = packed;
          if (packed) s.packed = {3, length, 0, 2}, s.pad = 0;
          all.push_back(s);
        }
  for (bool packed : {false, true})
    for (bool rowwise : {false, true}) {
      LossShape s;
      s.name = "no sequence", s.rows = 0, s.is_packed = packed, s.plan.unit = rowwise ? kUnitSeqMean : kUnitToken;
      all.push_back(s);
      s.name = "all masked", s.rows = 3, s.odd = Odd::all_masked, s.given = kEverything, s.packed = {2, 7};
      all.push_back(s);
    }
}

void add_values(std::vector<LossShape>& all) {
  for (Odd odd : {Odd::nan_token, Odd::rollout_limits})
    for (int level : {kAtToken, kAtSeqMean})
      for (int gate_kind : {1, 3}) {
        LossShape s;
        s.name = "values", s.odd = odd, s.given = kOld | kRollout, s.length = 33;
        s.plan.weight = level, s.plan.gate = kAtToken, s.plan.gate_kind = gate_kind;
        s.settings.gate_low = -5, s.settings.gate_high = 5, s.settings.weight_high = 2;
        s.plan.gate_masks = gate_kind == 3;
        all.push_back(s);
      }
  for (int unit : {kUnitSeqMean, kUnitSeqSum}) {
    LossShape s;
    s.name = "tokens that a gate masks", s.given = kOld | kRollout, s.length = 33;
    s.plan.unit = unit, s.plan.gate = kAtToken, s.plan.gate_masks = 1, s.settings.gate_high = 0.05f;
    all.push_back(s);
  }
}

void add_on_policy(std::vector<LossShape>& all) {
  LossShape s;
  s.name = "on policy", s.odd = Odd::on_policy, s.length = 9;
  all.push_back(s);
}

// Structures at random, of every kind together.
void add_structures(std::vector<LossShape>& all, int count) {
  std::mt19937 random(7);
  const auto pick = [&](int n) { return int(random() % unsigned(n)); };
  for (int i = 0; i < count; ++i) {
    LossShape s;
    s.name = "structure " + std::to_string(i), s.rows = 1 + pick(3), s.length = 5 + pick(60);
    s.is_packed = pick(3) == 0;
    if (s.is_packed) s.packed = {1 + pick(30), 0, 1 + pick(9)};
    s.given = pick(2) ? kEverything : pick(256);
    s.num_items = pick(4) == 0, s.coefs = pick(3) == 0;
    s.odd = pick(2) ? Odd::masked_garbage : Odd::none;
    LossPlan& p = s.plan;
    p.unit = pick(4), p.signed_bounds = pick(2), p.mean_adv = pick(3) == 0, p.kl_through = pick(2),
    p.kl_ratio = pick(4);
    p.reduce = pick(5), p.count_empty = pick(2), p.entropy_mean = pick(2), p.weight = pick(4);
    p.weight_in_ratio = pick(3) == 0, p.gate = pick(4), p.gate_kind = 1 + pick(3), p.gate_masks = pick(2);
    LossSettings& o = s.settings;
    o.beta = s.given & kRef ? 0.2f : 0, o.entropy_coef = 0.05f, o.max_len = 20, o.factor = 2, o.entropy_factor = 0.5f;
    if (pick(2)) o.inner_low = -0.15f, o.inner_high = 0.2f;
    if (pick(3) == 0) o.unit_low = -0.05f, o.unit_high = 0.1f;
    if (p.unit == kUnitSeqSum) o.unit_low = -3, o.unit_high = 3;
    if (pick(2)) o.weight_low = 0.8f, o.weight_high = 1.2f;
    if (pick(2)) o.gate_low = -0.2f, o.gate_high = 0.1f;
    if (pick(3) == 0) o.off_policy = 0.01f;
    s.surrogate = pick(4) ? pick(2) * 4 : pick(count_surrogates());
    s.estimator = s.given & kRef ? pick(5) - 1 : -1;
    if (pick(3) == 0) s.kl_hyper[1] = 0.05f;
    all.push_back(s);
  }
}

}  // namespace

std::vector<LossShape> loss_shapes(bool large) {
  std::vector<LossShape> all;
  add_formulas(all);
  add_layouts(all);
  add_values(all);
  add_on_policy(all);
  add_structures(all, 300);
  if (large)
    for (bool packed : {false, true}) {
      LossShape s;
      s.surrogate = 1;  // without a bound, at which one token in a million is found on the other side in fp32
      s.name = "many pieces", s.rows = 2, s.length = 600000, s.is_packed = packed, s.packed = {1200000, 5};
      all.push_back(s);
    }
  return all;
}

}  // namespace rlfast::tests
