// token_loss on a GPU: loss, metrics and gradients in one launch.
//
//   loss = factor/n · Σ_t m_t·c_t·(s_t·ρ_t·w_t + beta·KL_t − entropy_coef·H_t)
//
// A block takes a piece of the batch: a sequence where a token's part depends on its sequence, else a tile of one. A sequence is
// read once for each sum that the next stage needs: of ρ, of the unit's log-ratio, of the parts; and once more to give its unit's
// gradient back to its tokens. Only the first comes from memory: 4096 tokens of five fp32 fields are 80 KB, which the L1 holds.
// What a piece adds up to goes to `partial`; the block that is the last to finish adds the pieces in ascending order and writes the
// loss and the metrics, so that the bits do not depend on which block that was. n is known only then: gradients are ÷ (factor/n).
//
// Bytes: N·Σ sizeof(field) read + 4·N per gradient written, 150 bytes a piece. Thread sums are in double: 11 additions a token, a
// tenth of what an A100 has to spare at its bandwidth. Not yet measured on a GPU.
#include "token_loss.h"

#include <algorithm>
#include <cstring>

#include "launch.cuh"
#include "loss_math.cuh"

namespace rlfast::cuda {

namespace {

// Four tokens of one thread. What is masked is 0.
struct Group {
  int live;     // tokens before the end of the piece
  unsigned on;  // a bit a token: counts
  float logp[kGroup], old_logp[kGroup], rollout[kGroup], adv[kGroup];
};

RLFAST_DEVICE Group load_group(const LossFields& f, const Piece& p, int64_t t) {
  Group g = {int(min(p.end - t, int64_t(kGroup))), 0, {}, {}, {}, {}};
  g.on = load(f.mask, p, t, g.live);
  load(f.logp, p, t, g.live, g.logp);
  if (f.rollout_logp.data) load(f.rollout_logp, p, t, g.live, g.rollout);
  load(f.adv, p, t, g.live, g.adv);
  clear(g.on, g.logp), clear(g.on, g.rollout), clear(g.on, g.adv);
  if (f.old_logp.data) {
    load(f.old_logp, p, t, g.live, g.old_logp);
    clear(g.on, g.old_logp);
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) g.old_logp[j] = g.logp[j];
  }
  return g;
}

template <class Body>
RLFAST_DEVICE void each_group(const LossFields& f, const Piece& p, Body body) {
  for (int64_t t = p.begin + threadIdx.x * kGroup; t < p.end; t += kLossThreads * kGroup) body(t, load_group(f, p, t));
}

// ρ and its gate where they are the sequence's: e^Σ log ρ or e^(mean log ρ).
RLFAST_DEVICE void weigh(const LossCall& c, const Piece& p, Sequence& s) {
  const LossPlan& plan = c.plan;
  if (max(plan.weight, plan.gate) <= kAtToken) return;
  double sum[3] = {};  // tokens, log ρ, what the gate looks at
  each_group(c.fields, p, [&](int64_t, const Group& g) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      float drift = correction(c, s, g.old_logp[j], g.rollout[j]).drift;
      sum[0] += bit(g.on, j);
      sum[1] += drift;
      sum[2] += gated(plan, drift);
    }
  });
  block_total(sum);
  double count = max(sum[0], 1.0);
  if (plan.weight > kAtToken)
    s.weight = weight_of(c.settings, float(plan.weight == kAtSeqMean ? sum[1] / count : sum[1]));
  if (plan.gate > kAtToken)
    s.open =
        within(float(plan.gate == kAtSeqMean ? sum[2] / count : sum[2]), c.settings.gate_low, c.settings.gate_high);
}

