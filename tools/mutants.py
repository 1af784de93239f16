"""The mistakes that ``mutate.py`` plants: a file, what stands there, what is put in its place, and perhaps which tests.

In ``old``, «…» marks the expression that changes, where it alone would occur more than once.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One planted mistake."""

    kind: str  # a key of mutate.RUNS
    file: str
    marked: str
    changed: str
    tests: str = ""  # a pytest -k expression; empty: all of the kind

    def parts(self) -> tuple[str, str, str]:
        """(before, the expression, after) of what stands in the file."""
        if "«" not in self.marked:
            return "", self.marked, ""
        before, rest = self.marked.split("«")
        old, after = rest.split("»")
        return before, old, after

    @property
    def old(self) -> str:
        return "".join(self.parts())

    @property
    def new(self) -> str:
        before, _, after = self.parts()
        return self.changed if self.kind in ("cpp", "cuda") else before + self.changed + after

    def __str__(self) -> str:
        return f"{self.file}: {self.parts()[1].strip()} → {self.changed.strip() or 'nothing'}"


def _cpp(file: str, *rows) -> list[Mutant]:
    return [Mutant("cpp", file, *row) for row in rows]


def _cuda(file: str, *rows) -> list[Mutant]:
    return [Mutant("cuda", file, *row) for row in rows]


def _python(kind: str, file: str, *rows) -> list[Mutant]:
    return [Mutant(kind, file, *row) for row in rows]


