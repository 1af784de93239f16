"""The kernels of divergences: two rows of logits a leaf at a time, their merges, and the gradient of one side."""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas.divergence import FORWARD, JSD, REVERSE, divergence_gradient, gap_term, over_mixture
from rlfast.kernels.formulas.elementary import exp
from rlfast.kernels.formulas.logit import pulled_back, transformed
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.leaves import (
    INTS,
    LEAF,
    MERGED_ROWS,
    Place,
    Sizes,
    Tokens,
    counts,
    finite,
    fold_leaf,
    fold_targets,
    inside_of,
    load_logits,
    row_peak,
    row_start,
    scaled_leaf,
    temperature_of,
    tree_sum,
)
from rlfast.kernels.token_logps import BLOCK, row_gradient

SIDE = ("ref_outer", "ref_stride")  # where the other side's rows lie: its stride_outer and stride_inner


class Side(NamedTuple):
    """One side's tensors and floats."""

    tokens: Tokens
    scalars: NamedTuple


class PairSaved(NamedTuple):
    """What the backward knows of each row beside ``token_logps.Saved``."""

    aux: torch.Tensor  # [·, rows]: peak and log_sum of the own side
    other: torch.Tensor  # [2, rows]
    centre: torch.Tensor  # [2, rows]
    g_value: torch.Tensor | None  # [rows]


