"""A head that two processes share, beside the same head in one process, a thread each.

    python -m bench.parallel [--rows N] [--dtype float32] [--json PATH]

Forward and backward, values checked first, in one interleaved loop: while one process works alone the other waits. The
peer is Megatron's way in plain PyTorch: this rank's logits in full, a maximum, a sum and the target's logit all-reduced
in float32 (three exchanges, with entropies a fourth), ∂hidden in a fourth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import rlfast
from bench.run import RESULTS, stamp

VOCAB, DEPTH, ROUNDS = 49_152, 576, 7  # SmolLM2-135M's head
RANKS, MOST = 2, 0.6  # what sharing must take of the time of one process
OURS, ALONE, PEER = "rlfast, shared", "rlfast, alone", "three all-reduces, shared"


class _Reduced(torch.autograd.Function):
    """A sum over the ranks, whose gradient is every rank's own."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return g


class _Copied(torch.autograd.Function):
    """What every rank has, whose gradient is a sum over the ranks."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        dist.all_reduce(g)
        return g


def three_all_reduces(hidden, weight, targets, first: int):
    """Log-probs as ``vocab_parallel_cross_entropy`` has them."""
    logits = (_Copied.apply(hidden) @ weight.T).float()
    peak = logits.detach().amax(-1)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    x = logits - peak.unsqueeze(-1)
    inside = (targets >= first) & (targets < first + weight.shape[0])
    at = torch.where(inside, targets - first, 0)
    own = torch.where(inside, x.gather(-1, at.unsqueeze(-1)).squeeze(-1), 0.0)
    return _Reduced.apply(own) - _Reduced.apply(x.exp().sum(-1)).log()


def arms_of(rows: int, dtype: torch.dtype, rank: int) -> dict:
    """{name: (function of a step: (log-probs, ∂hidden), whether all ranks run it)}."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, DEPTH, generator=draw).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, DEPTH, generator=draw) * 2 / DEPTH**0.5).to(dtype)
    targets = torch.randint(VOCAB, (rows,), generator=draw)
    each = VOCAB // RANKS
    whole, mine = weight.requires_grad_(), weight[rank * each : (rank + 1) * each].detach().clone().requires_grad_()

    def step(logp, leaf):
        return logp.detach(), *torch.autograd.grad(logp.sum(), (hidden, leaf))

    return {
        OURS: (
            lambda: step(rlfast.linear_token_logps(hidden, mine, targets, process_group=dist.group.WORLD).logp, mine),
            True,
        ),
        ALONE: (lambda: step(rlfast.linear_token_logps(hidden, whole, targets).logp, whole), False),
        PEER: (lambda: step(three_all_reduces(hidden, mine, targets, rank * each), mine), True),
    }


def checked(arms: dict, rank: int) -> dict[str, float]:
    """The largest error of each arm beside the first: of log-probs and ∂hidden."""
    found = {name: run()[:2] for name, (run, together) in arms.items() if together or not rank}
    first = found[OURS]
    return {
        name: max(
            ((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in zip(x, first, strict=True)
        )
        for name, x in found.items()
    }


def timed(arms: dict, rank: int) -> dict[str, list[float]]:
    """Seconds of each arm, round after round; those of rank 0 count, and all begin together."""
    samples = {name: [] for name in arms}
    for round_ in range(ROUNDS):
        names = [*arms][round_ % len(arms) :] + [*arms][: round_ % len(arms)]
        for name in names:
            run, together = arms[name]
            dist.barrier()
            started = time.perf_counter()
            if together or not rank:
                run()
            samples[name].append(time.perf_counter() - started)
    return samples


def work(rank: int, folder: str, rows: int, dtype: str) -> None:
    """What a process does; rank 0 writes the answer."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    arms = arms_of(rows, getattr(torch, dtype), rank)
    errors = checked(arms, rank)
    worst = max(errors.values())
    if worst > 2e-2:
        raise RuntimeError(f"the arms differ: {errors}")
    samples = timed(arms, rank)
    if rank == 0:
        ms = {name: [1e3 * s for s in x] for name, x in samples.items()}
        ratio = {name: statistics.median(a / b for a, b in zip(ms[OURS], x, strict=True)) for name, x in ms.items()}
        answer = {"rows": rows, "dtype": dtype, "vocab": VOCAB, "depth": DEPTH, "ranks": RANKS, "errors": errors}
        answer |= {"ms": {name: statistics.median(x) for name, x in ms.items()}, "rounds": ms, "ratio": ratio}
        Path(folder, "answer").write_text(json.dumps(answer))
    dist.destroy_process_group()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "parallel.json", help="where to write it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, args.rows, args.dtype), nprocs=RANKS)
        found = json.loads(Path(folder, "answer").read_text(encoding="utf-8"))
    for name, ms in found["ms"].items():
        print(f"{ms:9.1f} ms  {name}")
    print(f"shared ÷ alone: {found['ratio'][ALONE]:.2f}, at most {MOST}")
    if args.json:
        command = f"python -m bench.parallel --rows {args.rows} --dtype {args.dtype}"
        args.json.write_text(json.dumps(stamp("cpu", command) | {"parallel": found}, indent=1) + "\n")
    return 0 if found["ratio"][ALONE] <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
