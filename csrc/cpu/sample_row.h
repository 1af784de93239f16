// One row of the sample kernel on its way: its leaves are read, its options say what is kept, perturbed logits race for the token.
//
//   w       the logit, or what an edit puts there; −inf where it is not allowed
//   kept    w ≥ least: the largest of what top-k, top-p and min-p ask for; ties stay
//   token   the first argmax of (w − peak)/T + g over what is kept
//
#pragma once
#include <type_traits>

#include "../rlfast/row_outputs.h"
#include "../rlfast/sample.h"
#include "sample_cut.h"
#include "sample_race.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// What one thread needs beside the rows.
struct SampleScratch {
  alignas(64) float buffer[kLeaf];
  alignas(64) float copy[kLeaf];
  Candidates candidates;
  Cut cut;
};

// The leaves of a row under one scale, merged.
struct Merged {
  std::vector<LeafStats> leaf;
  std::vector<double> scale;
  RowTotals total;

  void merge(const RowScale& s, unsigned sums) {
    scale.resize(leaf.size());
    total = merge_leaves(leaf.data(), static_cast<int64_t>(leaf.size()), s, sums, scale.data());
  }
};

template <class T>
class SampleRow {
public:
  SampleRow(const Logits& x, const SampleOptions& options, const SampleEdits& edits)
      : x_(x),
        options_(options),
        edits_(edits),
        leaves_(leaf_count(x.vocab)),
        plain_(row_scale({nullptr, 1.0f, 0.0f, 1.0f}, 0)) {}

  void begin(int64_t row) {
    row_ = row;
    at_ = static_cast<const T*>(x_.data) + x_.offset(row);
    greedy_ = options_.temperature[row] == 0.0f;
    temperature_ = greedy_ ? 1.0f : options_.temperature[row];
    scale_ = row_scale({nullptr, temperature_, 0.0f, 1.0f}, 0);
    changed_ = temperature_ != 1.0f || edits_.ends || edits_.allowed;
    raw_.leaf.resize(static_cast<size_t>(leaves_));
    if (changed_) own_.leaf.resize(static_cast<size_t>(leaves_));
    sort_edits();
  }

  // The statistics of one leaf, raw and as the options change it, in one read of memory.
  void read(int64_t leaf, SampleScratch& w) {
    const int n = leaf_columns(x_.vocab, leaf);
    const T* at = at_ + leaf * kLeaf;
    float peak;
    const float* y = load_leaf(at, n, plain_, w.buffer, &peak);
    const char* next = reinterpret_cast<const char*>(at + kLeaf);
    raw_.leaf[leaf] = leaf_stats<sizeof(T)>(y, n, peak, plain_.log2, kEntropySum, next);
    if (!changed_) return;
    if (edited(leaf)) {
      y = with_edits(y, n, leaf, w.buffer);
      peak = peak_of(y, n);
    }
    own_.leaf[leaf] = leaf_sums<0>(y, n, peak, scale_.log2);
  }

  // After every leaf: what is kept.
  void plan(SampleScratch& w) {
    raw_.merge(plain_, kEntropySum);
    if (changed_) own_.merge(scale_, 0);
    // NaN is greater than nothing
    lost_ = wrong_edit_ || raw_.total.sum != raw_.total.sum || !(own().total.sum > 0.0);
    least_ = lost_ || greedy_ ? -kInf : find_least(w);
    if (least_ == -kInf) return;
    kept_.leaf.resize(static_cast<size_t>(leaves_));
    for (int64_t l = 0; l < leaves_; ++l) {
      const float peak = own().leaf[l].peak;
      const int n = leaf_columns(x_.vocab, l);
      kept_.leaf[l] = {-kInf, 0.0, 0.0, 0.0, 0.0};
      if (peak >= least_) kept_.leaf[l] = leaf_sums<0>(kept_columns(n, l, w.buffer), n, peak, scale_.log2);
    }
    kept_.merge(scale_, 0);
  }

  // Who leads among the leaves [from, to); the leaf with the largest logit runs first, since it leaves least to the others.
  Leader race(int64_t from, int64_t to, SampleScratch& w) const {
    Leader leader{-kInf, -1};
    if (lost_ || greedy_ || from == to) return leader;
    const Race race({options_.seeds[row_], options_.positions[row_]}, own().total.peak, temperature_, least_);
    const auto run = [&](int64_t l) {
      const float peak = own().leaf[l].peak;
      if (peak == -kInf || race.beyond(leader, peak)) return;
      const int n = leaf_columns(x_.vocab, l);
      race.run(columns(n, l, w.buffer), n, l * kLeaf, peak, &leader);
    };
    int64_t first = from;
    for (int64_t l = from; l < to; ++l) first = own().leaf[l].peak > own().leaf[first].peak ? l : first;
    run(first);
    for (int64_t l = from; l < to; ++l) {
      if (l != first) run(l);
    }
    return leader;
  }