CPP = [
    *_cpp(
        "csrc/rlfast/row_grad.h",
        ("(«g.g_lse - g.g_sum - centre»)", "g.g_lse + g.g_sum - centre"),
        ("g.b = static_cast<float>(«-scale * g.g_entropy * s.c»)", "scale * g.g_entropy * s.c"),
        ("g.g_entropy * («g.saved_entropy - log_sum»)", "g.saved_entropy"),
        ("scale = «std::exp(-log_sum) * s.chain»;", "std::exp(-log_sum)"),
        ("+ («g.g_lse - (g.g_sum - own)») * p", "g.g_lse - g.g_sum"),
        ("d = «-own * std::expm1(logp)» +", "own * (1.0f - static_cast<float>(p))"),
        ("if («ids[j] == ids[k]») own", "j == k"),
        ("d *= «4.0 * e» /", "2.0 * e"),
        ("«p * (logp + g.saved_entropy)»", "p * logp"),
        ("«kSoftcap ? mul(d, slope) : d»", "d"),
        ("static_cast<float>(«d * s.chain»)", "d"),
    ),
    *_cpp(
        "csrc/rlfast/row_outputs.h",
        ("s.c * («static_cast<double>(t.y) - r.peak»);", "static_cast<double>(t.y)"),
        ("l == t.leaf ? «leaf_scale(t.rest.peak, r, s) * t.rest.sum» :", "scale[l] * leaf[l].sum"),
        ("static_cast<float>(«r.log_sum - s.c * r.weighted / r.sum»)", "r.log_sum + s.c * r.weighted / r.sum"),
        ("«std::log(r.squares) - 2.0 * r.log_sum»", "std::log(r.squares) - r.log_sum"),
        ("«scale[l] * scale[l] * leaf[l].squares»", "scale[l] * leaf[l].squares"),
        ("s.c * r.total / «static_cast<double>(vocab)»", "static_cast<double>(vocab + 1)"),
        ("(«leaf[l].weighted + shift * leaf[l].sum»)", "leaf[l].weighted"),
        ("static_cast<float>(«s.c * r.peak + r.log_sum»)", "r.peak + r.log_sum"),
        ("if («leaf[l].peak == r.top») return false;", "false"),
        ("- r.peak) - «r.log_sum»);", "0.0"),
        ("static_cast<float>(«outside / r.sum»)", "outside"),
        ("if («t.mask && !t.mask[row]»)", "false"),
        ("if («t.ids[row * t.candidates + k] != kIgnoreIndex»)", "true"),
        ("return «t.leaf == -1 ? 0.0 : kNaN»;", "0.0"),
        ("«r.log_sum = std::log(r.sum)»;", "r.log_sum = std::log(r.sum) / std::log(2.0)"),
    ),
    *_cpp(
        "csrc/rlfast/row_stats.h",
        ("s.c = «(s.softcap ? cap : scale == 0 ? 1.0 : std::fabs(scale)) / temperature»;",
         "s.softcap ? cap : scale == 0 ? 1.0 : std::fabs(scale)"),
        ("s.chain = «scale / temperature»;", "scale"),
        ("t.temperatures ? t.temperatures[«row»]", "row ? row - 1 : row"),
        ("load_part(y + i, left, «-kInf»)", "0.0f"),
        ("padded(y, n - i, «-kInf»)", "0.0f"),
        ("t.first &= «y[i] < t.y»;", "true"),
        ("scale > 0 ? 1.0f : scale < 0 ? «-1.0f» : 0.0f", "1.0f"),
    ),
    *_cpp(
        "csrc/cpu/linear_backward.h",
        ("depth_, «leaf > 0»);", "false"),
        ("r < «std::min(count_, i + 16)»;", "std::min(count_, i + 15)"),
    ),
    *_cpp(
        "csrc/rlfast/row_outputs.h",
        ("return static_cast<int>(«left < kLeaf ? left : kLeaf»);", "left < kLeaf ? left - 1 : kLeaf"),
    ),
    *_cpp(
        "csrc/cpu/linear_token_logps.cpp",
        ("id[k] < «leaf * kLeaf + n»;", "leaf * kLeaf + n - 1"),
        ("kept_ + «i» * vocab + leaf * kLeaf : d", "(i ? i - 1 : i)"),
        ("«id / kLeaf == leaf»", "id / kLeaf == leaf && id % kLeaf != n - 1"),
    ),
    *_cpp(
        "csrc/cpu/gemm.h",
        ("const bool more = «accumulate || k > 0»;", "accumulate"),
        ("const int64_t deep = «std::min(partial, depth - k)»;", "depth - k > partial ? partial : depth - k - 1"),
    ),
    *_cpp(
        "csrc/cpu/linear_head.h",
        ("head_.weight) + «v * head_.stride_weight»;", "v * head_.depth"),
        ("c[j] += «to_float(bias[j])»;", "0.0f"),
    ),
    *_cpp(
        "csrc/rlfast/formula_vec.h",
        ("add(head, fma(square, p, «sub(r, sub(head, one))»));", "set1(1e-6f)"),
        ("grown = fma(half, q, «sub(half, set1(0.5f))»);", "sub(half, set1(0.4999999f))"),
        ("V(min(a.x, «set1(b)»)); }", "set1(2.0f * b)"),
        ("V minimum(V a, V b) { return V(«min_number(a.x, b.x)»); }", "a.x"),
        ("V maximum(V a, V b) { return V(«max_number(a.x, b.x)»); }", "a.x"),
        ("mul(fma(series, z, «set1(2.0f / 3.0f)»), z);", "set1(0.66f)"),
    ),
    *_cpp(
        "csrc/cpu/loss_stages.h",
        ("return min(set1(o.s.unit_high), «max(set1(o.s.unit_low), x)»); }", "x"),
        ("«both(at_least(x, low), at_least(high, x))»; }", "at_least(x, low)"),
        ("if (kind == 2) return mul(set1(«0.5f»), mul(d, d));", "1.0f"),
        ("if (o.plan.gate != kAtToken) return «when(q.open)»;", "every()"),
        ("return min(set1(o.s.weight_high), «max(set1(o.s.weight_low), rho)»);", "rho"),
        ("«both(m, gate_of(drift_of(v, i, m), q, o))»);", "m"),
        ("low = select(«greater(adv, zero)»,", "greater(zero, adv)"),
        ("high = select(«greater(zero, adv)»,", "greater(adv, zero)"),
        ("if (o.weights) k = «mul(k, v.weights[i])»;", "k"),
        ("if (o.keep) open = «both(open, v.keep[i])»;", "open"),
        ("both(open, «at_least(v.adv[i], set1(0.0f))»);", "every()"),
        ("o.applied ? «mul(r, load(t.applied + i))» : r", "r"),
        ("k3.add(«sub(e.grown, x)»);", "e.grown"),
        ("by_logp = o.plan.kl_through ? «negative(d)» :", "d"),
        ("by_logp = add(mul(r, by_logp), «only(token.inside, value)»);", "value"),
        ("store(t.kl_logp + i, «mul(beta, only(m, by_logp))»);", "only(m, by_logp)"),
        ("both(inside, «within(unit, set1(o.s.unit_low), set1(o.s.unit_high))»);", "every()"),
        ("value = «mul(k, value)», by_x", "value"),
        ("«either(at_bound, except(used, token.inside))» : at_bound;", "at_bound"),
        ("low = tally(low, both(clipped, «greater(one, r)»))", "greater(r, one)"),
        ("by_logp = add(by_logp, «only(inside, by_x)»);", "by_x"),
        ("const M m = v.mask[i], kept = «by_keep ? both(m, v.keep[i]) : m»;", "m"),
        ("inside = «o.bounded ? log_ratio(v, i, m, o).inside : m»;", "m"),
        ("select(«o.rollout ? gate_of(d, q, o) : every()», y,", "every()"),
    ),
    *_cpp(
        "csrc/cpu/loss_tile.h",
        ("return {s.row, s.begin + done, «n»};", "n < kLanes ? n : n - kLanes"),
        ("std::fill_n(buffer, «span.n», uint8_t{1});", "view.padded"),
        ("f.old_logp.data ? values(f.old_logp, fields[1]) : «v.logp»;", "Values{kZeros, 0}"),
        ("total_ = accumulate(total_, «few_»);\n    few_", "set1(0.0f)"),
    ),
    *_cpp(
        "csrc/cpu/token_loss.cpp",
        ("o.beta = s.beta * («f.coefs ? f.coefs[0] : 1.0f»);", "1.0f"),
        ("if (o.plan.reduce == kSeqSumOverMaxLen) n *= «o.s.max_len»;", "1.0f"),
        ("? static_cast<double>(«f.rows»)\n", "sequences"),
        ("/ («level == kAtSeqMean ? n : 1.0»); };", "n"),
        ("q.c = 1.0f / static_cast<float>(«std::max<int64_t>(q.count, 1)»);", "q.count + 1"),
        ("q.strayed = «!(reduce_add(sums.moved) / n <= o_.s.off_policy)»;", "false"),
        ("double unit = reduce_add(sums.x) + «reduce_add(sums.log_weight)»;", "0.0"),
        ("static_cast<float>(«pull * q.c * o_.scale / n»);", "pull * q.c * o_.scale"),
        ("if (o_.pulled_back && out_.dlogp && «q.inside») {", "true"),
        ("part.kl += kl, part.kl_part += «q.c * kl»;", "kl"),
        ("part.policy += «q.c * taken(kPolicy)»;", "taken(kPolicy)"),
        ("o_.keep && o_.entropy ? «all.kept» : all.tokens;", "all.tokens"),
    ),
    *_cpp(
        "csrc/cpu/scan_steps.h",
        ("return p == 0.0 ? q : «std::fma(p, carry, q)»;", "std::fma(p, carry, carry)", "long_rows"),
        ("to->now[c][lane] = g * («1.0 - l»);", "1.0"),
        ("const D x = min(most, least), magic = set1_double(«0x1.8p52»)", "0x1.8p51"),
        ("next = fma(mul(later[h], c), ahead, fma(rho, delta, «value»));", "zero_double()"),
        ("a = mul(«min(clip_pg, ratio)», fma(later[h], ahead, delta));", "rho"),
        ("next = fma(«later[h]», g[h], fma(now[h], v[h], r));", "now[h]"),
        ("a = sub(«next», value);", "g[h]"),
        ("v[h] = select(valid, value, «v[h]»);", "zero_double()"),
        ("if (in.kl.data) r = «sub(r, mul(set1_double(in.kl_coef), token(x.kl)))»;", "token(x.kl)"),
        ("if (in.done.data) restart(nonzero(select(valid, token(x.done), zero_double())), «zero_double()»);",
         "at(s->value)"),
        ("update = in.zero ? «nonzero(token(x.there))» : valid;", "valid"),
        ("*back = select(valid, «next[chains - 1]», zero_double());", "next[0]"),
    ),
    *_cpp(
        "csrc/cpu/scan_whiten.h",
        ("«n * (n - (w.bessel ? 1.0 : 0.0))»", "n * n"),
        ("low = add(low, «add(sub(high, sub(s, b)), sub(x, b))»);", "zero_double()", "far_from_zero"),
        ("s.add(-square, «-(std::fma(a, a, -square) + 2.0 * a * tail)»);", "square"),
    ),
    *_cpp(
        "csrc/cpu/group_advantage.cpp",
        ("const double degrees = static_cast<double>(n() - («bessel ? 1 : 0»));", "1"),
        ("sum += in.weights[m.index[k]] * «m.r[k]»;", "m.mean"),
        ("o.tau * std::log(«sum / static_cast<double>(m.n())»)", "sum"),
        ("«(n * m.mean - m.r[k]) / (n - 1.0)» : b;", "m.mean"),
        ("const double left = squares - «d * d * static_cast<double>(n()) / static_cast<double>(n() - 1)»;", "d * d"),
        ("second = «k != best && m.r[k] > second» ? m.r[k] : second;", "m.r[k] > second"),
        ("if («in.mask && !in.mask[sample]») continue;", "false"),
    ),
    *_cpp(
        "csrc/cpu/ranked_forms.h",
        ("store(z + j * kLanes, z_j), peak = select(g.valid(j), «max(peak, z_j)», peak);", "peak"),
        ("log1p_of(«select(equal(own, peak), away, sub(total, one))»)", "away"),
        ("g.gain(i, negative(mul(t, «lost.value()»)));", "away"),
        ("{add(max(zero, z), log1p_of(e)), div(«select(greater(zero, z), e, one)», add(one, e))}", "one"),
        ("g.gain(i, mul(load(p + i * kLanes), «sub(gap(i), value)»));", "gap(i)"),
    ),
    *_cpp(
        "csrc/cpu/ranked_loss.cpp",
        ("const float others = «t.count[lane] - 1.0f»;", "t.count[lane]"),
        ("for (; j > 0 && «key(a) > key(c[j - 1])»; --j)", "key(a) >= key(c[j - 1])"),
    ),
]  # fmt: skip

