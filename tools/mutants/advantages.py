"""Of advantages: the affine scan, whitening, groups."""

from __future__ import annotations

from mutants.mutant import cpp, cuda, python

CPP = [
    *cpp(
        "csrc/cpu/scan_steps.h",
        ("s_.started[l] = later && («in_.reverse ? s.first >= s.high : s.first < s.low»),", "true", "fill_a_segment"),
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
    *cpp(
        "csrc/cpu/scan_whiten.h",
        ("«n * freedom»", "n * n"),
        ("freedom = «std::max(n - (w.bessel ? 1.0 : 0.0), 1.0)»;", "n - (w.bessel ? 1.0 : 0.0)"),
        ("low = add(low, «add(sub(high, sub(s, b)), sub(x, b))»);", "zero_double()", "far_from_zero"),
        ("s.add(-square, «-(std::fma(a, a, -square) + 2.0 * a * tail)»);", "square"),
    ),
    *cpp(
        "csrc/cpu/group_advantage.cpp",
        ("const double degrees = static_cast<double>(n() - («bessel ? 1 : 0»));", "1"),
        ("sum += in.weights[m.index[k]] * «m.r[k]»;", "m.mean"),
        ("o.tau * std::log(«sum / static_cast<double>(m.n())»)", "sum"),
        ("«(n * m.mean - m.r[k]) / (n - 1.0)» : b;", "m.mean"),
        ("const double left = squares - «d * d * static_cast<double>(n()) / static_cast<double>(n() - 1)»;", "d * d"),
        ("second = «k != best && m.r[k] > second» ? m.r[k] : second;", "m.r[k] > second"),
        ("if («in.mask && !in.mask[sample]») continue;", "false"),
    ),
]  # fmt: skip

CUDA = [
    *cuda(
        "csrc/cuda/affine_scan.cu",
        ("return {a.p * b.p, «b.q + b.p * a.q»};", "a.q + b.p * b.q"),
        ("for (int w = 0; w < «warp»; ++w) before = then(", "warp - 1"),
        ("s.delta = «reward + gamma * s.ahead - s.value»;", "reward - s.value"),
        ("s.map[c] = {later, «reward + (gamma - later) * s.ahead»};", "reward + gamma * s.ahead"),
        ("if («shared->there[w]») before = shared->value[w];", "false"),
    ),
    *cuda(
        "csrc/cuda/scan_whiten.cuh",
        ("«n += 1.0, off += d, squares += d * d»;", "n += 1.0, off += d, squares += d"),
        ("a.squares + b.squares + «gap * gap * a.n * share»};", "0.0"),
        ("double squares[1] = {«m.squares + m.n * gap * gap»};", "m.squares"),
        ("mask.data[«i + row * (mask.stride - w.in.steps)»];", "i"),
    ),
]  # fmt: skip

PYTHON = [
    *python(
        "torch", "rlfast/fallback/affine_scan.py",
        ("out[:, 1:-1:2] += odd_a[:, :-1] * pairs[:, 1:]", "out[:, 1:-1:2] += odd_a[:, :-1] * pairs[:, :-1]"),
        ("torch.addcmul(even_b, even_a, odd_b)", "torch.addcmul(even_b, odd_a, odd_b)"),
        ("delta = self.rewards + self.gamma * self.ahead - self.values\n        a =",
         "delta = self.rewards + self.ahead\n        a ="),
        ("* (delta + later * after)", "* (delta + later * errors)"),
        ("self.rewards = self.rewards - o.kl_coef", "self.rewards = self.rewards + o.kl_coef"),
    ),
    *python(
        "torch", "rlfast/fallback/group_advantage.py",
        ("return (count * mean - r) / (count - 1).clamp(min=1)", "return (count * mean - r) / count"),
        ("(counts - int(o.bessel))", "(counts - 1)"),
        ("torch.searchsorted(order, x.ids)", "torch.searchsorted(order, x.ids + 1)"),
    ),
    *python(
        "ops", "rlfast/ops/affine_scan.py",
        ("(into * (flow.gamma - _spread(later, x, g))).to(g.dtype)", "(into * flow.gamma).to(g.dtype)"),
        ("coefficients=torch.where(valid, into * state, 0.0)", "coefficients=torch.where(valid, into, 0.0)"),
        ("kl=-o.kl_coef * g_reward", "kl=o.kl_coef * g_reward"),
        ("g_start = g_start + into * flow.gamma * flow.last", "g_start = g_start + into * flow.last"),
    ),
    *python(
        "advantages", "rlfast/advantages/n_step.py",
        ("whole = whole[0] * next_a, whole[1] + whole[0] * next_b", "whole = whole[0] * next_a, whole[1] + next_b"),
    ),
    *python(
        "advantages", "rlfast/advantages/otb.py",
        ("energy = 1.0 - 2.0 * logp", "energy = 1.0 - logp"),
    ),
    *python(
        "advantages", "rlfast/advantages/scan.py",
        ("(1.0 - 1.0 / (alpha * lengths.double().clamp(min=0.0)))", "(1.0 - alpha / lengths.double().clamp(min=0.0))"),
        ("(chosen.whitens if whiten is None else whiten)", "whiten"),
    ),
    *python(
        "advantages", "rlfast/advantages/group.py",
        ("torch.where(freedom > 0, freedom, 1.0)", "freedom"),
        ("Whiten(eps=1e-4, where=\"outside\")", "Whiten(eps=1e-4)"),
    ),
    *python(
        "advantages", "rlfast/reductions.py",
        ("var = square / (count - int(bessel))", "var = square / count"),
        ("functools.partial(total, places=«_places(mask)»)", "None"),
        ("torch.where(valid, out, 0.0).to(x.dtype)", "out.to(x.dtype)"),
        ("var.clamp(min=eps) if where == \"floor\"", "var + eps if where == \"floor\""),
        ("(count + mean.eps).clamp(min=mean.least)", "(count + mean.eps).clamp(min=0.0)"),
    ),
    *python(
        "triton", "kernels/affine_scan.py",
        ("return a * next_a, next_b + next_a * b\n", "return a * next_a, b + next_a * next_b\n", "test_estimator"),
        ("b = tl.where(goes_on, r + (g - g_lam) * v, r + g * v)", "b = r + (g - g_lam) * v", "test_options"),
        ("q_all = a * p, b + a * q\n        state", "q_all = a * p, b + a * q + q\n        state",
         "test_long_rows"),
        ("clipped(ratio, clip_pg) * (delta", "clipped(ratio, clip_rho) * (delta", "test_clips"),
    ),
    *python(
        "triton", "kernels/rows.py",
        ("tl.where(j == first, r + tl.load(x.row_rewards + row), r)", "r + tl.load(x.row_rewards + row)", "whole_row"),
        ("(j > anchor) & (j <= high)", "(j >= anchor) & (j <= high)", "test_estimator"),
        ("v = tl.where(there != 0, v, ahead)", "v = tl.where(there != 0, v, 0.0)", "test_options or long_rows"),
    ),
    *python(
        "triton", "kernels/whiten.py",
        ("tl.sum(squares + n * gap * gap, axis=0)", "tl.sum(squares, axis=0)", "test_whitening"),
        ("rest = tl.load(at + 3, mask=there, other=0.0) - first * off", "rest = tl.load(at + 3, mask=there, other=0.0)",
         "test_whitening"),
        ("tl.where(valid, out, 0.0).to(tl.float32)", "out.to(tl.float32)", "test_whitening"),
    ),
    *python(
        "triton", "kernels/group_advantage.py",
        ("b = (n * mean - r) / tl.maximum(n - 1.0, 1.0)", "b = (n * mean - r) / n", "test_method"),
        ("baseline = tl.where(highs > 1, high, second)", "baseline = second", "test_method"),
        ("baseline = high + tau * tl.log(soft / n)", "baseline = high + tau * tl.log(soft)", "test_soft"),
    ),
]  # fmt: skip
