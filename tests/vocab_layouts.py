"""What the tests of heads in other layouts run on each rank: meshes of two dimensions, FSDP2, Megatron's layers."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import rlfast
from rlfast import heads
from rlfast.distributed import Gathered, VocabParallel, groups
from rlfast.integrations import megatron
from tests import cases
from tests.rank_pool import SIZE, group
from tests.vocab_cases import head, mesh_of, plain, said

DEPTH, VOCAB, ROWS = 8, 24, 5


def square():
    """Two rows of two ranks."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


LAYOUTS = {
    "a row": (mesh_of, [Shard(0)]),
    "HSDP": (square, [Replicate(), Shard(0)]),
    "two dimensions": (square, [Shard(0), Shard(0)]),
}


def on_own_tokens(problem, backend: str, mean: bool, layout: str) -> tuple:
    """A quarter of the rows on each rank, with a head that all of them have a part of."""
    make, placements = LAYOUTS[layout]
    mesh, rank = make(), dist.get_rank()
    rows = problem.targets.shape[0] // SIZE
    at = slice(rank * rows, (rank + 1) * rows)
    spread = {k: distribute_tensor(problem.inputs[k], mesh, placements) for k in ("weight", "bias")}
    inputs = spread | {"hidden": problem.inputs["hidden"][at]}
    mine = replace(problem, inputs=inputs, targets=problem.targets[at], call={"process_group": Gathered(mean)})
    out, gradients = cases.run(mine, backend)
    assert all(gradients[name].placements == spread[name].placements for name in spread)
    return plain(out), {name: g.full_tensor() if name in spread else g for name, g in gradients.items()}


def drawn(rows: int = SIZE * ROWS) -> tuple:
    """(hidden, weight, targets), the same on every rank."""
    draw = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(rows, DEPTH, generator=draw), torch.randn(VOCAB, DEPTH, generator=draw)
    return hidden, weight, torch.randint(VOCAB, (rows,), generator=draw)


def beside_fsdp2(kind: str) -> tuple:
    """The gradient of a head under FSDP2 by ``Gathered`` and by its own forward, whole, as the mean over the ranks."""
    hidden, weight, targets = drawn()
    mesh, model = square(), torch.nn.Linear(DEPTH, VOCAB, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    part, parts = dist.get_rank(), SIZE
    if kind == "HSDP":
        fully_shard(model, mesh=mesh)
    else:  # ranks of a row have the same tokens
        model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh["tp"], [Shard(0)]))
        fully_shard(model, mesh=mesh["dp"])
        part, parts = mesh.get_local_rank("dp"), 2
    rows = len(targets) // parts
    at = slice(part * rows, (part + 1) * rows)
    out = rlfast.linear_token_logps(hidden[at], model.weight, targets[at], process_group=Gathered())
    out.logp.mean().backward()
    ours, model.weight.grad = model.weight.grad, None
    assert ours.placements == model.weight.placements
    if kind == "HSDP":
        logp = torch.log_softmax(model(hidden[at]), -1).gather(1, targets[at, None])
        logp.mean().backward()
    theirs = model.weight.grad
    return ours.full_tensor(), None if theirs is None else theirs.full_tensor()


def narrow_weights() -> dict:
    """A float32 parameter under bfloat16 hidden states: the dtype that it comes with, and that of its gradient."""
    hidden, weight, targets = drawn()
    parameter = torch.nn.Parameter(distribute_tensor(weight, mesh_of(), [Shard(0)]))
    narrow = hidden.bfloat16()
    found = {"unsaid": said(lambda: rlfast.linear_token_logps(narrow, parameter, targets, process_group=Gathered()))}
    ways = Gathered(dtype=torch.bfloat16), rlfast.distributed.gathered(parameter, dtype=torch.bfloat16)
    for name, way in zip(("call", "before"), ways, strict=True):
        more = {"process_group": way} if name == "call" else {}
        out = rlfast.linear_token_logps(narrow, way.tensor() if name == "before" else parameter, targets, **more)
        (gradient,) = torch.autograd.grad(out.logp.sum(), parameter)
        found[name] = out.logp.detach(), gradient.full_tensor()
    found["twice"] = torch.equal(ways[1].tensor(), ways[1].tensor())
    found["dtype"] = said(lambda: Gathered(dtype=torch.int64))
    return found


def a_rank_is_missing() -> tuple:
    """The error of a rank that gathers a head while rank 1 does something else, and the seconds that it took."""
    fresh = dist.new_group(list(range(SIZE)), timeout=timedelta(seconds=2))
    mesh = DeviceMesh.from_group(fresh, "cpu")
    weight = distribute_tensor(drawn()[1], mesh, [Shard(0)])
    if dist.get_rank() == 1:
        time.sleep(3.0)
        return "", 0.0
    start = time.monotonic()
    error = said(lambda: rlfast.linear_token_logps(*drawn()[:1], weight, drawn()[2], process_group=Gathered()))
    return error, time.monotonic() - start


