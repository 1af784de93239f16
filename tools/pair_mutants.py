"""The mistakes planted in the preference losses and in the divergences."""

from __future__ import annotations

from mutants import _cpp, _python

PREFERENCES_CPP = [
    *_cpp(
        "csrc/cpu/sequence_sums.h",
        ("w[lane] = «before > shared» ? tail : 1.0f;", "before >= shared"),
        ("part[lane] = «i + lane < n && (!flags || flags[i + lane])»;", "i + lane < n"),
        ("0.0f);\n    y = «only(m, y)»;", "y"),
        ("F y = «only(m, each)»;", "each"),
    ),
    *_cpp(
        "csrc/cpu/preference_tile.h",
        ("store(t.slope + i, «mean ? div(s.d_logp.x, n) : s.d_logp.x»);", "s.d_logp.x"),
        ("static_cast<float>(«sums.logp - sums.ref_logp»);", "sums.logp"),
        ("static_cast<float>(«counted(s, begin + i)»);", "tokens_of(s, begin + i).n"),
    ),
    *_cpp(
        "csrc/cpu/pair_loss.cpp",
        ("select(«both(equal(s_w, s_w), equal(s_l, s_l))», pair.value.x", "equal(s_w, s_w)"),
        ("d_l = mul(«load(l.slope + i)», pair.d_rejected.x);", "load(w.slope + i)"),
        ("better = tally(better, both(m, «greater(w, l)»));", "at_least(w, l)"),
        (
            "std::min(«counted(*sides_[0], begin + i)», counted(*sides_[1], begin + i));",
            "counted(*sides_[1], begin + i)",
        ),
        (
            "const M m = «unequal(load(t.weights + i), set1(0.0f))»;\n      const F w =",
            "unequal(set1(1.0f), set1(0.0f))",
        ),
        ("static_cast<double>(std::max<int64_t>(«all.pairs», 1));", "int64_t(1)"),
    ),
    *_cpp(
        "csrc/cpu/unpaired_loss.cpp",
        ("mul(«load(r.slope + i)», single.d_score.x)", "set1(1.0f)"),
        ("«both(m, good)», except(m, good)", "good"),
        ("«select(equal(s, s), single.value.x, s)»", "single.value.x"),
    ),
    *_cpp(
        "csrc/rlfast/pair_stats.h",
        ("select(«greater(yp, set1(-kInf))», gap, set1(0.0f))", "greater(set1(1.0f), set1(0.0f))"),
        ("value = r.gap - «r.other.log_sum» + r.own.log_sum, other = r.gap;", "-r.other.log_sum"),
        ("r.gap += «gap[l] == kInf» ? gap[l]", "false"),
        ("weight * (gap[l] + sum * («from_own ? apart : -apart»));", "apart"),
        ("add(log, select(up, «u», set1(0.0f)))", "set1(0.0f)"),
        ("fma(select(up, «m.rest», m.beta)", "m.beta"),
    ),
    *_cpp(
        "csrc/rlfast/pair_grad.h",
        ("p.ks = static_cast<float>(-g * «(1.0 - measure.beta)»);", "measure.beta"),
        ("away = sub(«sub(gap, set1(g.high))», set1(g.low));", "gap"),
        ("d = sub(mul(p, set1(g.ks)), «mul(q, set1(g.kt))»);", "mul(p, set1(g.kt))"),
        ("return s.softcap ? «mul(d, slope)» : d;", "d"),
    ),
]

PREFERENCES_PYTHON = [
    *_python(
        "torch", "rlfast/fallback/sequences.py",
        ("beyond = _position(side, mask) «>» _spread", ">=", "tail"),
        ("return count - _spread(side, before)", "return count", "tail"),
        ("d = torch.where(sums.mask, d, torch.zeros(", "d = torch.where(sums.mask | True, d, torch.zeros(", "form"),
    ),
    *_python(
        "torch", "rlfast/fallback/pair_loss.py",
        ("d_l + term.weight * («slope_l» * by_l)", "slope_w", "every_score"),
        ("(s_w == s_w) & (s_l == s_l)", "(s_w == s_w)", "nan"),
        ("losses = torch.where(used, weights * total, zero)", "losses = weights * total", "weight_0"),
        ("if rest.num_items is not None:", "if rest.num_items is None:", "normaliser"),
    ),
    *_python(
        "torch", "rlfast/preference.py",
        ("loss = out.loss if nll is None or not self.nll else out.loss + «self.nll * nll»", "nll", "elsewhere"),
        ("nll = Part(\"batch_nll\" if by_batch else \"nll\", score=\"total\", mean=«not by_batch»", "by_batch",
         "likelihood"),
    ),
    *_python(
        "torch", "rlfast/ops/linear_loss.py",
        ("sums = [torch.zeros(", "sums = [torch.ones(", "every_form"),
        ("            at = end\n", "            at = at\n", "every_form"),
    ),
    *_python(
        "torch", "rlfast/preference_linear.py",
        ("rest = rest._replace(num_items=float(max(pairs, 1)))", "rest = rest", "every_form"),
        ("rest = rest._replace(shared=mean_length(tokens, pairs))", "rest = rest", "likelihood"),
        ("first = torch.searchsorted(counted, before + «1»)", "0", "sums"),
        ("inside = first < cu_seqlens[1:]", "inside = first >= 0", "sums"),
        ("mask = (live if mask is None else «live & mask»).reshape(-1)", "mask", "every_form"),
    ),
    *_python(
        "triton", "kernels/preferences.py",
        ("return tl.where(position «>» shortest, tail, 1.0)", ">=", "tail"),
        ("g = tl.where(inside, d, 0.0)", "g = d + tl.zeros(column.shape, tl.float32)", "form"),
        ("slope = tl.div_rn(s, sums.length), «tl.div_rn(slope, sums.length)»", "slope", "every_score"),
        ("return Sums(logp.to(tl.float32), «(logp - ref)».to(tl.float32)", "logp", "form"),
        ("    if rest.num_items is not None:\n        n = tl.load(rest.num_items)\n", "", "normaliser"),
    ),
    *_python(
        "triton", "kernels/pair_loss.py",
        ("d_l + weight * («slope_l» * by_l)", "slope_w", "every_score"),
        ("tl.where((s_w == s_w) & «(s_l == s_l)», value", "(s_w == s_w)", "nan"),
        ("loss = tl.where(used, weights * loss, 0.0)", "loss = weights * loss", "weight_0"),
        ("total(tl.where(used & («r_w > r_l»), 1.0, 0.0))", "r_w >= r_l", "extreme or every_form"),
        ("BETTER)), 5, each * (w - l_))", "BETTER)), 5, each * w)", "every_form"),
    ),
    *_python(
        "triton", "kernels/formulas/divergence.py",
        ("g = exp(d_own) * high «-» exp(d_other) * low", "+", "pairwise"),
        ("p * (((d_own - d_other) - high) «- low»)", "+ low", "pairwise"),
        ("-rest * p * ((m_over_own «+ high») + low)", "- high", "pairwise"),
        ("tl.where(z_q == float(\"-inf\"), «float(\"inf\")», term)", "term", "row or disjoint"),
        ("return log + tl.where(up, u, 0.0), log «-» tl.where(up, 0.0, u)", "+", "pairwise"),
    ),
]  # fmt: skip