@jit
def z_of(x_ptr, place, side, local_row, row, column, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """z [·] of a row's columns, −inf beyond the last."""
    x = load_logits(x_ptr, place, side.tokens, local_row, column, ALIGNED)
    softcap, logit_scale = tl.cast(side.scalars.softcap, tl.float32), tl.cast(side.scalars.logit_scale, tl.float32)
    z = transformed(x, temperature_of(side.tokens, side.scalars, row), softcap, logit_scale, KIND)
    return tl.where(inside_of(place, column, ALIGNED), z, float("-inf"))


@jit(do_not_specialize=[*SIDE, *INTS])
def fold_pair(
    x_ptr, y_ptr, own, ref, scratch, ref_scratch, gaps, ref_outer, ref_stride,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    KIND: tl.constexpr, REF_KIND: tl.constexpr, MEASURE: tl.constexpr, OUTPUTS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The statistics of a leaf of both sides, and Σ e_p·gap relative to both leaves' peaks; grid: rows × leaves."""
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    ref_place = Place(inner, ref_outer, ref_stride, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    here = tl.cdiv(columns, LEAF)
    local_row, leaf = tl.program_id(0) // here, tl.program_id(0) % here
    row = local_row.to(tl.int64) + first_row
    if counts(own.tokens, sizes, row, True):
        column = leaf * LEAF + tl.arange(0, LEAF)
        inside, global_leaf = inside_of(place, column, ALIGNED), start // LEAF + leaf
        z = z_of(x_ptr, place, own, local_row, row, column, KIND, ALIGNED)
        ref_z = z_of(y_ptr, ref_place, ref, local_row, row, column, REF_KIND, ALIGNED)
        fold_leaf(z, inside, global_leaf, row, sizes, scratch, OUTPUTS)
        fold_leaf(ref_z, inside, global_leaf, row, sizes, ref_scratch, 0)
        if MEASURE != JSD:
            d, ref_d = z - finite(tl.max(z, axis=0)), ref_z - finite(tl.max(ref_z, axis=0))
            if MEASURE == REVERSE:
                term = gap_term(tl.exp(d), d - ref_d, z, ref_z)
            else:
                term = gap_term(tl.exp(ref_d), ref_d - d, ref_z, z)
            tl.store(gaps + global_leaf * tl.cast(rows, tl.int64) + row, tree_sum(term))
        softcap, logit_scale = tl.cast(own.scalars.softcap, tl.float32), tl.cast(own.scalars.logit_scale, tl.float32)
        temperature = temperature_of(own.tokens, own.scalars, row)
        fold_targets(
            x_ptr, place, own.tokens, sizes, scratch, local_row, leaf, temperature, softcap, logit_scale, KIND, ALIGNED
        )


@jit(do_not_specialize=Sizes._fields)
def merge_gaps(
    tokens, scratch, ref_scratch, gaps, value, centres, candidates, rows, vocab, leaves, MEASURE: tl.constexpr
):
    """KL(p‖q) = E_p[gap] + log(Σe_q / Σe_p) of MERGED_ROWS rows, E_p[gap], and for the gradient of q 1/Σe of q and
    of p."""
    sizes = Sizes(candidates, rows, vocab, leaves)
    row = tl.program_id(0).to(tl.int64) * MERGED_ROWS + tl.arange(0, MERGED_ROWS)
    rows = tl.cast(rows, tl.int64)
    inside = row < rows
    live = counts(tokens, sizes, row, inside) & inside
    if MEASURE == REVERSE:
        p_sums, q_sums = scratch.sums, ref_scratch.sums
        p_peak, _ = row_peak(sizes, scratch, row, live)
        q_peak, _ = row_peak(sizes, ref_scratch, row, live)
    else:
        p_sums, q_sums = ref_scratch.sums, scratch.sums
        p_peak, _ = row_peak(sizes, ref_scratch, row, live)
        q_peak, _ = row_peak(sizes, scratch, row, live)
    one = tl.cast(leaves, tl.int64) * rows
    total, other, weighted = (tl.zeros(row.shape, tl.float32),) * 3
    for leaf in range(leaves):
        offset = leaf * rows + row
        p_distance, p_weight = scaled_leaf(p_sums, offset, p_peak, live)
        q_distance, q_weight = scaled_leaf(q_sums, offset, q_peak, live)
        part = tl.load(p_sums + one + offset, mask=live, other=0.0)
        gap = tl.load(gaps + offset, mask=live, other=0.0)
        total += p_weight * part
        other += q_weight * tl.load(q_sums + one + offset, mask=live, other=0.0)
        # an infinite gap counts, whatever its weight underflows to
        weighted += tl.where(gap == float("inf"), gap, p_weight * (gap + (p_distance - q_distance) * part))
    mean = tl.div_rn(weighted, total)
    kl = mean + tl.log(tl.div_rn(other, total))
    kl = tl.where(kl < 0.0, 0.0, kl)
    possible = tl.where(total > 0.0, other, 0.0) > 0.0
    of_p, of_q = (2 * rows, 0 * rows) if MEASURE == FORWARD else (0 * rows, 2 * rows)
    zero = tl.zeros(row.shape, tl.float32)
    store_row(value, kl, possible, live, inside, row)
    store_row(centres + of_p, mean, possible, live, inside, row)
    store_row(centres + of_p + rows, zero, possible, live, inside, row)
    store_row(centres + of_q, tl.div_rn(1.0, other), possible, live, inside, row)
    store_row(centres + of_q + rows, tl.div_rn(1.0, total), possible, live, inside, row)


@jit
def store_row(to, x, possible, live, inside, row):
    """A number a row; NaN where the divergence is undefined, 0 in skipped rows."""
    tl.store(to + row, tl.where(live, tl.where(possible, x, float("nan")), 0.0), mask=inside)


@jit(do_not_specialize=[*SIDE, *INTS])
def fold_mixed(
    x_ptr, y_ptr, own, ref, aux, ref_aux, halves, beta, rest, ref_outer, ref_stride,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    KIND: tl.constexpr, REF_KIND: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Σ S·log S/M, Σ T·log T/M, Σ S and Σ T of a leaf; grid: rows × leaves."""
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    ref_place = Place(inner, ref_outer, ref_stride, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    beta, rest = tl.cast(beta, tl.float32), tl.cast(rest, tl.float32)
    here = tl.cdiv(columns, LEAF)
    local_row, leaf = tl.program_id(0) // here, tl.program_id(0) % here
    row = local_row.to(tl.int64) + first_row
    rows = tl.cast(rows, tl.int64)
    if counts(own.tokens, sizes, row, True):
        column = leaf * LEAF + tl.arange(0, LEAF)
        log_s = z_of(x_ptr, place, own, local_row, row, column, KIND, ALIGNED) - tl.load(aux + row)
        log_t = z_of(y_ptr, ref_place, ref, local_row, row, column, REF_KIND, ALIGNED) - tl.load(ref_aux + row)
        s_sum, t_sum = tl.load(aux + rows + row), tl.load(ref_aux + rows + row)
        m_over_s, m_over_t = over_mixture((log_t - log_s) - (t_sum - s_sum), beta, rest)
        s, t = exp(log_s - s_sum), exp(log_t - t_sum)
        at, one = halves + (start // LEAF + leaf) * rows + row, tl.cast(leaves, tl.int64) * rows
        tl.store(at, tree_sum(-s * m_over_s))
        tl.store(at + one, tree_sum(-t * m_over_t))
        tl.store(at + 2 * one, tree_sum(s))
        tl.store(at + 3 * one, tree_sum(t))


@jit(do_not_specialize=Sizes._fields)
def merge_mixed(tokens, halves, value, centres, beta, rest, candidates, rows, vocab, leaves):
    """JSD = β·KL(T‖M) + (1 − β)·KL(S‖M) of MERGED_ROWS rows, and the two halves as centres."""
    sizes = Sizes(candidates, rows, vocab, leaves)
    beta, rest = tl.cast(beta, tl.float32), tl.cast(rest, tl.float32)
    row = tl.program_id(0).to(tl.int64) * MERGED_ROWS + tl.arange(0, MERGED_ROWS)
    rows = tl.cast(rows, tl.int64)
    inside = row < rows
    live = counts(tokens, sizes, row, inside) & inside
    own, ref, s, t = (tl.zeros(row.shape, tl.float32),) * 4
    one = tl.cast(leaves, tl.int64) * rows
    for leaf in range(leaves):
        at = halves + leaf * rows + row
        own += tl.load(at, mask=live, other=0.0)
        ref += tl.load(at + one, mask=live, other=0.0)
        s += tl.load(at + 2 * one, mask=live, other=0.0)
        t += tl.load(at + 3 * one, mask=live, other=0.0)
    # S and T sum to 1 but for the rounding of log Σe
    own, ref = tl.div_rn(own, s), tl.div_rn(ref, t)
    d = beta * ref + rest * own
    possible = tl.where(s > 0.0, t, 0.0) > 0.0
    zero = tl.zeros(row.shape, tl.float32)
    store_row(value, tl.where(d < 0.0, 0.0, d), possible, live, inside, row)
    store_row(centres, own, possible, live, inside, row)
    store_row(centres + rows, zero, possible, live, inside, row)
    store_row(centres + 2 * rows, ref, possible, live, inside, row)
    store_row(centres + 3 * rows, zero, possible, live, inside, row)


@jit(do_not_specialize=[*SIDE, "out_outer", "out_inner", *INTS])
def pair_gradient(
    x_ptr, y_ptr, out_ptr, middle_ptr, low_ptr, own, other, saved, pair, beta, rest, ref_outer, ref_stride,
    out_outer, out_inner,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    KIND: tl.constexpr, REF_KIND: tl.constexpr, MEASURE: tl.constexpr, MORE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """∂L/∂x of BLOCK columns of a row of the own side; grid: rows × blocks. With ``low_ptr``, as a sum of three
    numbers."""
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    other_place = Place(inner, ref_outer, ref_stride, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    blocks = tl.cdiv(columns, BLOCK)
    local_row = tl.program_id(0) // blocks
    row = local_row.to(tl.int64) + first_row
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = inside_of(place, column, ALIGNED)
    rows = tl.cast(rows, tl.int64)
    g = tl.zeros([BLOCK], tl.float32)
    if counts(own.tokens, sizes, row, True):
        z = z_of(x_ptr, place, own, local_row, row, column, KIND, ALIGNED)
        if MORE:
            g = row_gradient(z, start + column, row, own.tokens, sizes, saved)
        if pair.g_value is not None:
            y = z_of(y_ptr, other_place, other, local_row, row, column, REF_KIND, ALIGNED)
            high, low = tl.load(pair.centre + row), tl.load(pair.centre + rows + row)
            d = divergence_gradient(
                z - tl.load(pair.aux + row), y - tl.load(pair.other + row), tl.load(pair.aux + rows + row),
                tl.load(pair.other + rows + row), high, low, tl.cast(beta, tl.float32), tl.cast(rest, tl.float32),
                MEASURE,
            )  # fmt: skip
            g += tl.load(pair.g_value + row) * tl.where(high == high, d, float("nan"))
        temperature = temperature_of(own.tokens, own.scalars, row)
        softcap, logit_scale = tl.cast(own.scalars.softcap, tl.float32), tl.cast(own.scalars.logit_scale, tl.float32)
        x = load_logits(x_ptr, place, own.tokens, local_row, column, ALIGNED)
        g = pulled_back(g, x, temperature, softcap, logit_scale, KIND)
    at = row_start(Place(inner, out_outer, out_inner, start, columns, first_row), local_row, ALIGNED) + column
    high = g.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, high, mask=inside)
    if low_ptr is not None:
        rest_of = g - high.to(tl.float32)
        middle = rest_of.to(middle_ptr.dtype.element_ty)
        tl.store(middle_ptr + at, middle, mask=inside)
        tl.store(low_ptr + at, (rest_of - middle.to(tl.float32)).to(low_ptr.dtype.element_ty), mask=inside)
