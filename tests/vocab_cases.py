"""What the tests of shared vocabularies run on each rank, and how the ranks' results become one."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import rlfast
from rlfast import heads
from rlfast.distributed import Gathered, VocabParallel
from rlfast.integrations import megatron
from tests import cases, divergence_cases, linear_policy_cases
from tests import test_linear_preference_loss as preference
from tests.rank_pool import SIZE, fresh_group, group

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
        elif isinstance(case, preference.Case):
            data = shard(case.data, columns_of(preference.VOCAB, size, aligned), rank)
            mine = replace(case, data=data, rest=case.rest | {"process_group": spread})
            out, gradients = preference.run(mine, backend)
            out = plain(out._replace(metrics=out.metrics.values))
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
        self.gathered, self.reduced, self.bytes = [], [], []
        self.name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        self.before = getattr(dist, self.name), dist.all_reduce

        def gather(out, x, **more):
            self.gathered.append(x.numel())
            self.bytes.append(x.numel() * x.element_size())
            return self.before[0](out, x, **more)

        def reduce(x, **more):
            self.reduced.append(x.numel())
            self.bytes.append(x.numel() * x.element_size())
            return self.before[1](x, **more)

        setattr(dist, self.name, gather)
        dist.all_reduce = reduce
        return self

    def __exit__(self, *_):
        setattr(dist, self.name, self.before[0])
        dist.all_reduce = self.before[1]


def said(call) -> str:
    """The error of a call."""
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Partitions:
    """A weight that is there within a context alone, as ZeRO-3 has its parameters."""

    def __init__(self, weight):
        self.weight, self.whole, self.uses = weight, weight.data, 0
        weight.data = torch.empty(0, dtype=weight.dtype)

    def __call__(self):
        return self

    def __enter__(self):
        self.uses += 1
        self.weight.data = self.whole

    def __exit__(self, *_):
        self.weight.data = torch.empty(0, dtype=self.weight.dtype)


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
    found["group"] = call(hidden, weight, targets, share="tp")
    found["no group"] = call(hidden, weight, targets, share=VocabParallel())
    found["plain"] = call(hidden, weight, targets, share=Gathered())
    found["batch_invariant"] = call(hidden, weight, targets, batch_invariant=True)
    across = distribute_tensor(torch.randn(24, 8), mesh_of(), [Shard(1)])
    found["dimension"] = call(hidden, across, targets)
    square = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found["mesh"] = call(hidden, weight, targets, share=square)
    with rlfast.use_backend("reference"):
        found["backend"] = call(hidden, weight, targets)
    found["after"] = call(hidden, weight, targets)
    # two heads that three of the ranks cannot tell apart
    narrow = weight[: 6 - rank // 3]
    runs = [rlfast.linear_token_logps(hidden, w, targets, process_group=whole).logp for w in (weight, narrow) * 2]
    found["two heads"] = [torch.equal(runs[i], runs[i + 2]) for i in (0, 1)] + [torch.equal(*runs[:2])]
    return found


def a_rank_fails() -> tuple:
    """(the error of each rank, the seconds that it took): rank 1 has a target that there is not, and never comes."""
    rank, (hidden, weight, targets) = dist.get_rank(), head(dist.get_rank(), 6)
    share = VocabParallel(fresh_group(list(range(SIZE))), timeout=2.0)
    rlfast.linear_token_logps(hidden, weight, targets, process_group=share)
    wrong = targets + 20 if rank == 1 else targets
    start = time.monotonic()
    error = said(lambda: rlfast.linear_token_logps(hidden, weight, wrong, process_group=share))
    return error, time.monotonic() - start


def other_shapes() -> str:
    """The error of each rank where rank 2 has a token more."""
    rank, (hidden, weight, targets) = dist.get_rank(), head(dist.get_rank(), 6)
    share = VocabParallel(fresh_group(list(range(SIZE))), timeout=2.0)
    rlfast.linear_token_logps(hidden, weight, targets, process_group=share)
    more = [torch.cat((x, x[:1])) if rank == 2 else x for x in (hidden, targets)]
    return said(lambda: rlfast.linear_token_logps(more[0], weight, more[1], process_group=share))


def mesh_of(size: int = SIZE):
    """All ranks in a row."""
    return dist.device_mesh.init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))


def on_mesh(problem, backend: str, named: str) -> tuple:
    """A head whose weight and bias are ``DTensor``s: the mesh is theirs, or named."""
    mesh = mesh_of()
    along = {name: x for name, x in problem.inputs.items() if name in ALONG and x is not None}
    spread = {name: distribute_tensor(x, mesh, [Shard(ALONG[name] % x.dim())]) for name, x in along.items()}
    more = {"a mesh": {"process_group": mesh}, "options": {"process_group": VocabParallel(width=512)}}.get(named, {})
    out, gradients = cases.run(replace(problem, inputs=problem.inputs | spread, call=problem.call | more), backend)
    assert all(gradients[name].placements == spread[name].placements for name in spread)
    return plain(out), {name: g.full_tensor() if name in spread else g for name, g in gradients.items()}


class Lora(torch.nn.Module):
    """A body with a frozen layer and a low-rank one beside it, under a head."""

    def __init__(self, depth: int = 24, vocab: int = 101, rank: int = 4):
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.base = torch.nn.Parameter(torch.randn(depth, depth, generator=draw), requires_grad=False)
        self.a = torch.nn.Parameter(torch.randn(rank, depth, generator=draw))
        self.b = torch.nn.Parameter(torch.randn(depth, rank, generator=draw))
        self.head = torch.nn.Linear(depth, vocab, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(vocab, depth, generator=draw) / depth**0.5)

    def forward(self, x):
        return torch.tanh(x @ self.base.T * 0.2 + x @ self.a.T @ self.b.T * 0.1)


def lora_batch() -> dict:
    """Prompts of four ranks."""
    draw = torch.Generator().manual_seed(6)
    return {
        "x": torch.randn(2 * SIZE, 5, 24, generator=draw),
        "targets": torch.randint(101, (2 * SIZE, 5), generator=draw),
        "adv": torch.randn(2 * SIZE, generator=draw),
    }


def lora_step(model, batch: dict, weight=None, **more):
    """A step's gradients, and its loss."""
    hidden, targets, adv = model(batch["x"]), batch["targets"], batch["adv"]
    weight = model.head.weight if weight is None else weight.tensor()
    loss = rlfast.loss("reinforce").linear(hidden, weight, targets, adv=adv, **more).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def sharded_lora(way: str) -> tuple:
    """The same under FSDP2, a rank's share of the batch on each: the mean of the ranks' losses, the gradients."""
    mesh, rank, model = mesh_of(), dist.get_rank(), Lora()
    if way != "kept by the root":
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch, more = {name: x[2 * rank : 2 * rank + 2] for name, x in lora_batch().items()}, {}
    assert isinstance(model.head.weight, DTensor)
    if way == "gathered for the call":
        more = {"process_group": Gathered()}
    elif way == "gathered before":
        more = {"weight": rlfast.distributed.gathered(model.head.weight)}
    loss, gradients = lora_step(model, batch, **more)
    dist.all_reduce(loss)
    return loss / SIZE, gradients


