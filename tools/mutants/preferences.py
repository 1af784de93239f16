"""Of the preference losses and the divergences."""

from __future__ import annotations

from mutants.mutant import cpp, cuda, python

CPP = [
    *cpp(
        "csrc/cpu/sequence_sums.h",
        ("w[lane] = «before > shared» ? tail : 1.0f;", "before >= shared"),
        ("part[lane] = «i + lane < n && (!flags || flags[i + lane])»;", "i + lane < n"),
        ("0.0f);\n    y = «only(m, y)»;", "y"),
        ("F y = «only(m, each)»;", "each"),
    ),
    *cpp(
        "csrc/cpu/preference_tile.h",
        ("store(t.slope + i, «mean ? div(s.d_logp.x, n) : s.d_logp.x»);", "s.d_logp.x"),
        ("static_cast<float>(«sums.logp - sums.ref_logp»);", "sums.logp"),
        ("static_cast<float>(«counted(s, begin + i)»);", "tokens_of(s, begin + i).n"),
    ),
    *cpp(
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
    *cpp(
        "csrc/cpu/unpaired_loss.cpp",
        ("mul(«load(r.slope + i)», single.d_score.x)", "set1(1.0f)"),
        ("«both(m, good)», except(m, good)", "good"),
        ("«select(equal(s, s), single.value.x, s)»", "single.value.x"),
    ),
    *cpp(
        "csrc/rlfast/pair_stats.h",
        ("select(«greater(yp, set1(-kInf))», gap, set1(0.0f))", "greater(set1(1.0f), set1(0.0f))"),
        ("value = r.gap - «r.other.log_sum» + r.own.log_sum, other = r.gap;", "-r.other.log_sum"),
        ("r.gap += «gap[l] == kInf» ? gap[l]", "false"),
        ("weight * (gap[l] + sum * («from_own ? apart : -apart»));", "apart"),
        ("add(log, select(up, «u», set1(0.0f)))", "set1(0.0f)"),
        ("fma(select(up, «m.rest», m.beta)", "m.beta"),
    ),
    *cpp(
        "csrc/rlfast/pair_grad.h",
        ("p.ks = static_cast<float>(-g * «(1.0 - measure.beta)»);", "measure.beta"),
        ("away = sub(«sub(gap, set1(g.high))», set1(g.low));", "gap"),
        ("d = sub(mul(p, set1(g.ks)), «mul(q, set1(g.kt))»);", "mul(p, set1(g.kt))"),
        ("return s.softcap ? «mul(d, slope)» : d;", "d"),
    ),
]  # fmt: skip

CUDA = [
    *cuda(
        "csrc/cuda/preference.cuh",
        ("? Score{«s.value / r.length»,", "s.value"),
        ("«s.d_logp / r.length»} : s;", "s.d_logp"),
        ("return {0, first, 0, «boundary(s.cu_seqlens, row + 1, s.length) - first»};",
         "boundary(s.cu_seqlens, row + 1, s.length)"),
        ("each = «(p.end - p.begin + kTile - 1) / kTile * kGroup»;", "(p.end - p.begin) / kTile * kGroup"),
        ("end = «min(begin + each, p.end)»;", "begin + each < p.end ? begin + each : p.end - 1"),
        ("double shortest = «min(count[0], count[1])»;", "count[0]"),
        ("if (bit(on, j) && «before[side] == shortest») begin", "before[side] + 1.0 == shortest"),
        ("before[side] += «bit(on, j)»;", "true"),
        ("if («begin[side] >= 0.0») tails[side]", "begin[side] > 0.0"),
        ("float c = «t + j < tails[side]» ? 1.0f : a.tail;", "t + j <= tails[side]"),
        ("sum[3 * side + 1] += «product(c, y[j])»;", "y[j]"),
        ("sum[3 * side + 2] += «bit(on, j)»;", "1.0"),
        ("r[side] = {float(s[0]), «float(s[0] - s[1])», float(s[2])};", "float(s[0] + s[1])"),
        ("g[j] = «!bit(on, j)» ? 0.0f :", "false"),
        ("0.0f : «t + j < tail_begin» ? d : product(tail, d);", "t + j <= tail_begin"),
        ("load(f, {«i», 0, 0, 1}, 0, 1, x);", "0"),
        ("{logp, logp - number(s.ref_logp, i, 0.0f), «s.lengths ? s.lengths[i] : 1.0f»};", "1.0f"),
        ("numbers = numbers && «s[side].value == s[side].value»;", "true"),
        ("loss += product(term.weight, «numbers ? linked.value : all»);", "linked.value"),
        ("d[side] += product(term.weight, «product(s[side].d_logp, linked.d[side])»);", "linked.d[side]"),
        ("bool used = «row.weight != 0.0f»;", "true"),
        ("row.loss = used ? «product(row.weight, loss)» : 0.0f;", "loss"),
        ("row.d[side] = used ? product(«product(scale, row.weight)», d[side])", "scale"),
        ("row.margin = «number(a.rest.margin, i, 0.0f)»,", "0.0f"),
        ("if («row.weight != 0.0f») Objective", "true"),
        ("double n = a.rest.num_items ? double(*a.rest.num_items) : «a.sum» ? 1.0", "false"),
        ("return tokens ? rows : «ceil_div(rows, kLossThreads)»; }", "rows / kLossThreads"),
        ("for (int64_t unit = piece; unit < «a.units»;", "a.pieces"),
    ),
    *cuda(
        "csrc/cuda/pair_loss.cu",
        ("formulas::Pair<float> pair = {s[0].value, s[1].value, w.length, «l.length»,", "w.length"),
        ("{found.value, {found.d_chosen, «found.d_rejected»}};", "-found.d_chosen"),
        ("sum[kBetter] += «row.reward[0] > row.reward[1]»;", "row.reward[0] >= 0.0f"),
        ("m.loss = float(«scale * sum[kLoss]»);", "sum[kLoss]"),
        ("m.reward_margin = float(each * («sum[kChosenReward] - sum[kRejectedReward]»));", "sum[kChosenReward]"),
        ("double each = 1.0 / «max(sum[kUsed], 1.0)»;", "sum[kUsed]"),
    ),
    *cuda(
        "csrc/cuda/unpaired_loss.cu",
        ("single = {s[0].value, «row.desirable ? 1.0f : 0.0f», row.extra, row.shared};", "1.0f"),
        ("m.undesirable_reward = float(«bad» * sum[kBadReward]);", "good"),
        ("double good = 1.0 / «max(sum[kGood], 1.0)», bad", "max(sum[kBad], 1.0)"),
    ),
]  # fmt: skip

PYTHON = [
    *python(
        "torch", "rlfast/fallback/sequences.py",
        ("beyond = _position(side, mask) «>» _spread", ">=", "tail"),
        ("return count - _spread(side, before)", "return count", "tail"),
        ("d = torch.where(sums.mask, d, torch.zeros(", "d = torch.where(sums.mask | True, d, torch.zeros(", "form"),
    ),
    *python(
        "torch", "rlfast/fallback/pair_loss.py",
        ("d_l + term.weight * («slope_l» * by_l)", "slope_w", "every_score"),
        ("(s_w == s_w) & (s_l == s_l)", "(s_w == s_w)", "nan"),
        ("losses = torch.where(used, weights * total, zero)", "losses = weights * total", "weight_0"),
        ("if rest.num_items is not None:", "if rest.num_items is None:", "normaliser"),
    ),
    *python(
        "torch", "rlfast/preference.py",
        ("loss = out.loss if nll is None or not self.nll else out.loss + «self.nll * nll»", "nll", "elsewhere"),
        ("nll = Part(\"batch_nll\" if by_batch else \"nll\", score=\"total\", mean=«not by_batch»", "by_batch",
         "likelihood"),
    ),
    *python(
        "torch", "rlfast/ops/linear_loss.py",
        ("sums = [torch.zeros(", "sums = [torch.ones(", "every_form"),
        ("            at = end\n", "            at = at\n", "every_form"),
    ),
    *python(
        "torch", "rlfast/preference_linear.py",
        ("rest = rest._replace(num_items=float(max(pairs, 1)))", "rest = rest", "every_form"),
        ("rest = rest._replace(shared=mean_length(tokens, pairs))", "rest = rest", "likelihood"),
        ("first = torch.searchsorted(counted, before + «1»)", "0", "sums"),
        ("inside = first < ends[1:]", "inside = first >= 0", "without_tokens"),
        ("mask = (live if mask is None else «live & mask»).reshape(-1)", "mask", "every_kind"),
    ),
    *python(
        "triton", "kernels/preferences.py",
        ("return tl.where(position «>» shortest, tail, 1.0)", ">=", "tail"),
        ("g = tl.where(inside, d, 0.0)", "g = d + tl.zeros(column.shape, tl.float32)", "form"),
        ("slope = tl.div_rn(s, n), «tl.div_rn(slope, n)»", "slope", "every_score"),
        ("return Sums(logp.to(tl.float32), «(logp - ref)».to(tl.float32)", "logp", "form"),
        ("    if rest.num_items is not None:\n        n = tl.load(rest.num_items)\n", "", "normaliser"),
    ),
    *python(
        "triton", "kernels/pair_loss.py",
        ("d_l + weight * («slope_l» * by_l)", "slope_w", "every_score"),
        ("tl.where((s_w == s_w) & «(s_l == s_l)», value", "(s_w == s_w)", "nan"),
        ("loss = tl.where(used, weights * loss, 0.0)", "loss = weights * loss", "weight_0"),
        ("total(tl.where(used & («r_w > r_l»), 1.0, 0.0))", "r_w >= r_l", "extreme or every_form"),
        ("BETTER)), 5, each * (w - l_))", "BETTER)), 5, each * w)", "every_form"),
    ),
    *python(
        "triton", "kernels/formulas/divergence.py",
        ("g = exp(d_own) * high «-» exp(d_other) * low", "+", "pairwise"),
        ("-rest * p * ((m_over_own «+ high») + low)", "- high", "pairwise"),
        ("tl.where(z_q == float(\"-inf\"), «float(\"inf\")», term)", "term", "row or disjoint"),
        ("return log + tl.where(up, u, 0.0), log «-» tl.where(up, 0.0, u)", "+", "pairwise"),
    ),
]  # fmt: skip
