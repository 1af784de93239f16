"""Of the policy losses over a head: chunks, the exact KL, the low-rank part, and their places in trainers."""

from __future__ import annotations

from mutants.mutant import python

PYTHON = [
    *python(
        "torch", "rlfast/policy_linear.py",
        ("kl, «1.0 if share is None else share[number]»)", "1.0", "bonus"),
        ("launch(alone, «part._replace(num_items=count)»,", "part", "every_way"),
        ("by.of(lambda x: «x * each[slice(*chunks[number])]»)", "x", "within"),
        ("«weighed._replace(entropy=by.entropy)» if plan.entropy_mean", "weighed", "within"),
        ("metrics[TOKENS if plan.reduce == TOKEN_MEAN else SEQUENCES]", "metrics[TOKENS]", "every_way"),
        ("whole.mask if whole.keep is None else «whole.mask & whole.keep»", "whole.mask", "bonus"),
        ("if plan.gate_masks and (fields.old_logp is None or plan.entropy_mean):", "if False:", "correction"),
        ("bisect_right(tokens.ends, last)]« - first»", "", "every_way"),
        ("None if kl is None else «kl.dentropy * kl.metrics[ENTROPY_SCALE]»", "kl.dentropy", "every_way"),
        ("given | {\"mask\": live if mask is None else «live & mask»}", "mask", "every_way"),
        ("lambda x: x[«slices[i][0]»]", "slices[0][0]", "every_way"),
    ),
    *python(
        "torch", "rlfast/full_kl.py",
        ("fields.coefs.flip(0)", "fields.coefs", "tensors"),
        ("weights=«nothing»", "fields.weights", "given or reduction"),
        ("ref_logp=None, «keep=None», coefs", "keep=fields.keep", "correction or reduction"),
        ("prepared.plan._replace(entropy_mean=0)", "prepared.plan", "correction"),
        ("metrics[KL] = kl.metrics[ENTROPY]", "metrics[KL] = kl.metrics[LOSS]", "reduction"),
        ("metrics[LOSS] += kl.metrics[LOSS]", "pass", "reduction"),
    ),
    *python(
        "torch", "rlfast/ops/lora.py",
        ("d_u = «self.lora.scale * »d[", "", "every_way"),
        ("PIECES = «3»", "1", "narrow or pieces"),
        ("live_hidden(rows.hidden[:, : self.width], «rows.mask»)", "None", "every_way"),
        ("d[:, : self.width]« + d_u @ a.to(d.dtype)» if need_hidden", "", "every_way"),
        ("torch.where(mask.unsqueeze(-1), wide, torch.zeros((), dtype=wide.dtype))", "wide", "every_way"),
    ),
    *python(
        "torch", "rlfast/ops/known_gradients.py",
        ("    gradient.mul_(g)\n", "", "same"),
        ("needs[at], into[at] = False, «None»", "parameter", "second"),
        ("total = parameter.grad if total is None else total", "total = parameter.grad", "main_grad"),
    ),
    *python(
        "trl", "rlfast/integrations/trl_grpo.py",
        ("{\"accumulation\": «trainer.current_gradient_accumulation_steps»}", "1"),
        ("call[\"max_len\"] = «trainer.max_completion_length»", "1"),
        ("clamp(min=1.0) «/ trainer.accelerator.num_processes»\n", "* 2"),
        ("items« / trainer.args.steps_per_generation»", ""),
        ("given[\"rollout_logp\"] = «inputs.get(\"sampling_per_token_logps\")»", "None"),
        ("\"mask\": «inputs.get(\"tool_mask\")»", "None"),
        ("\"weights\": «_ratio(trainer, inputs)»", "None"),
        ("options[\"delta\"] = args.delta", "pass"),
        ("        options[\"kl_ratio\"] = None\n", "        pass\n"),
        ("0.0 if «quiet» else trainer.entropy_coef", "False"),
    ),
    *python(
        "trl", "rlfast/integrations/trl_head.py",
        ("return theirs« + (self.loss - self.loss.detach())»", ""),
        ("return «_Tied.apply(logp, loss)»", "logp"),
        ("return None, «g.new_zeros(())»", "g.sum()"),
        ("x.expand(self.scored.shape)[«self.scored»]", "self.scored.flip(0)"),
    ),
    *python(
        "trl", "rlfast/integrations/trl_dpo.py",
        ("if k not in NOT_OF_THE_MODEL}« | {\"use_cache\": False}»", " | {\"attention_mask\": None}"),
        ("bits = sum(OUTPUTS[name] for name in outputs)", "bits = ENTROPY"),
        ("        trainer.ref_model = reference\n", "        pass\n"),
    ),
]  # fmt: skip