  void finish(const Leader& leader, const SampleOut& out, SampleScratch& w) const {
    const int64_t token = lost_ ? -1 : greedy_ ? first_largest(w) : leader.id;
    out.tokens[row_] = token;
    if (token < 0) {
      out.logp_raw[row_] = out.logp[row_] = out.kept[row_] = out.entropy[row_] = static_cast<float>(kNaN);
      return;
    }
    TargetStats target;
    find_targets(at_, x_.vocab, {&token, nullptr, 1}, plain_, 0, w.buffer, w.copy, &target);
    const double raw = target_logp(target, raw_.leaf.data(), leaves_, raw_.total, plain_, raw_.scale.data());
    const double logp = changed_ || least_ > -kInf ? kept_logp(token, w) : raw;
    out.logp_raw[row_] = static_cast<float>(raw);
    out.entropy[row_] = static_cast<float>(row_entropy(raw_.total, plain_));
    out.logp[row_] = greedy_ ? 0.0f : static_cast<float>(logp);
    out.kept[row_] = static_cast<float>(greedy_ ? std::exp(logp) : kept().total.sum / own().total.sum);
  }

private:
  struct Edit {
    int64_t id;
    float value;
  };

  const Merged& own() const { return changed_ ? own_ : raw_; }
  const Merged& kept() const { return least_ > -kInf ? kept_ : own(); }
  bool edited(int64_t leaf) const {
    return edits_.allowed || (edits_.ends && edit_start_[leaf] < edit_start_[leaf + 1]);
  }

  // The edits of the row by leaf, and within a leaf in their order: of equal ids the last one is written last.
  void sort_edits() {
    wrong_edit_ = false;
    if (!edits_.ends) return;
    const int64_t begin = std::max<int64_t>(edits_.ends[row_], 0);
    const int64_t end = std::min<int64_t>(edits_.ends[row_ + 1], edits_.count);
    edit_start_.assign(static_cast<size_t>(leaves_) + 1, 0);
    for (int64_t e = begin; e < end; ++e) {
      if (edits_.ids[e] < 0 || edits_.ids[e] >= x_.vocab) {
        wrong_edit_ = true;
      } else {
        ++edit_start_[edits_.ids[e] / kLeaf + 1];
      }
    }
    for (int64_t l = 0; l < leaves_; ++l) edit_start_[l + 1] += edit_start_[l];
    edit_next_ = edit_start_;
    edit_.resize(static_cast<size_t>(edit_start_[leaves_]));
    for (int64_t e = begin; e < end && !wrong_edit_; ++e) {
      edit_[edit_next_[edits_.ids[e] / kLeaf]++] = {edits_.ids[e], edits_.values[e]};
    }
  }

  // y with the leaf's edits, in `buffer`. A NaN stays where it is not allowed.
  const float* with_edits(const float* y, int n, int64_t leaf, float* buffer) const {
    if (y != buffer) std::memcpy(buffer, y, static_cast<size_t>(n) * sizeof(float));
    if (edits_.ends) {
      for (int64_t e = edit_start_[leaf]; e < edit_start_[leaf + 1]; ++e) {
        if (!wrong_edit_) buffer[edit_[e].id - leaf * kLeaf] = edit_[e].value;
      }
    }
    if (edits_.allowed) {
      const int32_t* words = edits_.allowed + row_ * ((x_.vocab + 31) / 32) + leaf * (kLeaf / 32);
      for (int i = 0; i < n; i += kLanes) {
        const F x = load(buffer + i);
        const M stays = either(from_bits(static_cast<uint32_t>(words[i / 32]) >> (i % 32)), unequal(x, x));
        store(buffer + i, select(stays, x, set1(-kInf)));
      }
    }
    return buffer;
  }

  // w of a leaf.
  const float* columns(int n, int64_t leaf, float* buffer) const {
    const T* at = at_ + leaf * kLeaf;
    if constexpr (std::is_same_v<T, float>) {
      return edited(leaf) ? with_edits(at, n, leaf, buffer) : at;
    } else {
      float peak;
      const float* y = load_leaf(at, n, plain_, buffer, &peak);
      return edited(leaf) ? with_edits(y, n, leaf, buffer) : y;
    }
  }

  // w of a leaf, −inf where it is not kept.
  const float* kept_columns(int n, int64_t leaf, float* buffer) const {
    const float* y = columns(n, leaf, buffer);
    if (least_ == -kInf) return y;
    const F least = set1(least_);
    for (int i = 0; i < n; i += kLanes) {
      const F x = part(y, n, i);
      store(buffer + i, select(at_least(x, least), x, set1(-kInf)));
    }
    return buffer;
  }

