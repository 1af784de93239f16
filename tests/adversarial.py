"""Inputs that broke other libraries' log-prob kernels. Each is a problem that every backend of both ops must get right.

A name says the failure; the text after it, where it was seen.
"""

from __future__ import annotations

import torch

from tests.cases import ALL, DIFFERENTIABLE, Problem, as_head, f32, few, head_of, logits_of, targets_of

ROW_COUNT, NAN_ROWS = few(12, 6), few(24, 12)


def _problem(op: str, logits, targets=None, **fields) -> Problem:
    """On given logits [N, V]: as they are, or as a head that projects to exactly them."""
    inputs = {"logits": logits} if op == "token_logps" else as_head(logits)
    targets = targets_of(logits.shape[0], logits.shape[1]) if targets is None else targets
    return Problem(inputs, targets, **({"outputs": ALL, "grads": DIFFERENTIABLE} | fields))


def _dense(op: str, rows: int, vocab: int, dtype, spread: float = 2.0, **fields) -> Problem:
    """On random logits, or on a random head with a bias."""
    if op == "token_logps":
        return _problem(op, logits_of(rows, vocab, dtype, spread=spread), **fields)
    inputs = head_of(rows, 48, vocab, dtype, bias=True)
    inputs["hidden"] = (inputs["hidden"].float() * (spread / 2)).to(dtype)
    return Problem(inputs, targets_of(rows, vocab), **({"outputs": ALL, "grads": DIFFERENTIABLE} | fields))


def leading_minus_inf(op: str) -> Problem:
    """A running maximum that is still −inf after the first block: Liger's GRPO, Unsloth, fla, flash-attn#1930."""
    logits = logits_of(ROW_COUNT, 6000)
    logits[:, :4096] = -torch.inf
    return _problem(op, logits, 4096 + targets_of(ROW_COUNT, 6000 - 4096))


def half_minus_inf(op: str) -> Problem:
    """0·(−inf) in the entropy and in its gradient: TRL, Unsloth, VeOmni#720, SkyRL#2259."""
    logits = logits_of(ROW_COUNT, 3000)
    if op == "token_logps":
        logits[torch.rand(ROW_COUNT, 3000, generator=torch.Generator().manual_seed(4)) < 0.5] = -torch.inf
    else:
        logits[:, ::2] = -torch.inf
    return _problem(op, logits, targets_of(ROW_COUNT, 1500) * 2 + 1)


def target_minus_inf(op: str) -> Problem:
    """A target that cannot be: log p = −inf, its gradient is that of any p = 0."""
    logits = logits_of(6, 2100)
    logits[:, 5] = logits[:, 1500] = -torch.inf
    return _problem(op, logits, torch.tensor([5, 1500, 7, 5, 1500, 2099]), grads=("logp",))


def one_possible_token(op: str) -> Problem:
    """All −inf but the target: log p = 0 and entropy 0, exactly."""
    logits = torch.full((3, 2500), -torch.inf)
    logits[:, 1700] = torch.tensor([3.0, -1e4, 0.0])
    return _problem(op, logits, torch.full((3,), 1700))


def far_below_zero(op: str) -> Problem:
    """A running maximum that starts at 0: verl, SkyRL#2141."""
    return _problem(op, logits_of(ROW_COUNT, 3003) - 1e4)


def rising_maximum(op: str) -> Problem:
    """Each block has a larger maximum than the one before it, so that every sum is rescaled."""
    return _problem(op, logits_of(ROW_COUNT, 9000) + torch.linspace(0, 12, 9000))


def offset_1e6(op: str) -> Problem:
    """log-sum-exp rounded to the offset's ulp: PyTorch's own log_softmax is right, lse − x is not."""
    return _problem(op, logits_of(ROW_COUNT, 3000) + 1e6)


def offset_3e4_bf16(op: str) -> Problem:
    """The same where an ulp of the logits is 128."""
    return _problem(op, logits_of(ROW_COUNT, 3000, spread=300.0).add(3e4).bfloat16())


def offset_3e4_f16(op: str) -> Problem:
    """The same near the largest float16."""
    return _problem(op, logits_of(ROW_COUNT, 3000, spread=30.0).add(3e4).half())


def beyond_32(op: str) -> Problem:
    """Logits staged in float16 or exponentials without a maximum: Liger SM90."""
    return _dense(op, ROW_COUNT, 3000, torch.float32, spread=60.0)


def beyond_32_bf16(op: str) -> Problem:
    """The same from bfloat16 inputs."""
    return _dense(op, ROW_COUNT, 3000, torch.bfloat16, spread=60.0)


def beyond_float16(op: str) -> Problem:
    """Logits that float16 cannot hold, from inputs that it can."""
    if op == "token_logps":
        return _problem(op, logits_of(ROW_COUNT, 3000, spread=2e4).clamp(-6e4, 6e4).half())
    inputs = head_of(ROW_COUNT, 48, 3000, torch.float16)
    return Problem({k: x * 200 for k, x in inputs.items()}, targets_of(ROW_COUNT, 3000), {}, ALL, DIFFERENTIABLE)


