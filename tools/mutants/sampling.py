"""Of sampled tokens."""

from __future__ import annotations

from mutants.mutant import cpp, python

CPP = [
    *cpp(
        "csrc/rlfast/noise.h",
        ("low += 0x9E3779B9u, high += «0xBB67AE85u»;", "0xBB67AE84u"),
        ("static_cast<uint32_t>(«first / 4»)", "first / 4 + 1"),
        ("n > 0.0 ? static_cast<uint32_t>(«n < 0x1p24 ? n : 0x1p24 - 1.0») * kWordOfNumber : 0", "0x1p24 - 9.0"),
        ("select(low, set1(0.0f), «sub(sub(one, y), v)»)", "set1(0.0f)"),
    ),
    *cpp(
        "csrc/cpu/sample_cut.h",
        ("if («above + weight_[bucket] >= wanted») break;", "above + weight_[bucket] > wanted"),
        ("const uint32_t u = key & 0x80000000u ? key & 0x7fffffffu : «~key»;", "key"),
        ("if («!(float_of_key(keys[i]) >= least)») continue;", "!(float_of_key(keys[i]) > least)"),
    ),
    *cpp(
        "csrc/cpu/sample_race.h",
        ("(other.value == value && «other.id < id»)", "other.id > id"),
        ("(leader.value - «kMostNoise»)", "6.0f"),
        ("if («column >= n || !(y[column] >= at.column)») continue;", "column + 1 >= n || !(y[column] >= at.column)"),
        ("«1.0001» * std::exp(distance(y[column]) - leader.value)", "0.5"),
        ("const Leader challenger{value[lane], first + «half * kLanes + lane»};", "half * kLanes + (lane ^ 1)"),
    ),
    *cpp(
        "csrc/cpu/sample_row.h",
        ("static_cast<uint32_t>(words[i / 32]) >> «(i % 32)»", "(i % 16)"),
        ("while («y[at] != top») ++at;", "y[at] < top - 1.0f"),
        ("const bool by_count = «k > 0 && k < x_.vocab», by_mass", "k > 0 && k < x_.vocab - 1"),
        ("if («peak >= least_») kept_.leaf[l]", "peak > least_"),
        ("static_cast<float>(«greedy_ ? std::exp(logp) : kept().total.sum / own().total.sum»)", "std::exp(logp)"),
        ("lost_ = wrong_edit_ || «raw_.total.sum != raw_.total.sum» ||", "false"),
        ("if (!wrong_edit_) buffer[«edit_[e].id - leaf * kLeaf»]", "(edit_[e].id - leaf * kLeaf) ^ 1"),
        ("mass = «w.candidates.mass()»;", "r.sum"),
    ),
]  # fmt: skip

PYTHON = [
    *python(
        "torch", "rlfast/fallback/sample.py",
        ("(positions & WORD, (positions >> «32») & WORD, block", "31", "far_positions"),
        ("values = edits.values[«torch.searchsorted(edits.places, edits.places, right=True) - 1»]",
         "torch.searchsorted(edits.places, edits.places)", "edits_and_masks"),
        ("torch.where(order «>=» least, r.e.gather(-1, at), 0.0)", ">", "every_option or ties"),
        ("(mass < top_p * «mass[:, -1:]»)", "mass[:, :1]", "ties or always_stays or distribution"),
        ("torch.where(greedy, «logp.exp()», mass)", "mass", "greedy"),
        ("keep = «keep | greedy.unsqueeze(-1)»", "keep", "greedy"),
        ("| raw.isnan() «| (raw == torch.inf)»", "", "without_a_token"),
    ),
    *python(
        "sampling", "kernels/formulas/noise.py",
        ("u = (n + «0.5»)", "0.0", "noise_is_right"),
        ("((16777216.0 - n) - «0.5»)", "0.0", "noise_is_right"),
    ),
    *python(
        "sampling", "rlfast/sampling.py",
        ("torch.where(x > 0, «x / repetition[row]», x * repetition[row])", "x * repetition[row]"),
        ("presence[row] * («count > 0»)", "count"),
        ("(ids < 0) | (ids «>=» vocab)", ">"),
    ),
    *python(
        "triton", "kernels/sample.py",
        ("high = ordered(top.to(tl.int32, bitcast=True)).to(tl.int64) «+ 1»", "+ 0", "always_stays"),
        ("enough = reached «>=» wanted", ">", "ties"),
        ("while (high - low > 1) & (many - few > «1»)", "2", "ties or every_option"),
        ("tl.join(tl.join(a, c), tl.join(b, d))", "tl.join(tl.join(a, b), tl.join(c, d))", "tokens_are"),
        ("tl.where(«value > best», tl.load(found.leader + at), token)", "value >= best", "greedy"),
        ("mask=inside, other=0) >> («column % 32»)", "column % 16", "edits_and_masks"),
        ("part = tl.where(leaf == mine, «mine_sum», tl.load(found.kept + at))", "tl.load(found.kept + at)",
         "every_option"),
    ),
]  # fmt: skip
