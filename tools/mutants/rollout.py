"""Mistakes in the rollout engine: pages, the schedule, the step, the bits."""

from __future__ import annotations

from mutants.mutant import python

PYTHON = [
    *python(
        "rollout", "rlfast/rollout/kv.py",
        ("if self.count[page] > 1:\n            copy", "if self.count[page] > 2:\n            copy"),
        ("        self.count[page] += 1\n", "        pass\n"),
        ("for page in «reversed(table)»:", "table"),
        ("key = («before», held)", "ROOT"),
        ("self.copies.append((page, copy))", "pass"),
        ("self.never.extend(self.idle)", "pass"),
    ),
    *python(
        "rollout", "rlfast/rollout/scheduler.py",
        ("last = «max»(self.running, key=lambda s: s.rank)", "min"),
        ("return «-self.params.priority», self.request", "self.params.priority"),
        ("sample.table = self.pool.find(sample[«:-1»])", ":"),
        ("if sample.era == self.pool.era:", "if True:"),
        ("and none is let past it, however small\n                    «break»", "continue"),
        ("text = \",\".join(map(str, (self.params.seed, «*self.prompt»)))", ""),
    ),
    *python(
        "rollout", "rlfast/rollout/calls.py",
        ("self.left |= left", "pass"),
        ("left.clear()\n            «self._drop(numbers)»", "pass"),
        ("with self.lock:\n            self._open()", "if True:\n            self._open()"),
    ),
    *python(
        "rollout", "rlfast/rollout/engine.py",
        ("self.caches.copy(self.pool.copies)", "pass"),
        ("if weights != self.weights:", "if False:"),
        ("self.pool.forget_all()", "pass"),
        ("rows += [«end - 1»] * len(group)", "end - len(group)"),
    ),
    *python(
        "rollout", "rlfast/rollout/responses.py",
        ("if «sample.finish == \"stop\"»:", "False"),
        ("len(protected) - len(stop) «+ 1»", ""),
    ),
    *python(
        "rollout", "rlfast/rollout/sampling.py",
        ("if len(sample.tokens) >= params.min_tokens«»:", " - 1"),
        ("positions=torch.tensor([«s.length» for s in samples]", "len(samples)"),
    ),
    *python(
        "rollout", "rlfast/rollout/attention.py",
        ("(position_ids.diff() «!= 1»)", "< 0"),
        ("first = torch.«ones»(batch, 1, dtype=torch.bool", "zeros"),
        ("out = some.new_zeros(batch * length, *some.shape[1:]).index_copy(0, keep, some)",
         "out = some.new_zeros(batch * length, *some.shape[1:]).index_copy(0, keep.flip(0), some)"),
    ),
    *python(
        "rollout", "rlfast/rollout/training.py",
        ("(mask.long().cumsum(1) «- 1»)", "- 2"),
    ),
    *python(
        "rollout", "rlfast/rollout/hf.py",
        ("if any(self._empty) or self._now() != self._ids:", "if False:"),
        ("        if window and not layer.window:", "        if False:"),
        ("if «e <= SAME * min(errors)»), (1.0, 0.0))", "True"),
        ("tried = [(scale, cap) for cap in «caps» for scale in scales]", "(0.0,)"),
        ("    if not linears.plain(decoder.head.module):", "    if False:"),
        ("for n in self._activations «if n % unit»", "if False"),
    ),
    *python(
        "rollout", "rlfast/rollout/scoring.py",
        ("pool.copies = waiting", "pass"),
        ("return hidden[-1:]«.clone()»", ""),
    ),
    *python(
        "rollout", "rlfast/rollout/parallel.py",
        ("together = sorted(«(r for part in found for r in part)», key", "self.found"),
        ("            count_down(self.under_way, rollout)", "            pass"),
        ("if number % self.size == «self.rank»:", "0"),
    ),
    *python(
        "rollout", "rlfast/rollout/linears.py",
        ("        for module in done:\n            module.__dict__.pop(\"forward\", None)\n", "        pass\n"),
    ),
    *python(
        "rollout", "rlfast/integrations/trl_rollout.py",
        ("found = «rollout.logp_raw if params.temperature == 1.0 else rollout.logp + rollout.kept.log()»",
         "rollout.logp + rollout.kept.log() + 1e-6"),
        ("seed=(params.seed «+ first») % (1 << 62)", ""),
        ("with trainer.accelerator.autocast():", "if True:"),
    ),
]  # fmt: skip
