// The arguments of pair_loss and unpaired_loss as both extensions take them from Python; rlfast/native/preferences.py
// passes them.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "bindings_loss.h"
#include "rlfast/formulas.gen.h"
#include "rlfast/preference.h"

namespace rlfast {

// (logp, ref_logp, mask: fields; addresses of cu_seqlens and lengths; length of a row; whether it has tokens)
inline PreferenceSide preference_side(pybind11::handle x) {
  const Numbers n(x);
  return {loss_field(n[0]),
          loss_field(n[1]),
          loss_flags(n[2]),
          at<const int64_t>(n.address(3)),
          at<const float>(n.address(4)),
          n.integer(5),
          n.integer(6) != 0};
}

struct PreferenceArguments {
  static constexpr int kWidth = 7;
  std::string names[2 * kMostTerms];
  PreferenceCall call{};
  PreferenceSide sides[2];
  PreferenceRest rest{};
  PreferenceOut out{};

  // sides: one or two; rest: margin, extra, shared, weights: fields, and the address of num_items; terms: names of scores
  // and links, whether a score is a mean, their numbers; settings: tail, factor; outputs: addresses of loss, metrics,
  // losses, and of the gradient and the rewards of each side
  PreferenceArguments(pybind11::handle sides_, pybind11::handle rest_, pybind11::handle scores, pybind11::handle links,
                      pybind11::handle means, pybind11::handle numbers, pybind11::handle settings, int sum,
                      pybind11::handle outputs) {
    const Numbers s(sides_), r(rest_), score(scores), link(links), mean(means), of(numbers), set(settings), o(outputs);
    if (score.size() > kMostTerms) throw pybind11::value_error("terms: expected at most 7 losses in a mixture");
    for (Py_ssize_t i = 0; i < s.size(); ++i) {
      sides[i] = preference_side(s[i]);
      out.d_logp[i] = at<float>(o.address(3 + 2 * i)), out.rewards[i] = at<float>(o.address(4 + 2 * i));
    }
    rest = {loss_field(r[0]), loss_field(r[1]), loss_field(r[2]), loss_field(r[3]), at<const float>(r.address(4))};
    call.count = static_cast<int>(score.size()), call.sum = sum;
    for (int k = 0; k < call.count; ++k) {
      PreferenceTerm& t = call.terms[k];
      names[2 * k] = pybind11::cast<std::string>(score[k]), names[2 * k + 1] = pybind11::cast<std::string>(link[k]);
      t.score = names[2 * k].c_str(), t.link = names[2 * k + 1].c_str();
      t.mean = static_cast<int>(mean.integer(k));
      float x[kWidth];
      for (int i = 0; i < kWidth; ++i) x[i] = static_cast<float>(PyFloat_AsDouble(of[k * kWidth + i].ptr()));
      t.weight = x[0];
      std::memcpy(t.score_hyper, x + 1, sizeof t.score_hyper), std::memcpy(t.link_hyper, x + 3, sizeof t.link_hyper);
    }
    call.tail = static_cast<float>(PyFloat_AsDouble(set[0].ptr()));
    call.factor = static_cast<float>(PyFloat_AsDouble(set[1].ptr()));
    if (PyErr_Occurred()) throw pybind11::error_already_set();
    out.loss = at<float>(o.address(0)), out.metrics = at<float>(o.address(1)), out.losses = at<float>(o.address(2));
  }
};

#define RLFAST_PREFERENCE_ARGS                                                                    \
  pybind11::handle rest, pybind11::handle scores, pybind11::handle links, pybind11::handle means, \
      pybind11::handle numbers, pybind11::handle settings, int sum, pybind11::handle outputs, int64_t rows
#define RLFAST_PREFERENCE_RECORDS(sides) sides, rest, scores, links, means, numbers, settings, sum, outputs

// The names of the formulas that have C++: scores, links of pairs, links of single responses.
inline std::vector<std::string> preference_formulas() {
  return {
#define RLFAST_FORMULA_NAME(formula, Hyper) #formula,
      RLFAST_SCORE_FORMULAS(RLFAST_FORMULA_NAME) RLFAST_PAIR_FORMULAS(RLFAST_FORMULA_NAME)
          RLFAST_SINGLE_FORMULAS(RLFAST_FORMULA_NAME)
#undef RLFAST_FORMULA_NAME
  };
}

}  // namespace rlfast
