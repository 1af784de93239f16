"""The strongest plain PyTorch that we could write for policy losses, at most 40 lines each."""

from __future__ import annotations

import torch

ROWS = 32  # 32 rows of 1024 float32 tokens are 128 KiB a temporary: what eager makes of a chunk stays in the cache


def clipped(ratio, adv, low=0.2, high=0.2):
    """−min(r·A, clip(r)·A), as every trainer has it."""
    return -torch.min(ratio * adv, torch.clamp(ratio, 1 - low, 1 + high) * adv)


def ppo(logp, old_logp, adv, mask):
    """Token mean of PPO's clip."""
    loss = clipped(torch.exp(logp - old_logp), adv.unsqueeze(1))
    return (loss * mask).sum(), mask.sum()


def grpo(logp, old_logp, adv, mask, ref_logp):
    """Mean over sequences of PPO's clip + 0.04·k3."""
    loss = clipped(torch.exp(logp - old_logp), adv.unsqueeze(1))
    loss = loss + 0.04 * (torch.exp(ref_logp - logp) - (ref_logp - logp) - 1)
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).sum(), logp.shape[0]


def gspo(logp, old_logp, adv, mask):
    """Mean over sequences of PPO's clip of the geometric mean ratio."""
    x = ((logp - old_logp) * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
    loss = clipped(torch.exp(x).unsqueeze(-1), adv.unsqueeze(1), 3e-4, 4e-4)
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).sum(), logp.shape[0]


def cispo(logp, old_logp, adv, mask):
    """Token mean of −sg(clip(r))·A·log p."""
    weight = torch.clamp(torch.exp(logp - old_logp), 0.8, 1.2).detach()
    return (-weight * adv.unsqueeze(1) * logp * mask).sum(), mask.sum()


def sapo(logp, old_logp, adv, mask):
    """Mean over sequences of the soft gate."""
    adv = adv.unsqueeze(1)
    tau = torch.where(adv > 0, 1.0, 1.05)
    gate = torch.sigmoid(tau * (torch.exp(logp - old_logp) - 1)) * 4 / tau
    return ((-gate * adv * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).sum(), logp.shape[0]


LOSSES = {"ppo": ppo, "grpo": grpo, "gspo": gspo, "cispo": cispo, "sapo": sapo}


def eager(function):
    """The loss, divided by its count."""

    def run(logp, *fields):
        total, n = function(logp, *fields)
        return total / n

    return run


def joint(function):
    """Loss and gradient as one graph, so that a compiler can fuse the backward with the forward."""
    both = torch.func.grad_and_value(eager(function))

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
                    loss, n = function(leaf, *(x[part] for x in fields))
                (gradient[part],) = torch.autograd.grad(loss, leaf)
                total, count = total + loss.detach(), count + n
            ctx.save_for_backward(gradient.div_(count))
            return total / count

        @staticmethod
        def backward(ctx, g):
            return (ctx.saved_tensors[0] * g, *(None,) * 4)[: len(ctx.needs_input_grad)]

    return Chunked.apply