// The sums over a sequence that its tokens' parts depend on.
RLFAST_DEVICE Sequence sequence_of(const LossCall& c, const Piece& p) {
  const LossPlan& plan = c.plan;
  Sequence s;
  weigh(c, p, s);
  double sum[4] = {};  // tokens, advantages, x, log π_rollout − log π
  each_group(c.fields, p, [&](int64_t, const Group& g) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      Correction rho = correction(c, s, g.old_logp[j], g.rollout[j]);
      if (!bit(g.on, j) || (plan.gate_masks && !rho.open)) continue;
      double x = log_ratio(c, g.logp[j], g.old_logp[j], g.adv[j]).x;
      if (plan.weight_in_ratio) x += clamped(logf(rho.applied()), float(kLogLeast), float(kLogMost));
      float sampled = c.fields.rollout_logp.data ? g.rollout[j] : g.old_logp[j];
      sum[0] += 1.0;
      sum[1] += g.adv[j];
      sum[2] += x;
      sum[3] += finite(sampled - g.logp[j]);
    }
  });
  block_total(sum);
  s.count = float(max(sum[0], 1.0));
  s.adv = float(sum[1] / s.count);
  s.unit = float(plan.unit == kUnitSeqSum ? sum[2] : sum[2] / s.count);
  s.on_policy = float(sum[3] / s.count) <= c.settings.off_policy;
  return s;
}

struct Coefficients {
  float beta, entropy;

  static RLFAST_DEVICE Coefficients of(const LossCall& c) {
    const float* coefs = c.fields.coefs;
    return {c.settings.beta * (coefs ? coefs[0] : 1.0f), c.settings.entropy_coef * (coefs ? coefs[1] : 1.0f)};
  }
};

// The sums of a thread.
struct Sums {
  double policy, kl, entropy, kept_entropy, k1, k3, ratio, w, w2, drift;
  double d_unit;  // ∂/∂x of the unit
  int tokens, kept, low, high, dropped;
  float ratio_max, drift_max;
};