# The CUDA source as C++, under csrc/tests/simt.h.
CUDA = [
    *_cuda(
        "csrc/cuda/row_math.cuh",
        ("x = product(softcap, «tanhf(x / softcap)»);", "x / softcap"),
        ("return {d, «exponential(d)»};", "1.0f"),
        ("float d = «divided(scale)»;", "scale"),
        ("return product(d, «4.0f * t» /", "2.0f * t"),
    ),
    *_cuda(
        "csrc/cuda/forward.cuh",
        ("float sum = inside && «l == id / kLeaf» ?", "false"),
        ("beaten |= «l < id / kLeaf» &&", "false"),
        ("sums.ex = fmaf(w.weight, «fmaf(e, w.distance, stats[kSumEX * f.leaves + l])», sums.ex);",
         "stats[kSumEX * f.leaves + l]"),
        ("fmaf(«product(w.weight, w.weight)», stats[kSumEE", "w.weight"),
        ("float entropy = «log_sum - ex / total»;", "log_sum + ex / total"),
        ("o.log_sum_sq_probs[row] = «logf(ee) - 2.0f * log_sum»;", "logf(ee) - log_sum"),
        ("z / «float(f.logits.vocab)» + poison", "float(f.logits.vocab + 1)"),
        ("o.lse[row] = «peak + log_sum»;", "log_sum"),
    ),
    *_cuda(
        "csrc/cuda/backward.cuh",
        ("if («ids[other] == ids[k]») hit", "other == k"),
        ("t.plain ? g(v[j]) : product(g(t(v[j])), «t.slope(v[j])»);", "1.0f"),
        ("v[j] = «ids[k] == column + j» ? exact : v[j];", "false"),
    ),
    *_cuda(
        "csrc/cuda/loss_tokens.cuh",
        ("boundary(f, sequence) / a.tile + «sequence»", "0"),
        ("if («first_piece(a, middle) <= index»)", "first_piece(a, middle) < index"),
        ("x[j] = «bit(on, j)» ? x[j] : 0.0f;", "true"),
        ("if (j < live && «!at[j]») bits", "at[j]"),
        ("(word & 1) | («word >> 7 & 2») |", "word >> 6 & 2"),
        ("return gradient + p.row * «a.call.fields.length» + p.first + t;", "a.call.fields.logp.stride"),
        ("!maximum ? a + b : «a != a || a > b» ? a : b;", "a > b"),
        ("for (int i = «1»; i < kParts; ++i)", "2"),
    ),
    *_cuda(
        "csrc/cuda/loss_math.cuh",
        ("return «x != x ? 0.0f : clamped(x, -FLT_MAX, FLT_MAX)»;", "clamped(x, -FLT_MAX, FLT_MAX)"),
        ("return «open ? weight : 0.0f»; }", "weight"),
        ("return plan.gate_kind == 2 ? «0.5f * drift * drift» :", "drift * drift"),
        ("float drift = «c.fields.rollout_logp.data» ?", "c.fields.logp.data"),
        ("float low = c.plan.signed_bounds && «adv > 0.0f» ?", "adv < 0.0f"),
        ("{clamped(raw, low, high), «within(raw, low, high)»};", "true"),
        ("{found.value, c.plan.kl_through ? «-d» : found.d_logp", "d"),
        ("float r = c.plan.kl_ratio == 1 ? «ratio» :", "expf(x.x)"),
        ("kl.d_unit = «kl.value»;", "found.value"),
        ("kl.d_logp += «fabsf(kl.value) < c.formulas.kl_hyper[1] ? kl.value : 0.0f»;", "kl.value"),
        ("kl.d_logp += «x.moves ? kl.value : 0.0f»;", "kl.value"),
    ),
    *_cuda(
        "csrc/cuda/token_loss.cu",
        ("plan.weight == kAtSeqMean ? «sum[1] / count» : sum[1]", "sum[1]"),
        ("plan.gate == kAtSeqMean ? «sum[2] / count» : sum[2]", "sum[2]"),
        ("if (!bit(g.on, j) || («plan.gate_masks && !rho.open»)) continue;", "false"),
        ("sampled = «c.fields.rollout_logp.data» ?", "c.fields.ref_logp.data"),
        ("s.unit = float(plan.unit == kUnitSeqSum ? «sum[2]» :", "sum[2] / s.count"),
        ("s.on_policy = «float(sum[3] / s.count)» <=", "float(sum[3])"),
        ("c.settings.entropy_coef * («coefs ? coefs[1] : 1.0f»)", "coefs ? coefs[0] : 1.0f"),
        ("bool on = bit(g.on, j) && («rho[j].open || !plan.gate_masks»)", "true"),
        ("(«seen[j].adv >= 0.0f || s.on_policy») && multiplier", "seen[j].adv > 0.0f"),
        ("= («plan.weight_in_ratio ? 1.0f : rho[j].applied()») *", "rho[j].applied()"),
        ("d_unit += «coef.beta * kl.d_unit», d +=", "kl.d_unit"),
        ("plan.unit == kUnitToken ? «x[j].moves» && within(x[j].x", "true"),
        ("bool own = moves && («plan.unit == kUnitToken || plan.unit == kUnitSeqMeanThrough»);",
         "plan.unit == kUnitToken"),
        ("d_logp[j] = on ? «share» * (d", "1.0f"),
        ("d_entropy[j] = «-coef.entropy» *", "coef.entropy"),
        ("float clipped = «!x[j].moves ? 1.0f : part[j].clipped»,", "part[j].clipped"),
        ("(plan.weight_in_ratio ? ratio : «ratio * rho[j].applied()»,", "ratio * rho[j].weight"),
        ("sum.k3 += «expm1f(x[j].x) - x[j].x»;", "(expf(x[j].x) - 1.0f) - x[j].x"),
        ("clipped != 0.0f && «ratio >= 1.0f»;", "ratio > 1.1f"),
        ("bool open = «!c.plan.gate_masks || correction(c, s, g.old_logp[j], g.rollout[j]).open»;", "true"),
        ("&& open && «log_ratio(c, g.logp[j], g.old_logp[j], g.adv[j]).moves») out[j]", "true"),
        ("/ («plan.unit == kUnitSeqMean ? s.count : 1.0f»)));", "s.count"),
        ("total[kSumKlPart] = «share * total[kSumKl]»;", "total[kSumKl]"),
        ("total[kSumPolicy] *= «share»;", "1.0"),
        ("any |= «__ldcg(a.partial + kCountTokens * a.pieces + piece) > 0.0»;", "true"),
        ("if (c.fields.num_items) n = «*c.fields.num_items»;", "n"),
        ("n *= «c.settings.max_len»;", "1.0"),
        ("sequences = «c.plan.count_empty» ?", "false"),
        ("c.settings.entropy_factor / «max(total[kCountKept], 1.0)» :", "max(tokens, 1.0)"),
        ("atomicInc(finished, «gridDim.x - 1») == gridDim.x - 1;", "gridDim.x"),
    ),
    *_cuda(
        "csrc/cuda/affine_scan.cu",
        ("return {a.p * b.p, «b.q + b.p * a.q»};", "a.q + b.p * b.q"),
        ("for (int w = 0; w < «warp»; ++w) before = then(", "warp - 1"),
        ("s.delta = «reward + gamma * s.ahead - s.value»;", "reward - s.value"),
        ("s.map[c] = {later, «reward + (gamma - later) * s.ahead»};", "reward + gamma * s.ahead"),
        ("if («shared->there[w]») before = shared->value[w];", "false"),
    ),
]  # fmt: skip