def megatrons(problem) -> dict:
    """What the functions under others' names give, with their gradients, on four ranks."""
    whole, rank = group(SIZE), dist.get_rank()
    columns = columns_of(vocab_of(problem.inputs), SIZE)
    mine = shard(problem.inputs | {"logits": problem.inputs["hidden"] @ problem.inputs["weight"].T}, columns, rank)
    hidden, weight, logits = (mine[name].clone().requires_grad_() for name in ("hidden", "weight", "logits"))
    found = {}
    logp, entropy = megatron.linear_cross_entropy(hidden, weight, problem.targets, 1.0, "none", whole)
    found["head"] = logp.detach(), *torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
    found["mean"] = megatron.linear_cross_entropy(hidden, weight, problem.targets, 1.0, "mean", whole)[0].detach()
    for name, value in (
        ("log-prob", megatron.vocab_parallel_log_probs_from_logits(logits, problem.targets, whole)),
        ("loss", megatron.fused_vocab_parallel_cross_entropy(logits, problem.targets, whole)),
        ("entropy", megatron.vocab_parallel_entropy_with_chunking(logits, group=whole)),
    ):
        found[name] = value.detach(), *torch.autograd.grad(value.sum(), logits)
    found["squares"] = megatron.vocab_parallel_sum_pi_squared(logits, whole)
    return found