// The parts of four tokens: into the sums, and their gradients.
RLFAST_DEVICE void evaluate(const Loss& a, const Piece& p, const Sequence& s, const Coefficients& coef, int64_t t,
                            const Group& g, Sums& sum) {
  const LossCall& c = a.call;
  const LossFields& f = c.fields;
  const LossPlan& plan = c.plan;
  float extra[kGroup] = {};
  if (f.extra.data) load(f.extra, p, t, g.live, extra);
  clear(g.on, extra);
  Correction rho[kGroup];
  LogRatio x[kGroup];
  Seen seen[kGroup];
  Part part[kGroup];
  bool inside = within(s.unit, c.settings.unit_low, c.settings.unit_high);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    rho[j] = correction(c, s, g.old_logp[j], g.rollout[j]);
    x[j] = log_ratio(c, g.logp[j], g.old_logp[j], g.adv[j]);
    float unit = clamped(plan.unit == kUnitToken ? x[j].x : s.unit, c.settings.unit_low, c.settings.unit_high);
    seen[j] = {g.logp[j], g.old_logp[j], unit, expf(unit), plan.mean_adv ? s.adv : g.adv[j], extra[j]};
  }
  surrogate(c.formulas, seen, part);

  // not loaded before: two blocks a multiprocessor leave 128 registers, which the surrogate needs
  float ref[kGroup] = {}, entropy[kGroup] = {}, weights[kGroup], d_logp[kGroup], d_entropy[kGroup];
  unsigned keep = load(f.keep, p, t, g.live);
  if (c.formulas.estimator >= 0) load(f.ref_logp, p, t, g.live, ref);
  if (f.entropy.data) load(f.entropy, p, t, g.live, entropy);
  if (f.weights.data) load(f.weights, p, t, g.live, weights);
  float share = plan.reduce == kSeqMeanTokenMean ? 1.0f / s.count : 1.0f;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    bool on = bit(g.on, j) && (rho[j].open || !plan.gate_masks), kept = on && bit(keep, j);
    float multiplier = (plan.weight_in_ratio ? 1.0f : rho[j].applied()) * (f.weights.data ? weights[j] : 1.0f);
    bool used = kept && (seen[j].adv >= 0.0f || s.on_policy) && multiplier != 0.0f;
    // a formula's minimum and maximum may drop a NaN
    float found = seen[j].log_ratio == seen[j].log_ratio ? part[j].value : seen[j].log_ratio;
    float value = used ? multiplier * found : 0.0f;
    float d_unit = used ? multiplier * part[j].d_log_ratio : 0.0f, d = used ? multiplier * part[j].d_logp : 0.0f;
    float ratio = seen[j].ratio;
    Divergence kl;
    if (on && c.formulas.estimator >= 0) kl = divergence(c, x[j], ratio, ref[j] - g.logp[j]);
    d_unit += coef.beta * kl.d_unit, d += coef.beta * kl.d_logp;

    // ∂x/∂log π of the unit: the token's own; none of GSPO's token form; the sequence's comes when it is summed
    bool moves =
        plan.unit == kUnitToken ? x[j].moves && within(x[j].x, c.settings.unit_low, c.settings.unit_high) : inside;
    bool own = moves && (plan.unit == kUnitToken || plan.unit == kUnitSeqMeanThrough);
    d_logp[j] = on ? share * (d + (own ? d_unit : 0.0f)) : 0.0f;
    d_entropy[j] = -coef.entropy * (plan.entropy_mean ? float(kept) : on ? share : 0.0f);
    if (!on) continue;

    float clipped = !x[j].moves ? 1.0f : part[j].clipped, growth = expf(rho[j].drift);
    float w = clamped(plan.weight_in_ratio ? ratio : ratio * rho[j].applied(), 0.0f, kLargestWeight);
    w = w < kSmallestWeight ? 0.0f : w;
    sum.policy += value, sum.d_unit += d_unit;
    sum.kl += kl.value;
    sum.entropy += entropy[j];
    sum.kept_entropy += kept ? entropy[j] : 0.0f;
    sum.k1 -= x[j].x, sum.k3 += expm1f(x[j].x) - x[j].x;
    sum.ratio += ratio, sum.w += w, sum.w2 += double(w) * w;
    sum.drift += growth;
    sum.tokens += 1, sum.kept += kept, sum.dropped += !used;
    sum.low += used && clipped != 0.0f && ratio < 1.0f;
    sum.high += used && clipped != 0.0f && ratio >= 1.0f;
    sum.ratio_max = max_nan(sum.ratio_max, ratio), sum.drift_max = max_nan(sum.drift_max, growth);
  }
  if (c.out.dlogp) store(place(c.out.dlogp, p, f.length, t), g.live, d_logp);
  if (c.out.dentropy) store(place(c.out.dentropy, p, f.length, t), g.live, d_entropy);
}

// ∂/∂log π of a token += ∂/∂x of the unit · ∂x/∂log π. A thread has the tokens that it had in evaluate.
RLFAST_DEVICE void give_back(const Loss& a, const Piece& p, const Sequence& s, float d_unit) {
  const LossCall& c = a.call;
  each_group(c.fields, p, [&](int64_t t, const Group& g) {
    float* out = place(c.out.dlogp, p, c.fields.length, t);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      bool open = !c.plan.gate_masks || correction(c, s, g.old_logp[j], g.rollout[j]).open;
      if (bit(g.on, j) && open && log_ratio(c, g.logp[j], g.old_logp[j], g.adv[j]).moves) out[j] += d_unit;
    }
  });
}