  double kept_logp(int64_t token, SampleScratch& w) const {
    const int64_t leaf = token / kLeaf;
    const int n = leaf_columns(x_.vocab, leaf);
    const float* y = kept_columns(n, leaf, w.buffer);
    const TargetStats target = target_stats(y, n, leaf, static_cast<int>(token % kLeaf), scale_.log2, w.copy);
    return target_logp(target, kept().leaf.data(), leaves_, kept().total, scale_, kept().scale.data());
  }

  int64_t first_largest(SampleScratch& w) const {
    const float top = own().total.top;
    int64_t leaf = 0;
    while (own().leaf[leaf].peak != top) ++leaf;
    const float* y = columns(leaf_columns(x_.vocab, leaf), leaf, w.buffer);
    int at = 0;
    while (y[at] != top) ++at;
    return leaf * kLeaf + at;
  }

  // The least w that top-k, top-p and min-p keep; −inf: they keep all.
  float find_least(SampleScratch& w) const {
    const int64_t k = options_.top_k[row_];
    const double p = options_.top_p[row_], min_p = options_.min_p[row_];
    const bool by_count = k > 0 && k < x_.vocab, by_mass = p < 1.0;
    const RowTotals& r = own().total;
    float least = min_p > 0.0 ? float_above(r.peak + temperature_ * std::log(min_p)) : -kInf;
    if (!by_count && !by_mass) return least;
    // What is below this bound is not kept, whatever the rest holds; the mass of all that top-k keeps needs all of it.
    gather(by_count ? count_bound(k, w) : std::max(least, mass_bound(p)), by_mass, w);
    double mass = r.sum;
    if (by_count) {
      const float kth = w.cut.kth(w.candidates, k);
      least = std::max(least, kth);
      if (!by_mass) return least;
      w.candidates.drop_below(kth);
      mass = w.candidates.mass();
    }
    return std::max(least, w.cut.nucleus(w.candidates, p * mass));
  }

  // At least k numbers are as large: the k-th largest of the maxima of kLanes strided columns a leaf.
  float count_bound(int64_t k, SampleScratch& w) const {
    w.candidates.clear();
    if (leaves_ * kLanes < k) return -kInf;
    alignas(64) float lanes[kLanes];
    for (int64_t l = 0; l < leaves_; ++l) {
      const int n = leaf_columns(x_.vocab, l);
      const float* y = columns(n, l, w.buffer);
      F top = set1(-kInf);
      for (int i = 0; i < n; i += kLanes) top = max(part(y, n, i), top);
      store(lanes, top);
      for (const float x : lanes) {
        if (x > -kInf) w.candidates.keys.push_back(key_of(x));
      }
    }
    return w.cut.kth(w.candidates, k);
  }

  // All that is below has at most half of the mass that top-p leaves out: V·exp((bound − peak)/T) ≤ ½·(1 − p)·Σe.
  float mass_bound(double p) const {
    const RowTotals& r = own().total;
    return float_below(r.peak + temperature_ * std::log(0.5 * (1.0 - p) * r.sum / static_cast<double>(x_.vocab)));
  }

  void gather(float bound, bool weighed, SampleScratch& w) const {
    const F least = set1(bound), nothing = set1(-kInf), peak = set1(own().total.peak);
    alignas(64) float e[kLanes], x[kLanes];
    w.candidates.clear();
    for (int64_t l = 0; l < leaves_; ++l) {
      if (!(own().leaf[l].peak >= bound)) continue;
      const int n = leaf_columns(x_.vocab, l);
      const float* y = columns(n, l, w.buffer);
      for (int i = 0; i < n; i += kLanes) {
        const F here = part(y, n, i);
        uint32_t found = bits(both(at_least(here, least), greater(here, nothing)));
        if (!found) continue;
        store(x, here);
        if (weighed) store(e, exp_term(max(set1(scale_.log2.t_min), sub(here, peak)), set1(scale_.log2.hi)));
        for (; found; found &= found - 1) {
          const int lane = __builtin_ctz(found);
          w.candidates.keys.push_back(key_of(x[lane]));
          if (weighed) w.candidates.weights.push_back(e[lane]);
        }
      }
    }
  }

  const Logits& x_;
  const SampleOptions& options_;
  const SampleEdits& edits_;
  int64_t leaves_;
  RowScale plain_, scale_{};
  int64_t row_ = 0;
  const T* at_ = nullptr;
  float temperature_ = 1.0f, least_ = -kInf;
  bool greedy_ = false, changed_ = false, lost_ = false, wrong_edit_ = false;
  Merged raw_, own_, kept_;  // raw; as changed, if it is; without what is cut off, if something is
  std::vector<int64_t> edit_start_, edit_next_;
  std::vector<Edit> edit_;
};

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
