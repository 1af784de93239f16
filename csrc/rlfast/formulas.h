// What the printed formulas are written with: a token, what a formula returns, and the words that V must know.
//
// V is a vector of float32 on the CPU (csrc/rlfast/formula_vec.h, in the namespace of its instruction set) and a float on a
// GPU. Its words: + - * / and unary −; comparisons, whose masks know & and |; choose(mask, yes, no), minimum, maximum (the
// operand that is not NaN, as Triton's), absolute_value, log, exp, expm1, sigmoid, softplus, log1p of [0, 1]; of a float, which
// a hyper-parameter is, log, exp and log1p.
#pragma once
#include <cmath>

#ifdef RLFAST_ISA_NS  // an inline function that two instruction sets share may be merged by the linker
#define RLFAST_FORMULAS_BEGIN namespace rlfast::RLFAST_ISA_NS::formulas {
#define RLFAST_FORMULA inline
#else
#ifndef RLFAST_DEVICE  // the bindings, which read the tables alone
#define RLFAST_DEVICE inline
#endif
#define RLFAST_FORMULAS_BEGIN namespace rlfast::formulas {
#define RLFAST_FORMULA RLFAST_DEVICE
#endif
#define RLFAST_FORMULAS_END }

RLFAST_FORMULAS_BEGIN

// What a surrogate sees of one token; kernels/formulas/token.py says what each is.
template <class V>
struct Token {
  V logp, old_logp, log_ratio, ratio, adv, extra;
};

// A surrogate's value, its derivatives by the log-ratio and by log p, and whether a bound is active.
template <class V>
struct Surrogate {
  V value, d_log_ratio, d_logp, clipped;
};

// A KL estimate and its derivative by log p.
template <class V>
struct Estimate {
  V value, d_logp;
};

// What a score sees of a response, a link of a pair and of a single response; kernels/formulas says what each is.
template <class V>
struct Response {
  V logp, log_ratio, length;
};

template <class V>
struct Pair {
  V chosen, rejected, chosen_length, rejected_length, margin, extra, shared;
};

template <class V>
struct Single {
  V score, desirable, extra, shared;
};

// A score and its derivative by the summed log p; a loss and its derivatives by the scores.
template <class V>
struct Score {
  V value, d_logp;
};

template <class V>
struct PairLoss {
  V value, d_chosen, d_rejected;
};

template <class V>
struct SingleLoss {
  V value, d_score;
};

template <class V, class M>
RLFAST_FORMULA V select(M mask, V yes, V no) {
  return choose(mask, yes, no);
}

RLFAST_FORMULAS_END
