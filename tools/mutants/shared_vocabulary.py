"""Of a vocabulary that ranks share, and of heads that are gathered: merging, sums over ranks, what ranks agree on."""

from __future__ import annotations

from mutants.mutant import python

PYTHON = [
    *python(
        "ranks", "rlfast/distributed/merge.py",
        ("weighed(m.log_w, records[:, row.entropy]« - m.log_w»)", "", "options_pairwise"),
        ("squares = «2 * »m.log_w", "", "options_pairwise"),
        ("put(aux[row.mean_logits], («widths * »records", "", "options_pairwise"),
        ("weighed(torch.where(infinite, -INF, p.log_w), value« + (p.log_w - q.log_w)»)", "", "divergences"),
        ("records[:, layout.row.tail_mass])« + logp[:, k:].exp().sum(-1)»", "", "bits_do_not"),
    ),
    *python(
        "ranks", "rlfast/distributed/vocab.py",
        ("lse = «-away if g_lse is None else g_lse - away»", "g_lse", "every_loss"),
        ("if «shards.sum_hidden» else d_hidden)", "True", "sums"),
        ("if «shards.sum_hidden» else d_hidden)", "False", "every_way"),
    ),
    *python(
        "ranks", "rlfast/distributed/pairs.py",
        ("ref_sum + «(1.0 - measure.beta)» * own_sum", "measure.beta", "divergences"),
        ("«sums[i, 1, at]» = centred", "sums[i, 0, at]", "divergences"),
    ),
    *python(
        "ranks", "rlfast/ops/linear_loss.py",
        ("d_hidden if «rows.shards.sum_hidden» else None", "True", "sums"),
        ("else None«, *low_rank[:1]»):", "", "every_way"),
        ("nullcontext if rows.shards is None else «rows.shards.around»", "nullcontext", "partitioned"),
    ),
    *python(
        "ranks", "rlfast/distributed/gather.py",
        ("mesh, «[module.Partial(\"sum\")] * mesh.ndim», run", "[module.Replicate()] * mesh.ndim", "gathered"),
        ("g / «mesh.size()» if", "mesh.size(0)", "gathered or fsdp2"),
    ),
    *python(
        "ranks", "rlfast/distributed/groups.py",
        ("max(columns) if «width is None» else vocab", "True", "fused_losses"),
        ("if «found != wanted»:", "False", "another_group"),
        ("_NO_OWNER if «told_apart» else share.owner", "True", "looks"),
        ("\"sum_hidden\": «int(share.sum_hidden)»}", "1", "other_things"),
    ),
    *python(
        "ranks", "rlfast/preference_linear.py", ("with context_of(«head.process_group»):", "None", "partitioned")
    ),
    *python(
        "ranks", "rlfast/row_inputs.py",
        ("a row\": «groups.candidates(targets, x)»", "0", "other_things"),
        ("groups.COUNTED: «zlib.crc32(b\"\".join(x.detach().contiguous().numpy().tobytes() for x in found))»", "0",
         "other_things"),
        ("\"top_k\": «top_k if isinstance(top_k, int) else 0»", "0", "other_things"),
    ),
]  # fmt: skip