RLFAST_DEVICE void take_piece(const Loss& a, const Coefficients& coef, int64_t index) {
  const LossCall& c = a.call;
  const LossPlan& plan = c.plan;
  Piece p = piece_of(a, index);
  Sequence s;
  if (a.tile == kWhole) s = sequence_of(c, p);
  Sums sum = {};
  each_group(c.fields, p, [&](int64_t t, const Group& g) { evaluate(a, p, s, coef, t, g, sum); });

  // ∂/∂x and the kept tokens' entropy stand where the weighted sums of KL and entropy will
  double total[kLossSlots] = {sum.policy,
                              sum.d_unit,
                              sum.kept_entropy,
                              sum.kl,
                              sum.entropy,
                              sum.k1,
                              sum.k3,
                              sum.ratio,
                              sum.w,
                              sum.w2,
                              sum.drift,
                              double(sum.tokens),
                              double(sum.kept),
                              double(sum.low),
                              double(sum.high),
                              double(sum.dropped),
                              0.0,
                              sum.ratio_max,
                              sum.drift_max};
  block_total<kLossSlots, kMaxRatio>(total);
  bool sequence_unit = plan.unit == kUnitSeqMean || plan.unit == kUnitSeqSum;
  double share = plan.reduce == kSeqMeanTokenMean ? 1.0 / s.count : 1.0;
  if (sequence_unit && c.out.dlogp && within(s.unit, c.settings.unit_low, c.settings.unit_high))
    give_back(a, p, s, float(share * total[kSumKlPart] / (plan.unit == kUnitSeqMean ? s.count : 1.0f)));
  total[kSumPolicy] *= share;
  total[kSumKlPart] = share * total[kSumKl];
  if (!plan.entropy_mean) total[kSumEntropyPart] = share * total[kSumEntropy];
  give_partial(a.partial, a.pieces, index, total);
}

// Sequences with a token that counts, among those of this thread.
RLFAST_DEVICE int64_t live_sequences(const Loss& a) {
  int64_t found = 0;
  for (int64_t i = threadIdx.x; i < a.call.fields.rows; i += kLossThreads) {
    bool any = false;
    for (int64_t piece = first_piece(a, i), end = first_piece(a, i + 1); piece < end; ++piece)
      any |= __ldcg(a.partial + kCountTokens * a.pieces + piece) > 0.0;
    found += any;
  }
  return found;
}

// n of the reduction, 1 where it would be 0.
RLFAST_DEVICE double denominator(const LossCall& c, double tokens, double sequences) {
  int reduce = c.plan.reduce;
  double n = reduce == kTokenMean ? tokens : reduce == kTokenSum ? 1.0 : sequences;
  if (c.fields.num_items) n = *c.fields.num_items;
  if (reduce == kSeqSumOverMaxLen) n *= c.settings.max_len;
  return n > 0.0 ? n : 1.0;
}

// The sums of all pieces, to the loss and the metrics.
RLFAST_DEVICE void finish(const Loss& a, const Coefficients& coef) {
  const LossCall& c = a.call;
  double total[kLossSlots] = {};
  take_partial<kLossSlots, kMaxRatio>(a.partial, a.pieces, total);
  total[kCountSequences] = double(live_sequences(a));
  block_total<kLossSlots, kMaxRatio>(total);
  if (threadIdx.x != 0) return;
  double tokens = total[kCountTokens];
  double sequences = c.plan.count_empty ? double(c.fields.rows) : total[kCountSequences];
  double scale = c.settings.factor / denominator(c, tokens, sequences);
  double entropy_scale = c.plan.entropy_mean ? c.settings.entropy_factor / max(total[kCountKept], 1.0) : scale;
  double policy = scale * total[kSumPolicy], bonus = coef.entropy * (entropy_scale * total[kSumEntropyPart]);
  double each = 1.0 / max(tokens, 1.0), w = total[kSumW], w2 = total[kSumW2];
  LossMetrics m;
  m.loss = float(policy + coef.beta * (scale * total[kSumKlPart]) - bonus);
  m.scale = float(scale);
  m.entropy_scale = float(entropy_scale);
  m.tokens = float(tokens);
  m.sequences = float(sequences);
  m.policy_loss = float(policy);
  m.kl = float(total[kSumKl] * each);
  m.entropy = float(total[kSumEntropy] * each);
  m.approx_kl_k1 = float(total[kSumK1] * each);
  m.approx_kl_k3 = float(total[kSumK3] * each);
  m.clip_low = float(total[kCountLow] * each);
  m.clip_high = float(total[kCountHigh] * each);
  m.ratio_mean = float(total[kSumRatio] * each);
  m.ratio_max = float(total[kMaxRatio]);
  m.ess = w2 != 0.0 ? float(w * w * each / w2) : 0.0f;
  m.dropped = float(total[kCountDropped] * each);
  m.rollout_ratio_mean = float(total[kSumDrift] * each);
  m.rollout_ratio_max = float(total[kMaxDrift]);
  *c.out.metrics = m;
  *c.out.loss = m.loss;
}

