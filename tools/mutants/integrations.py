"""Of the swaps in trainers."""

from __future__ import annotations

from mutants.mutant import python

PYTHON = [
    *python(
        "trl", "rlfast/integrations/trl_head.py",
        ("\"softcap\": «final_logit_softcapping»", "None"),
        ("\"logit_scale\": «logit_scale»}", "1.0"),
        ("{\"temperature\": «temperature»,", "1.0"),
        ("options[\"process_group\"] = «group»", "None"),
        ("    «with gather():\n        yield» Partitioned", "yield"),
    ),
    *python(
        "trl", "rlfast/integrations/trl_dpo.py", ("process_group=«options[\"process_group\"]»", "None")
    ),
    *python(
        "trl", "rlfast/integrations/trl_divergence.py",
        ("softcap=«student_final_logit_softcapping», ref", "teacher_final_logit_softcapping"),
        ("ref_logit_scale=«teacher_logit_scale»", "1.0"),
        ("temperature=«temperature»,\n", "1.0"),
        ("«out.entropy.detach()».float()", "out.entropy"),
        ("outcomes = selection[\"top_k\"]« + (selection[\"tail\"] == \"bucket\")»", ""),
        ("max(student.shape[0], 1) if counted is None else «counted.sum().clamp(min=1)»", "counted.numel()"),
        ("\"bucket\" if «add_tail» else", "not add_tail"),
        ("«counted_rows_only», owner=distillation", "original"),
        ("process_group=«group»", "None"),
        ("if x is not None« and x.requires_grad» else x for x in teacher", ""),
    ),
    *python(
        "trl", "rlfast/integrations/trl_mixins.py",
        ("if name «not in» self._own", "in"),
        ("with «trl_head.own_heads()»:", "trl_head.fusing(None)"),
    ),
    *python(
        "trl", "rlfast/integrations/trl_preference.py",
        ("return (loss, theirs[1]) if return_outputs else loss", "return loss"),
        ("float(trainer.desirable_weight), float(trainer.undesirable_weight)", "1.0, 1.0"),
        ("scored(seen.policy)«[int(bool(trainer.calculate_KL))]»", "[0]"),
        ("trainer.args.center_rewards_coefficient or 0.0", "0.0"),
        ("margin=inputs.get(\"margin\")", "margin=None"),
    ),
    *python(
        "trl", "rlfast/integrations/trl_outputs.py",
        ("lambda _, __, out, to=outputs: «to».append(out)", "outputs"),
        ("trainer.router_aux_loss_coef * out.aux_loss", "out.aux_loss"),
        ("out.log_probs[:, «1 - mask.shape[1]» :]", "1"),
        ("counted.cumsum(1) «>» shorter[:, None]", ">="),
    ),
    *python(
        "trl", "rlfast/integrations/trl_dpo.py",
        ("(\"exo_pair\", \"robust\", \"aot\", \"aot_unpaired\")", "DPO_ROWS"),
        ("dpo_objectives(options._replace(tail=None))", "dpo_objectives(options)"),
        ("abs(self.alpha - 1) < 1e-6", "False"),
        ("score_hyper=hyper, weight=«weight»)", "part.weight"),
        ("alike = [row for row in rows if «row.sort == sort»]", "True"),
        ("torch.mul(*of.chunk(2))", "of.chunk(2)[0]"),
        ("mask«.sum(1).clamp(min=1)»", "[:, 1:].sum(1)"),
        ("logps.chunk(2)[0].sum() / «counted.chunk(2)[0].sum()»", "len(logps)"),
    ),
]  # fmt: skip