def temperature_06(op: str) -> Problem:
    """Temperature applied in bf16, or not to the entropy: miles#1554, OpenRLHF#1319, TRL#3029."""
    return _dense(op, ROW_COUNT, 3000, torch.bfloat16, options={"temperature": f32(0.6)})


def temperature_13(op: str) -> Problem:
    """The same with a temperature above 1."""
    return _dense(op, ROW_COUNT, 3000, torch.bfloat16, options={"temperature": f32(1.3)})


def temperature_per_token(op: str) -> Problem:
    """The same with one temperature a token."""
    return _dense(op, ROW_COUNT, 3000, torch.bfloat16, options={"temperature": torch.linspace(0.3, 2.0, ROW_COUNT)})


def gemma2_softcap(op: str) -> Problem:
    """A soft-cap that is dropped, or left out of the gradient: unsloth#11277, #10616."""
    return _dense(op, ROW_COUNT, 3000, torch.bfloat16, spread=20.0, options={"softcap": 30.0, "temperature": f32(0.7)})


def softcap_saturated(op: str) -> Problem:
    """tanh at ±1: its derivative underflows, and must not become NaN."""
    return _dense(op, ROW_COUNT, 3000, torch.float32, spread=2000.0, options={"softcap": 30.0})


def cohere_scale(op: str) -> Problem:
    """A logit scale that is dropped."""
    return _dense(op, ROW_COUNT, 3000, torch.bfloat16, spread=40.0, options={"logit_scale": 0.0625})


def granite_scale(op: str) -> Problem:
    """logits / logits_scaling, with a temperature."""
    options = {"logit_scale": f32(1 / 6), "temperature": f32(1.3)}
    return _dense(op, ROW_COUNT, 3000, torch.bfloat16, spread=20.0, options=options)


def negative_scale(op: str) -> Problem:
    """The largest logit becomes the smallest: a maximum taken before the scale would be wrong."""
    return _dense(op, ROW_COUNT, 3000, torch.float32, options={"logit_scale": -0.5, "top_k": 3})


def all_masked(op: str) -> Problem:
    """Nothing to normalise by: Liger#1082, #1298."""
    return _dense(
        op, ROW_COUNT, 300, torch.float32, options={"mask": torch.zeros(ROW_COUNT, dtype=torch.bool), "top_k": 2}
    )


def all_ignored(op: str) -> Problem:
    """The same by −100."""
    return (
        _dense(op, ROW_COUNT, 300, torch.float32, targets=torch.full((ROW_COUNT,), -100))
        if op == "token_logps"
        else Problem(head_of(ROW_COUNT, 48, 300), torch.full((ROW_COUNT,), -100), {}, ALL, DIFFERENTIABLE)
    )


def masked_sequence(op: str) -> Problem:
    """One sequence of the batch is masked in full."""
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[1] = 0
    inputs = {"logits": logits_of((3, 5), 700)} if op == "token_logps" else head_of((3, 5), 48, 700)
    return Problem(inputs, targets_of((3, 5), 700), {"mask": mask}, ALL, DIFFERENTIABLE)


def garbage_in_masked_rows(op: str) -> Problem:
    """Padding may hold anything; a NaN times a zero gradient is still a NaN."""
    rows = torch.tensor([0, 3, 4])
    mask = torch.ones(6, dtype=torch.bool)
    mask[rows[:2]] = False
    targets = targets_of(6, 2100)
    targets[4] = -100
    inputs = {"logits": logits_of(6, 2100)} if op == "token_logps" else head_of(6, 48, 2100, bias=True)
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf]).unsqueeze(-1)
    inputs["logits" if op == "token_logps" else "hidden"][rows] = garbage
    options = {"mask": mask, "softcap": 20.0, "temperature": torch.linspace(0.5, 1.5, 6), "top_k": 2}
    return Problem(inputs, targets, options, ALL, DIFFERENTIABLE)


def nan_row(op: str) -> Problem:
    """NaN in is NaN out, for that row only."""
    inputs = {"logits": logits_of(NAN_ROWS, 3000)} if op == "token_logps" else head_of(NAN_ROWS, 48, 3000)
    inputs["logits" if op == "token_logps" else "hidden"][2, 17] = torch.nan
    outputs = tuple(name for name in ALL if name != "is_top1")
    return Problem(inputs, targets_of(NAN_ROWS, 3000), {}, outputs, DIFFERENTIABLE, needs=("logits", "hidden"))


def nan_in_a_later_leaf(op: str) -> Problem:
    """The same where only the last block sees it."""
    problem = _problem(op, logits_of(6, 3000), outputs=("logp", "lse", "entropy"), needs=("logits", "hidden"))
    if op == "token_logps":
        problem.inputs["logits"][2, 2990] = torch.nan
    else:
        problem.inputs["hidden"][2] = torch.nan
    return problem


def all_minus_inf_row(op: str) -> Problem:
    """No token is possible: log p is undefined there, and right elsewhere."""
    logits = logits_of(5, 2100)
    if op == "token_logps":
        logits[1] = -torch.inf
        return _problem(op, logits, outputs=("logp", "lse"), grads=())
    return _problem(op, torch.full((5, 2100), -torch.inf), outputs=("logp", "lse"), grads=())