def dtensors() -> dict:
    """Hidden states and factors that are ``DTensor``s: what comes back, or the error."""
    mesh, (hidden, weight, targets) = mesh_of(), drawn(SIZE)
    spread = distribute_tensor(weight, mesh, [Shard(0)])
    everywhere, tokens = (distribute_tensor(hidden, mesh, [p]) for p in (Replicate(), Shard(0)))
    a, b = torch.ones(2, DEPTH), torch.ones(VOCAB, 2)
    ours = distribute_tensor(b, mesh, [Shard(0)])
    found, loss = {}, rlfast.loss("reinforce")

    def logp(hidden, targets=targets, weight=spread):
        return rlfast.linear_token_logps(hidden, weight, targets).logp

    def lora(a, b, weight=spread, **more):
        given = {"adv": torch.ones(2), "lora": (a, b, 0.5)} | more
        return loss.linear(hidden.view(2, 2, -1), weight, targets.view(2, 2), **given).logp.flatten()

    def pair(ref_hidden, weight=spread):
        return rlfast.linear_divergence(hidden, weight, ref_hidden, weight).value

    def of_group(weight, chosen):
        return rlfast.linear_token_logps(hidden, weight, targets, process_group=chosen).logp

    wide = everywhere.detach().requires_grad_()
    found["hidden"] = torch.equal(logp(wide), logp(hidden))
    (gradient,) = torch.autograd.grad(logp(wide).sum(), wide)
    found["layout"] = gradient.placements == wide.placements
    found["tokens"] = said(lambda: logp(tokens, targets[dist.get_rank() : dist.get_rank() + 1]))
    found["a"] = torch.equal(lora(distribute_tensor(a, mesh, [Replicate()]), ours), lora(a, ours))
    found["a, sharded"] = said(lambda: lora(distribute_tensor(a, mesh, [Shard(1)]), ours))
    found["b, replicated"] = said(lambda: lora(a, distribute_tensor(b, mesh, [Replicate()])))
    both = (distribute_tensor(x, mesh, [Shard(0)]) for x in (torch.ones(SIZE, DEPTH), torch.ones(VOCAB, SIZE)))
    found["lora, gathered"] = torch.equal(
        lora(*both, process_group=Gathered()), lora(torch.ones(SIZE, DEPTH), torch.ones(VOCAB, SIZE), weight)
    )
    found["ref_hidden"] = torch.equal(pair(everywhere), pair(hidden))
    found["ref_hidden, sharded"] = said(lambda: pair(tokens))
    grid = square()
    across = distribute_tensor(weight, grid, [Shard(0), Shard(0)])
    found["two dimensions"] = said(lambda: logp(hidden, weight=across))
    of_tp, of_dp = (distribute_tensor(weight, grid, p) for p in ([Replicate(), Shard(0)], [Shard(0), Replicate()]))
    found["its dimension"] = torch.equal(logp(hidden, weight=of_tp), of_group(of_tp, grid["tp"]))
    found["another dimension"] = said(lambda: of_group(of_tp, grid["dp"]))
    found["another group"] = said(lambda: of_group(of_tp, group(SIZE)))
    found["another bias"] = said(lambda: rlfast.linear_token_logps(hidden, of_tp, targets, of_dp.sum(1)))
    found["another reference"] = said(lambda: rlfast.linear_divergence(hidden, of_tp, hidden, of_dp))
    found["another teacher"] = said(lambda: rlfast.divergence(of_tp.T, of_dp.T))
    found["another factor"] = said(lambda: lora(a, of_dp[:, :2], of_tp))
    return found


def accumulated() -> dict:
    """``accumulate_grad`` with a head that is a ``DTensor``: its gradient after two backwards, or the error."""
    mesh, (hidden, weight, targets) = mesh_of(), drawn(8)
    parameter = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))

    def step(**more):
        given = {"adv": torch.ones(2), "accumulate_grad": True} | more
        return rlfast.loss("reinforce").linear(hidden.view(2, 4, -1), parameter, targets.view(2, 4), **given).loss

    step().backward()
    once = parameter.grad.full_tensor()
    step().backward()
    assert parameter.grad.placements == parameter.placements
    return {
        "once": once,
        "twice": parameter.grad.full_tensor(),
        "gathered": said(lambda: step(process_group=Gathered())),
    }


