"""Other libraries' functions for the same results, where they are installed and where they run."""

from __future__ import annotations

import importlib
import importlib.util


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def from_logits(entropy: bool, device: str) -> dict:
    """name → f(logits, targets) → logp, or (logp, entropy): what the trainers call."""
    found = {}
    if _has("trl"):
        trl = importlib.import_module("trl.trainer.utils")
        function = trl.selective_log_softmax_and_entropy if entropy else trl.selective_log_softmax

        def run(logits, targets):
            out = function(logits.unsqueeze(0), targets.unsqueeze(0))
            return tuple(x.squeeze(0) for x in out) if entropy else out.squeeze(0)

        found["trl"] = run
    if _has("liger_kernel") and device == "cuda" and not entropy:
        liger = importlib.import_module("liger_kernel.transformers.grpo_loss")

        def run_liger(logits, targets):
            # it takes [B, L + 1, V] and leaves out the last position: one row of the case is not computed
            return liger.fused_selective_log_softmax(logits.unsqueeze(0), targets[None, :-1], 1.0).squeeze(0)

        found["liger"] = run_liger
    return found


def from_hidden(device: str) -> dict:
    """name → f(hidden, weight, targets) → logp, differentiable."""
    found = {}
    if _has("trl"):
        kernel = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
        chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
        found["trl"] = lambda h, w, t: kernel.apply(h, w, None, t, 1.0, chunk, None, 1.0, ())[0]
    if device != "cuda":
        return found
    if _has("cut_cross_entropy"):
        cce = importlib.import_module("cut_cross_entropy")
        found["cce"] = lambda h, w, t: -cce.linear_cross_entropy(h, w, t, reduction="none")
    if _has("verl"):
        verl = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
        found["verl"] = lambda h, w, t: verl.linear_cross_entropy(h, w, t, 1.0, "none")[0]
    return found
