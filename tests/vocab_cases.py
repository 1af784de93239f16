"""What the tests of shared vocabularies run on each rank, and how the ranks' results become one."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

import rlfast
from rlfast import heads
from rlfast.distributed import VocabParallel
from tests import cases, divergence_cases, linear_policy_cases
from tests.rank_pool import SIZE, group

SIZES = (1, 2, SIZE)
ALONG = {"logits": -1, "ref_logits": -1} | dict.fromkeys(("weight", "bias", "ref_weight", "ref_bias", "lora_b"), 0)


def columns_of(vocab: int, size: int, aligned: int = 1) -> list[int]:
    """Uneven shards: the first are the widest, the last has what is left."""
    each = -(-vocab // (size * aligned)) * aligned
    return [max(0, min(each, vocab - r * each)) for r in range(size)]


def shard(inputs: dict, columns: list[int], rank: int) -> dict:
    """A rank's inputs."""
    first = sum(columns[:rank])
    return {
        name: x if name not in ALONG or x is None else x.narrow(ALONG[name], first, columns[rank])
        for name, x in inputs.items()
    }


def joined(parts: list[dict]) -> dict:
    """Gradients of all ranks as those of one."""
    return {
        name: torch.cat([part[name] for part in parts], ALONG[name]) if name in ALONG else parts[0][name]
        for name in parts[0]
    }


def vocab_of(inputs: dict) -> int:
    """Columns."""
    return inputs["logits"].shape[-1] if "logits" in inputs else inputs["weight"].shape[0]


def plain(out):
    """Tensors without their graph."""
    return type(out)(*(x.detach() if isinstance(x, torch.Tensor) else x for x in out))


def on_ranks(case, backend: str, sizes=SIZES, **share) -> dict:
    """{number of ranks: (outputs, gradients)} of this rank, of the numbers whose group it is in."""
    heads.FEWEST_ROWS = linear_policy_cases.drawn()["targets"].shape[1]
    found = {}
    aligned = share.get("width") or 1
    for size in sizes:
        if group(size) is None:
            continue
        spread, rank = VocabParallel(group(size), **share), dist.get_rank(group(size))
        if isinstance(case, linear_policy_cases.Case):
            columns = columns_of(vocab_of(case.data), size, aligned)
            data = shard(case.data, columns, rank)
            mine = replace(case, data=data, rest=case.rest | {"process_group": spread})
            out, gradients = linear_policy_cases.run(mine, backend)
            out = (out.loss.detach(), out.metrics.values, out.logp, out.entropy)
        else:
            module = divergence_cases if isinstance(case, divergence_cases.Pair) else cases
            columns = columns_of(vocab_of(case.inputs), size, aligned)
            inputs = shard(case.inputs, columns, rank)
            mine = replace(case, inputs=inputs, call=case.call | {"process_group": spread})
            out, gradients = module.run(mine, backend)
            out = plain(out)
        found[size] = out, gradients
    return found


def together(answers: list[dict]) -> dict:
    """{number of ranks: (outputs, the same on every rank; gradients of all)}."""
    found = {}
    for size in {size for answer in answers for size in answer}:
        parts = [answer[size] for answer in answers if size in answer]
        for out, _ in parts[1:]:
            for a, b in zip(out, parts[0][0], strict=True):
                same = a is b or torch.equal(a.nan_to_num(nan=7.5), b.nan_to_num(nan=7.5))
                assert same, f"{size} ranks: outputs differ"
        found[size] = parts[0][0], joined([gradients for _, gradients in parts])
    return found


class Counted:
    """Numbers that this process gives to collectives, within a ``with``."""

    def __enter__(self):
        self.gathered, self.reduced = [], []
        self.before = dist.all_gather_into_tensor, dist.all_reduce

        def gather(out, x, **more):
            self.gathered.append(x.numel())
            return self.before[0](out, x, **more)

        def reduce(x, **more):
            self.reduced.append(x.numel())
            return self.before[1](x, **more)

        dist.all_gather_into_tensor, dist.all_reduce = gather, reduce
        return self

    def __exit__(self, *_):
        dist.all_gather_into_tensor, dist.all_reduce = self.before


def traffic(case, backend: str) -> tuple:
    """(numbers gathered, numbers summed) of a second call on four ranks, the first having shaken hands."""
    on_ranks(case, backend, (SIZE,))
    with Counted() as seen:
        on_ranks(case, backend, (SIZE,))
    return seen.gathered, seen.reduced


def said(call) -> str:
    """The error of a call."""
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def head(rank: int, columns: int, depth: int = 8, rows: int = 5) -> tuple:
    """A small head's shard."""
    return torch.randn(rows, depth), torch.randn(columns, depth), torch.arange(rows)


def mismatches() -> dict:
    """What each rank is told where ranks differ."""
    rank, whole, found = dist.get_rank(), group(SIZE), {}

    def call(*args, share=None, **options):
        return said(lambda: rlfast.linear_token_logps(*args, process_group=share or whole, **options))

    found["depth"] = call(*head(rank, 6, 8 + (rank == 2)))
    hidden, weight, targets = head(rank, 6)
    narrow = torch.bfloat16 if rank == 1 else torch.float32
    found["dtype"] = call(hidden.to(narrow), weight.to(narrow), targets)
    found["bias"] = call(hidden, weight, targets, torch.zeros(6) if rank == 3 else None)
    found["vocab_size"] = call(hidden, weight, targets, share=VocabParallel(whole, vocab_size=20 + rank // 3))
    found["too few columns"] = call(hidden, weight, targets, share=VocabParallel(whole, vocab_size=25))
    found["target"] = call(hidden, weight, targets + 20)
    found["group"] = said(lambda: rlfast.linear_token_logps(hidden, weight, targets, process_group="tp"))
    found["after"] = call(hidden, weight, targets)
    return found