def near_certain(op: str) -> Problem:
    """log p > 0 by rounding: verl#2656."""
    n = few(64, 6)
    logits = logits_of(n, 500, spread=0.5)
    targets = targets_of(n, 500)
    logits[torch.arange(n), targets] += torch.linspace(8, 30, n)
    return _problem(op, logits, targets)


def ties(op: str) -> Problem:
    """Equal maxima: the first one is top-1, and top-k orders them by id."""
    logits = torch.zeros(5, 5000)
    logits[4, [2047, 2040]] = 5.0
    logits[0, [3, 1024, 2400, 4500]] = 5.0
    logits[1, [1023, 1024]] = 5.0
    logits[2, 2499] = 5.0
    return _problem(op, logits, torch.tensor([3, 1024, 2499, 0, 2047]), options={"top_k": 5})


def top_k_is_the_vocabulary(op: str) -> Problem:
    """Nothing is left for the tail."""
    return _problem(op, logits_of(5, 9), options={"top_k": 9})


def one_token_vocabulary(op: str) -> Problem:
    """log p = 0 whatever the logit."""
    return _problem(op, logits_of(5, 1), options={"top_k": 1, "temperature": f32(0.6), "softcap": 5.0})


def two_token_vocabulary(op: str) -> Problem:
    """A binary choice: log p = −softplus of a difference."""
    return _problem(op, logits_of(few(30, 6), 2, spread=6.0), options={"top_k": 1, "temperature": f32(0.6)})


def uniform(op: str) -> Problem:
    """Entropy log V, log Σp² = −log V."""
    return _problem(op, torch.full((3, 4097), 2.5))


def odd_vocabulary(vocab: int):
    """A vocabulary that no block divides: quack, verl#2899."""

    def build(op: str) -> Problem:
        rows = few(5, 2)
        if op == "token_logps":
            return _dense(op, rows, vocab, torch.bfloat16, options={"top_k": 3})
        return Problem(
            head_of(rows, 24, vocab, torch.bfloat16), targets_of(rows, vocab) // 2 + vocab // 2, {}, ALL, DIFFERENTIABLE
        )

    build.__name__ = f"vocabulary_{vocab}"
    return build


def entropy_of_256k_bf16(op: str) -> Problem:
    """Entropy that drifts in bf16: TRL's own docstring."""
    rows = few(4, 1)
    if op == "token_logps":
        return _dense(op, rows, 256_000, torch.bfloat16, spread=1.0, grads=("entropy",))
    return Problem(head_of(rows, 16, 256_000, torch.bfloat16), targets_of(rows, 256_000), {}, ALL, ("entropy",))


def head_gradient_over_many_rows(op: str) -> Problem:
    """Gradients that accumulate in bf16 across chunks and splits: verl, NeMo-RL, prime-rl, Liger."""
    rows = few(3000, 20)
    call = {} if op == "token_logps" else {"memory_budget": 0}
    logits, head = {"logits": logits_of(rows, 130, torch.bfloat16)}, head_of(rows, 40, 130, torch.bfloat16)
    inputs = logits if op == "token_logps" else head
    return Problem(inputs, targets_of(rows, 130), {}, ("logp",), ("logp",), upstream="ones", call=call)


# The problems whose logits are the sums of a projection: a head of one-hot states gives the others exactly.
PROJECTED = (
    beyond_32,
    beyond_32_bf16,
    beyond_float16,
    temperature_06,
    temperature_13,
    temperature_per_token,
    gemma2_softcap,
    softcap_saturated,
    cohere_scale,
    granite_scale,
    negative_scale,
    masked_sequence,
    garbage_in_masked_rows,
    nan_row,
    head_gradient_over_many_rows,
    entropy_of_256k_bf16,
)
ROWS = {
    f"{number:02d}-{build.__name__}": build
    for number, build in (
        (1, leading_minus_inf),
        (2, half_minus_inf),
        (2, target_minus_inf),
        (2, one_possible_token),
        (2, all_minus_inf_row),
        (3, far_below_zero),
        (3, rising_maximum),
        (4, offset_1e6),
        (4, offset_3e4_bf16),
        (4, offset_3e4_f16),
        (6, near_certain),
        (7, beyond_32),
        (7, beyond_32_bf16),
        (7, beyond_float16),
        (8, head_gradient_over_many_rows),
        (9, temperature_06),
        (9, temperature_13),
        (9, temperature_per_token),
        (13, odd_vocabulary(50257)),
        (13, odd_vocabulary(151669)),
        (13, odd_vocabulary(32003)),
        (13, one_token_vocabulary),
        (13, two_token_vocabulary),
        (13, top_k_is_the_vocabulary),
        (13, uniform),
        (13, ties),
        (15, gemma2_softcap),
        (15, softcap_saturated),
        (15, cohere_scale),
        (15, granite_scale),
        (15, negative_scale),
        (16, all_masked),
        (16, all_ignored),
        (16, masked_sequence),
        (16, garbage_in_masked_rows),
        (16, nan_row),
        (16, nan_in_a_later_leaf),
        (21, entropy_of_256k_bf16),
    )
}
