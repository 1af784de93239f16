"""Policy losses as TRL writes them, and the strongest plain PyTorch that we could write, at most 40 lines each."""

from __future__ import annotations

import torch

ROWS = 32  # 32 rows of 1024 float32 tokens are 128 KiB a temporary: what eager makes of a chunk stays in the cache


def clipped(ratio, adv, low=0.2, high=0.2):
    """−min(r·A, clip(r)·A), as every trainer has it."""
    return -torch.min(ratio * adv, torch.clamp(ratio, 1 - low, 1 + high) * adv)


def masked_mean(x, mask):
    """Of the tokens; what has one value a sequence has the mean of those."""
    return x.mean() if x.shape[1] == 1 else (x * mask).sum() / mask.sum().clamp(min=1.0)


def clipping(ratio, adv, mask, low=0.2, high=0.2):
    """What TRL logs of a clip: the clipped fractions of all tokens, and the extreme ones of a sequence."""
    below, above = (ratio < 1 - low) & (adv < 0), (ratio > 1 + high) & (adv > 0)
    means = [masked_mean(x.to(ratio.dtype), mask) for x in (below, above, below | above)]
    of_rows = [x if x.shape[1] == 1 else (x * mask).sum(-1) / mask.sum(-1) for x in (below, above)]
    return (*means, of_rows[0].to(ratio.dtype).amin(), of_rows[1].to(ratio.dtype).amax())


def sequence_means(loss, mask):
    """The mean over its tokens of each sequence, summed; and how many sequences there are."""
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).sum(), loss.shape[0]


# Each returns the loss as a sum and its count, and a function that makes what TRL logs beside it.


def ppo(logp, old_logp, adv, mask):
    """Token mean of PPO's clip."""
    ratio, adv = torch.exp(logp - old_logp), adv.unsqueeze(1)
    return (clipped(ratio, adv) * mask).sum(), mask.sum(), lambda: clipping(ratio, adv, mask)


def grpo(logp, old_logp, adv, mask, ref_logp):
    """Mean over sequences of PPO's clip + 0.04·k3."""
    ratio, adv = torch.exp(logp - old_logp), adv.unsqueeze(1)
    kl = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
    loss = clipped(ratio, adv) + 0.04 * kl
    return *sequence_means(loss, mask), lambda: (masked_mean(kl.detach(), mask), *clipping(ratio, adv, mask))


def gspo(logp, old_logp, adv, mask):
    """Mean over sequences of PPO's clip of the geometric mean ratio."""
    x = ((logp - old_logp) * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
    ratio, adv = torch.exp(x).unsqueeze(-1), adv.unsqueeze(1)
    return *sequence_means(clipped(ratio, adv, 3e-4, 4e-4), mask), lambda: clipping(ratio, adv, mask, 3e-4, 4e-4)


def cispo(logp, old_logp, adv, mask):
    """Token mean of −sg(clip(r))·A·log p."""
    ratio, adv = torch.exp(logp - old_logp), adv.unsqueeze(1)
    weight = torch.clamp(ratio, 0.8, 1.2).detach()
    total = (-weight * adv * logp * mask).sum()
    return total, mask.sum(), lambda: (masked_mean(((ratio > 1.2) & (adv > 0)).to(ratio.dtype), mask),)


def sapo(logp, old_logp, adv, mask):
    """Mean over sequences of the soft gate. TRL logs nothing of it."""
    adv = adv.unsqueeze(1)
    tau = torch.where(adv > 0, 1.0, 1.05)
    gate = torch.sigmoid(tau * (torch.exp(logp - old_logp) - 1)) * 4 / tau
    return *sequence_means(-gate * adv, mask), tuple


LOSSES = {"ppo": ppo, "grpo": grpo, "gspo": gspo, "cispo": cispo, "sapo": sapo}


def alone(function):
    """The loss, divided by its count."""

    def run(logp, *fields):
        total, n, _ = function(logp, *fields)
        return total / n

    return run


def logged(function):
    """The loss, and then what TRL logs."""

    def run(logp, *fields):
        total, n, metrics = function(logp, *fields)
        return total / n, *metrics()

    return run


def joint(function):
    """Loss and gradient as one graph, so that a compiler can fuse the backward with the forward."""
    both = torch.func.grad_and_value(alone(function))

    class Joint(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logp, *fields):
            gradient, loss = compiled(logp.detach(), *fields)
            ctx.save_for_backward(gradient)
            return loss

        @staticmethod
        def backward(ctx, g):
            return (ctx.saved_tensors[0] * g, *(None,) * 4)[: len(ctx.needs_input_grad)]

    compiled = torch.compile(both, dynamic=False)
    return Joint.apply


def chunked(function):
    """Loss and gradient a few rows at a time: temporaries stay in the cache."""

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logp, *fields):
            gradient, total, count = torch.empty_like(logp), 0.0, 0
            for at in range(0, logp.shape[0], ROWS):
                part = slice(at, at + ROWS)
                with torch.enable_grad():
                    leaf = logp[part].detach().requires_grad_()
                    loss, n, _ = function(leaf, *(x[part] for x in fields))
                (gradient[part],) = torch.autograd.grad(loss, leaf)
                total, count = total + loss.detach(), count + n
            ctx.save_for_backward(gradient.div_(count))
            return total / count

        @staticmethod
        def backward(ctx, g):
            return (ctx.saved_tensors[0] * g, *(None,) * 4)[: len(ctx.needs_input_grad)]

    return Chunked.apply