class GatheredTokens(torch.autograd.Function):
    """Megatron's ``gather_from_sequence_parallel_region``: the backward sums over the ranks, and scatters."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(SIZE)]
        dist.all_gather(parts, x.contiguous(), group=group(SIZE))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, g):
        total = g.contiguous().clone()
        dist.all_reduce(total, group=group(SIZE))
        return total.chunk(SIZE)[dist.get_rank()]


def under_megatron(function: str) -> tuple:
    """(this rank's ∂hidden, its ∂weight) of log-probs behind such a gather."""
    hidden, weight, targets = drawn()
    rank, whole = dist.get_rank(), group(SIZE)
    own, shard = (x.chunk(SIZE)[rank].clone().requires_grad_() for x in (hidden, weight))
    rows = GatheredTokens.apply(own)
    if function == "verl's":
        logp, entropy = megatron.linear_cross_entropy(rows, shard, targets, 1.0, "none", whole)
        value = logp.sum() + entropy.sum()
    else:
        share = VocabParallel(whole, sum_hidden=False)
        heads.FEWEST_ROWS = SIZE
        budget = {"again": 0, "chunks": SIZE * 4 * VOCAB // SIZE, "one chunk": None}[function]
        call = {"adv": torch.ones(ROWS), "process_group": share, "memory_budget": budget}
        given = (x.view(ROWS, SIZE, *x.shape[1:]) for x in (rows, targets))
        hidden, targets = given
        value = rlfast.loss("reinforce", reduce="token_sum").linear(hidden, shard, targets, **call).loss
    value.backward()
    return own.grad, shard.grad


def other_options() -> dict:
    """What each rank is told where rank 1 asks for something else."""
    rank, whole = dist.get_rank(), group(SIZE)
    hidden, weight, targets = head(rank, 6)
    odd, found = rank == 1, {}
    logits = torch.zeros(5, 6)

    def logps(targets=targets, **options):
        return rlfast.linear_token_logps(hidden, weight, targets, process_group=whole, **options)

    def pair(**options):
        return rlfast.divergence(logits, logits, process_group=whole, **options)

    def loss(name="reinforce", **options):
        given = {"adv": torch.ones(1), "process_group": whole} | options
        return rlfast.loss(name).linear(hidden[None], weight, targets[None], **given)

    def preference(name="simpo", rows=5, **options):
        sides = hidden[None], hidden[None, :rows]
        return rlfast.preference_loss(name).linear(
            *sides, weight, targets[None], targets[None, :rows], process_group=whole, **options
        )

    calls = {
        "outputs": lambda: logps(outputs=("entropy",) if odd else ()),
        "outputs of logits": lambda: rlfast.token_logps(
            logits, targets, outputs=("lse", "is_top1") if odd else ("lse",), process_group=whole
        ),
        "top_k": lambda: logps(top_k=3 if odd else 2),
        "targets": lambda: logps(targets.unsqueeze(1).repeat(1, 2) if odd else targets),
        "function": lambda: pair() if odd else rlfast.token_logps(logits, targets, process_group=whole),
        "kind": lambda: pair(kind="jsd" if odd else "reverse_kl"),
        "top_k of a divergence": lambda: pair(top_k=3 if odd else 2),
        "tail": lambda: pair(top_k=3, tail="bucket" if odd else "renormalize"),
        "loss": lambda: loss("grpo" if odd else "reinforce"),
        "entropy": lambda: loss(entropy=odd),
        "memory_budget": lambda: loss(memory_budget=0 if odd else None),
        "sum_hidden": lambda: rlfast.linear_token_logps(
            hidden, weight, targets, process_group=VocabParallel(whole, sum_hidden=not odd)
        ),
        "preference": lambda: preference("cpo" if odd else "simpo"),
        "rejected rows": lambda: preference(rows=4 if odd else 5),
        "mask": lambda: loss(mask=torch.arange(5)[None] > odd),
        "mask of the chosen": lambda: preference(chosen_mask=torch.arange(5)[None] > odd),
    }  # fmt: skip
    for name, call in calls.items():
        found[name] = said(call)
    found["after"] = said(logps)
    return found


class OnGpu(str):
    """What ``torch.device("cuda")`` says of itself, on a CPU."""

    type = "cuda"


def where_nobody_looks() -> dict:
    """Two heads of one group that differ in rank 3's columns alone, as on a GPU, where a later call shows nothing."""
    real, whole, rank = groups.agreed, group(SIZE), dist.get_rank()
    hidden, weight, targets = drawn(SIZE)
    wide, narrow = weight.chunk(SIZE)[rank].clone(), weight[: VOCAB - 1].clone().tensor_split((6, 12, 18))[rank]
    groups.agreed = lambda share, columns, facts, rows, device: real(share, columns, facts, rows, OnGpu("cpu"))
    try:
        found, targets = {}, targets % (VOCAB - 1)
        for name, shard, size in (("wide", wide, VOCAB), ("narrow", narrow, VOCAB - 1), ("wide", wide, VOCAB)):
            logp = rlfast.linear_token_logps(hidden, shard, targets, process_group=whole).logp
            found[name] = logp, rlfast.linear_token_logps(hidden, weight[:size], targets).logp
        unsaid = said(lambda: rlfast.token_logps(hidden @ wide.T, targets, process_group=whole))
        share = VocabParallel(whole, vocab_size=VOCAB)
        found["logits"] = rlfast.token_logps(hidden @ wide.T, targets, process_group=share).logp, found["wide"][1]
        return found | {"unsaid": unsaid}
    finally:
        groups.agreed = real