__global__ void __launch_bounds__(kLossThreads, 2) token_loss_kernel(const Loss a) {
  Coefficients coef = Coefficients::of(a.call);
  for (int64_t piece = blockIdx.x; piece < a.pieces; piece += gridDim.x) take_piece(a, coef, piece);
  if (last_block(a.finished)) finish(a, coef);
}

constexpr int64_t kTile = kLossThreads * kGroup;
constexpr int64_t kManyPieces = 2048;  // one block adds them up

// How the batch is cut: by its shape alone, so that the bits do not depend on the device.
Loss cut(const LossCall& call) {
  const LossFields& f = call.fields;
  Loss a = {call, nullptr, nullptr, 0, kWhole, 1};
  int64_t tokens = f.cu_seqlens ? f.length : f.rows * f.length;
  if (!row_wise(call.plan, call.settings)) {
    a.tile = kTile;
    while (tokens / a.tile > kManyPieces) a.tile *= 2;
    a.tiles = std::max<int64_t>(ceil_div(f.length, a.tile), 1);
  }
  a.pieces = f.cu_seqlens ? f.length / a.tile + f.rows : f.rows * a.tiles;
  return a;
}

LossFormulas formulas_of(const LossObjective& o) {
  LossFormulas f = {-1, -1, {}, {}};
#define RLFAST_FIND(name, Hyper)                            \
  if (!std::strcmp(o.surrogate, #name)) {                   \
    f.surrogate = kSurrogate_##name;                        \
    std::memcpy(f.hyper, o.hyper, sizeof(formulas::Hyper)); \
  }
  RLFAST_SURROGATE_FORMULAS(RLFAST_FIND)
#undef RLFAST_FIND
#define RLFAST_FIND(name, Hyper) \
  if (!std::strcmp(o.estimator, #name)) f.estimator = kEstimator_##name;
  RLFAST_KL_FORMULAS(RLFAST_FIND)
#undef RLFAST_FIND
  std::memcpy(f.kl_hyper, o.kl_hyper, sizeof f.kl_hyper);
  if (f.surrogate < 0) throw std::invalid_argument(std::string("surrogate: not compiled in: ") + o.surrogate);
  if (f.estimator < 0 && *o.estimator)
    throw std::invalid_argument(std::string("estimator: not compiled in: ") + o.estimator);
  return f;
}

}  // namespace

std::vector<const char*> token_loss_surrogates() {
#define RLFAST_NAME(name, Hyper) #name,
  return {RLFAST_SURROGATE_FORMULAS(RLFAST_NAME)};
#undef RLFAST_NAME
}

int64_t token_loss_scratch(const LossObjective& objective, const LossFields& fields) {
  return cut({fields, objective.plan, objective.settings, {}, {}}).pieces * kLossSlots;
}

void token_loss(const LossObjective& objective, const LossFields& fields, const LossOut& out, double* scratch,
                unsigned* finished, int device, void* stream) {
  OnDevice guard(device);
  Loss a = cut({fields, objective.plan, objective.settings, formulas_of(objective), out});
  a.partial = scratch, a.finished = finished;
  int grid = int(std::clamp<int64_t>(a.pieces, 1, kMaxGrid));
  RLFAST_LAUNCH(token_loss_kernel, grid, kLossThreads, shared_bytes(kLossSlots), static_cast<cudaStream_t>(stream), a);
  check(cudaGetLastError(), "token_loss");
}

}  // namespace rlfast::cuda