PYTHON = [
    *_python(
        "torch", "rlfast/fallback/token_logps.py",
        ("logp = -torch.logaddexp(", "logp = torch.logaddexp("),
        ("others = e.scatter(-1, one, 0.0).sum(-1)", "others = e.sum(-1)"),
        ("entropy = log_sum - (", "entropy = log_sum + ("),
        ("torch.logsumexp(2 * (x - log_sum.unsqueeze(-1)), -1)", "torch.logsumexp(x - log_sum.unsqueeze(-1), -1)"),
        ("x = z - peak.unsqueeze(-1)", "x = z"),
        ("put(\"aux\", row.mean_logits, z.mean(-1))", "put(\"aux\", row.mean_logits, x.mean(-1))"),
        ("x == 0, index, z.shape[-1]).amin(-1", "x == 0, index, -1).amax(-1"),
        ("e.scatter(-1, head, 0.0).sum(-1) / total", "e.scatter(-1, head, 0.0).sum(-1)"),
        ("p * (log_p + aux[row.entropy][rows].unsqueeze(-1))", "p * log_p"),
        ("g = -g_entropy *", "g = g_entropy *"),
        ("g = g + g_lse * p", "g = g_lse * p"),
        ("own * torch.expm1(logp)", "own * (logp.exp() - 1)"),
        (" - others * logp.exp()", ""),
        ("g = g - g_logp.sum(-1, keepdim=True) * p", "g = g - g_logp[:, :1] * p"),
        ("g = g / torch.cosh(x).square()", "g = g / torch.cosh(x)"),
        ("return g * transform.logit_scale if", "return g if"),
        ("counted = counted & mask.reshape(-1, 1)", "counted = counted"),
        ("ids != -100", "ids != -101"),
        ("torch.where(counted.any(-1, keepdim=True), g, torch.zeros_like(g))", "g"),
        ("z = z * transform.logit_scale", "z = z"),
        ("peak == -torch.inf, torch.zeros_like(peak), peak", "peak == torch.inf, torch.zeros_like(peak), peak"),
    ),
    *_python(
        "torch", "rlfast/fallback/linear_token_logps.py",
        ("sums[1].addmm_(g.T,", "sums[1].copy_(g.T @ hidden[rows].to(dtype)) if rows.start else sums[1].addmm_(g.T,"),
        ("torch.where(live, hidden[rows].to(dtype), 0.0)", "hidden[rows].to(dtype)"),
        ("sums[2] += g.sum(0)", "sums[2] += g[:-1].sum(0)"),
        ("else z.add_(bias.to(dtype))", "else z"),
        ("z = hidden.to(dtype) @ weight.to(dtype).T", "z = (hidden @ weight.T).to(dtype)"),
        ("kept[rows] = logits", "kept[rows] = logits.bfloat16()"),
    ),
    *_python(
        "torch", "rlfast/fallback/affine_scan.py",
        ("out[:, 1:-1:2] += odd_a[:, :-1] * pairs[:, 1:]", "out[:, 1:-1:2] += odd_a[:, :-1] * pairs[:, :-1]"),
        ("torch.addcmul(even_b, even_a, odd_b)", "torch.addcmul(even_b, odd_a, odd_b)"),
        ("delta = self.rewards + self.gamma * self.ahead - self.values\n        a =",
         "delta = self.rewards + self.ahead\n        a ="),
        ("* (delta + later * after)", "* (delta + later * errors)"),
        ("self.rewards = self.rewards - o.kl_coef", "self.rewards = self.rewards + o.kl_coef"),
    ),
    *_python(
        "torch", "rlfast/fallback/group_advantage.py",
        ("return (count * mean - r) / (count - 1).clamp(min=1)", "return (count * mean - r) / count"),
        ("(counts - int(o.bessel))", "(counts - 1)"),
        ("torch.searchsorted(order, x.ids)", "torch.searchsorted(order, x.ids + 1)"),
    ),
    *_python(
        "ops", "rlfast/ops/affine_scan.py",
        ("ahead = into * (flow.gamma - later)  #", "ahead = into * flow.gamma  #"),
        ("coefficients=torch.where(valid, into * state, 0.0)", "coefficients=torch.where(valid, into, 0.0)"),
        ("kl=-o.kl_coef * g_reward", "kl=o.kl_coef * g_reward"),
        ("g_start = g_start + into * flow.gamma * flow.last", "g_start = g_start + into * flow.last"),
    ),
    *_python(
        "advantages", "rlfast/advantages/n_step.py",
        ("whole = whole[0] * next_a, whole[1] + whole[0] * next_b", "whole = whole[0] * next_a, whole[1] + next_b"),
    ),
    *_python(
        "advantages", "rlfast/advantages/otb.py",
        ("energy = 1.0 - 2.0 * logp", "energy = 1.0 - logp"),
    ),
    *_python(
        "advantages", "rlfast/advantages/scan.py",
        ("(1.0 - 1.0 / (alpha * lengths.double().clamp(min=0.0)))", "(1.0 - alpha / lengths.double().clamp(min=0.0))"),
        ("(chosen.whitens if whiten is None else whiten)", "whiten"),
    ),
    *_python(
        "advantages", "rlfast/advantages/group.py",
        ("torch.where(freedom > 0, freedom, 1.0)", "freedom"),
        ("Whiten(eps=1e-4, where=\"outside\")", "Whiten(eps=1e-4)"),
    ),
    *_python(
        "advantages", "rlfast/reductions.py",
        ("var = total(centred * centred) / (count - int(bessel))", "var = total(centred * centred) / count"),
        ("var.clamp(min=eps) if where == \"floor\"", "var + eps if where == \"floor\""),
        ("(count + mean.eps).clamp(min=mean.least)", "(count + mean.eps).clamp(min=0.0)"),
    ),
    *_python(
        "ops", "rlfast/ops/token_logps.py",
        ("ctx.spent = True", "ctx.spent = False"),
        ("return out.logp, out.lse, out.entropy", "return out.lse, out.logp, out.entropy"),
    ),
    *_python(
        "ops", "rlfast/ops/linear_token_logps.py",
        ("return torch.autocast(device, enabled=False) if", "return nullcontext() if"),
    ),
    *_python(
        "ops", "rlfast/logps.py",
        ("mask if mask.dtype == torch.bool else mask != 0", "mask if mask.dtype == torch.bool else mask > 1"),
        ("saved(row.mean_logits)", "saved(row.log_sum)"),
    ),
    *_python(
        "validate", "rlfast/logps.py",
        ("high >= vocab or low < 0", "high > vocab or low < 0"),
    ),
    *_python(
        "validate", "rlfast/validate.py",
        ("if not 0 < x < math.inf:", "if not 0 <= x < math.inf:"),
    ),
    *_python(
        "triton", "kernels/formulas/logit.py",
        ("return -softplus((peak - z) + tl.log(total))", "return softplus((peak - z) + tl.log(total))", "pairwise"),
        ("return -softplus((peak - z)", "return -softplus((z - peak)", "pairwise"),
        ("return g_lse * p - g_entropy", "return g_lse * p + g_entropy", "pairwise"),
        ("p * (log_p + entropy)", "p * log_p", "pairwise"),
        ("tl.div_rn(4.0 * q,", "tl.div_rn(2.0 * q,", "pairwise"),
        ("g = tl.div_rn(g, temperature)", "g = g", "pairwise"),
        ("g = g * logit_scale", "g = g", "pairwise"),
        ("z = z * logit_scale", "z = z", "pairwise"),
    ),
    *_python(
        "triton", "kernels/leaves.py",
        ("squares += weight * weight *", "squares += weight *", "rising"),
        (" + distance * part)", ")", "rising"),
        ("entropy = tl.where(live, log_sum - tl", "entropy = tl.where(live, log_sum + tl", "pairwise"),
        ("tl.log(squares) - 2.0 * log_sum", "tl.log(squares) - log_sum", "pairwise"),
        ("others = tl.where(chosen, float(\"-inf\"), z)", "others = z", "pairwise or row_05"),
        ("live = live & (tl.load(tokens.mask", "live = live | (tl.load(tokens.mask", "pairwise"),
        ("first = tl.where(here > peak, leaf, first)", "first = tl.where(here >= peak, leaf, first)", "ties"),
        ("tl.where(peak == float(\"-inf\"), 0.0, peak)", "peak", "minus_inf or possible"),
        ("return column < limit", "return column <= limit", "pairwise"),
        ("mean = tl.div_rn(plain, tl.cast(sizes.vocab,", "mean = tl.div_rn(plain, tl.cast(sizes.leaves,", "pairwise"),
    ),
    *_python(
        "triton", "kernels/token_logps.py",
        ("-others * p - own * expm1(logp)", "-others * p + own * expm1(logp)", "pairwise"),
        ("-others * p - own * expm1(logp)", "own - (own + others) * p", "row_05"),
        ("            others += g", "            others += 0.5 * g", "candidates"),
        ("g = -total * p", "g = total * p", "pairwise"),
    ),
    *_python(
        "triton", "kernels/linear_token_logps.py",
        (
            "hidden_pieces = pieces(without_skipped(hidden, targets, mask))",
            "hidden_pieces = pieces(hidden)",
            "garbage or absent",
        ),
        ("g_weight[columns] = total_weight", "g_weight[columns] = total_weight.bfloat16()", "pairwise"),
    ),
    *_python(
        "triton", "kernels/topk.py",
        ("tl.store(out.tail_mass + row, mass * exp(-log_sum))", "tl.store(out.tail_mass + row, mass)", "pairwise"),
        ("(best - peak) - log_sum", "(best - peak)", "pairwise"),
        ("tl.where(value == best, ids, NO_ID)", "tl.where(value == best, NO_ID - ids, NO_ID)", "pairwise or ties"),
    ),
    *_python(
        "triton", "kernels/affine_scan.py",
        ("return a * next_a, next_b + next_a * b\n", "return a * next_a, b + next_a * next_b\n", "test_estimator"),
        ("b = tl.where(goes_on, r + (g - g_lam) * v, r + g * v)", "b = r + (g - g_lam) * v", "test_options"),
        ("q_all = a * p, b + a * q\n        state", "q_all = a * p, b + a * q + q\n        state",
         "test_long_rows"),
        ("clipped(ratio, clip_pg) * (delta", "clipped(ratio, clip_rho) * (delta", "test_clips"),
    ),
    *_python(
        "triton", "kernels/rows.py",
        ("tl.where(j == first, r + tl.load(x.row_rewards + row), r)", "r + tl.load(x.row_rewards + row)", "whole_row"),
        ("(j > anchor) & (j <= high)", "(j >= anchor) & (j <= high)", "test_estimator"),
        ("v = tl.where(there != 0, v, ahead)", "v = tl.where(there != 0, v, 0.0)", "test_options or long_rows"),
    ),
    *_python(
        "triton", "kernels/group_advantage.py",
        ("b = (n * mean - r) / tl.maximum(n - 1.0, 1.0)", "b = (n * mean - r) / n", "test_method"),
        ("baseline = tl.where(highs > 1, high, second)", "baseline = second", "test_method"),
        ("baseline = high + tau * tl.log(soft / n)", "baseline = high + tau * tl.log(soft)", "test_soft"),
    ),
    *_python(
        "torch", "kernels/formulas/ranked.py",
        ("tl.where(n > 0.0, (1.0 + rest) * tl.exp2(-n) - 1.0, rest)", "rest * tl.exp2(-n)", "test_every_row"),
        ("tl.where(own >= peak, rest, (here + rest) - 1.0)", "rest", "test_every_row"),
        ("g.valid & (g.place < h.top)", "g.valid", "test_every_row or option"),
        ("tl.sum(p * t, 1) - «most» * tl.sum(p, 2)", "1.0", "test_every_row"),
        ("better = g.ahead & («g.reward[:, :, None] > g.reward[:, None, :]»)\n",
         "g.reward[:, :, None] == g.reward[:, :, None]", "test_every_row or ties"),
        ("p * («gap - value[:, None]»)", "gap", "test_every_row"),
        ("each * logistic(g.x) - q * «logistic(-g.x)»", "logistic(g.x)", "test_every_row"),
    ),
    *_python(
        "torch", "rlfast/fallback/ranked_loss.py",
        ("ahead = (i > j) | ((i == j) & (slot.unsqueeze(1) «<» slot))", ">", "test_every_row or ties"),
        ("used = (weights != 0) & (group.count > 1)", "used = weights != 0", "small"),
        ("torch.where(y == y, 0.0, y)", "torch.where(y == y, 0.0, 0.0)", "nan"),
    ),
    *_python(
        "triton", "kernels/ranked_loss.py",
        ("(i == j) & (slot[None, :, None] «<» slot[None, None, :])", ">", "test_every_row or ties"),
        ("bad = tl.where(tile.size > K, float(\"nan\"), bad)", "bad = bad", "bound"),
        ("(g.count - 1.0) * (g.count - 1.0)", "(g.count - 1.0)", "test_every_row or option"),
        ("used = (group < rows) & (weights != 0.0) & («g.count > 1.0»)", "g.count > 0.0", "small"),
    ),
    *_python(
        "trl", "rlfast/integrations/trl.py",
        ("softcap=final_logit_softcapping", "softcap=None"),
        ("logit_scale=logit_scale,", "logit_scale=1.0,"),
        ("            temperature=temperature,", "            temperature=1.0,"),
    ),
    *_python(
        "trl", "rlfast/integrations/trl_preference.py",
        ("lambda _, __, out, to=outputs: «to».append(out)", "outputs"),
        ("return (loss, theirs[1]) if return_outputs else loss", "return loss"),
        ("trainer.router_aux_loss_coef * out.aux_loss", "out.aux_loss"),
        ("out.log_probs[:, «1 - mask.shape[1]» :]", "1"),
        ("if loss_type in SMOOTHED:", "if True:"),
        ("abs(self.alpha - 1) < 1e-6", "False"),
        ("score_hyper=hyper, weight=«weight»)", "part.weight"),
        ("alike = [row for row in rows if «row.sort == sort»]", "True"),
        ("torch.mul(*of.chunk(2))", "of.chunk(2)[0]"),
        ("mask«.sum(1).clamp(min=1)»", "[:, 1:].sum(1)"),
        ("logps.chunk(2)[0].sum() / «counted.chunk(2)[0].sum()»", "len(logps)"),
        ("counted.cumsum(1) «>» shorter[:, None]", ">="),
        ("float(trainer.desirable_weight), float(trainer.undesirable_weight)", "1.0, 1.0"),
        ("_scored(seen.policy)«[int(bool(trainer.calculate_KL))]»", "[0]"),
        ("trainer.args.center_rewards_coefficient or 0.0", "0.0"),
        ("margin=inputs.get(\"margin\")", "margin=None"),
    ),
]  # fmt: skip
