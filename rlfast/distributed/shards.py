"""Which part of every row a rank has, and the scan that goes on from one part to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast import backends, validate
from rlfast.advantages import affine_scan as local_scan
from rlfast.advantages.rows import MASKINGS
from rlfast.distributed.ranks import FLAGS, Said, alike, gathered, ranks_of

LAYOUTS = {"contiguous": 1, "zigzag": 2}  # chunks of a row that a rank has
FORMS = ("None", "one a row", "one a token", "a tensor of another shape")
FUNCTIONS = ("shifted_targets", "affine_scan", "gae", "vtrace")
# What ranks say of a call before its first collective, of which any other would be mistaken for another's.
WORDS = (*FLAGS, "given", *FORMS, *LAYOUTS, *MASKINGS, *FUNCTIONS)
MOST = 10  # that a call says


def form(x, tokens: torch.Tensor) -> str:
    """Whether a tensor is one number a row or one a token; what is none counts as not given."""
    if not isinstance(x, torch.Tensor):
        return FORMS[0]
    return {tokens.shape[:-1]: FORMS[1], tokens.shape: FORMS[2]}.get(x.shape, FORMS[3])


class Shards:
    """Which part of every row a rank has: one chunk after the other along the first dimension.

    "contiguous": rank r of W has the r-th of W. "zigzag": the r-th and the (2W − 1 − r)-th of 2W, side by side, as
    causal attention over ranks wants it.
    """

    def __init__(self, process_group, layout: str):
        self.ranks = ranks_of(process_group)
        if self.ranks is None:
            validate.fail("process_group", "the ranks over which rows are spread", "None", TypeError)
        self.layout = validate.one_of("layout", layout, tuple(LAYOUTS))
        self.chunks = LAYOUTS[layout]

    def compare(self, function: str, named: dict, **said: str) -> None:
        """An error on every rank, where values may be looked at, if the ranks' calls are not of one kind.

        Args:
            function: the name of the one that is called.
            named: its tokens by their name.
            said: words of WORDS by the name of what they are about, in one order for a function.
        """
        tokens = {name: x[..., :0] for name, x in named.items()}
        words = {"function": function, "layout": self.layout} | said
        alike(tokens, self.ranks, Said(words, WORDS, MOST))

    def split(self, name: str, x):
        """[R, T] → [chunks·R, T/chunks]; None stays None."""
        if x is None or self.chunks == 1:
            return x
        if x.shape[1] % self.chunks:
            validate.fail(name, f"tokens in {self.chunks} chunks of one length, in a zigzag layout", validate.shape(x))
        return x.unflatten(1, (self.chunks, -1)).transpose(0, 1).flatten(0, 1)

    def joined(self, x):
        """The other way."""
        return x if self.chunks == 1 else x.unflatten(0, (self.chunks, -1)).transpose(0, 1).flatten(1)

    def in_order(self, every):
        """[ranks, chunks, …] → the chunks of a row in their order."""
        if self.chunks == 1:
            return every[:, 0]
        return torch.cat((every[:, 0], every[:, 1].flip(0)))

    def own(self, each):
        """Of the chunks of a row in their order, this rank's."""
        rank, size = self.ranks.rank, self.ranks.size
        places = [rank] if self.chunks == 1 else [rank, 2 * size - 1 - rank]
        return each[places]


class _Carry(torch.autograd.Function):
    """The state before each of this rank's chunks: the maps of those before it, folded.

    s_{c+1} = b_c + a_c·s_c in the order of the scan. With u_c the gradient of s_c and of all that comes of it,
    u_c = g_c + a_c·u_{c+1}, ∂b_c = u_{c+1}, ∂a_c = u_{c+1}·s_c.
    """

    @staticmethod
    def forward(ctx, maps, initial, shards: Shards, reverse: bool):
        every = shards.in_order(gathered(maps, shards.ranks, "the maps of the scan"))
        every = every.flip(0) if reverse else every  # in the order of the scan
        states = [initial]
        for a, b in every.unbind(0):
            states.append(b + a * states[-1])
        states = torch.stack(states[:-1])
        ctx.save_for_backward(every[:, 0], states)
        ctx.shards, ctx.reverse = shards, reverse
        return shards.own(states.flip(0) if reverse else states)

    @staticmethod
    def backward(ctx, g):
        a, states = ctx.saved_tensors
        shards, flip = ctx.shards, ctx.reverse
        g = shards.in_order(gathered(g, shards.ranks, "the maps of the scan, backward"))
        g = g.flip(0) if flip else g
        later, found = torch.zeros_like(g[0]), []
        for c in reversed(range(len(g))):
            found.append(torch.stack((later * states[c], later)))
            later = g[c] + a[c] * later
        found = torch.stack(found)  # from the last to the first
        last = shards.own(torch.arange(len(g)))
        first = (len(g) - 1 if flip else 0) in last.tolist()  # who has the row's first step was given the state
        own = shards.own(found if flip else found.flip(0))
        return own, later if first else torch.zeros_like(later), None, None


class State(NamedTuple):
    """What a scan found, in float64."""

    out: torch.Tensor  # [chunks·R, T]
    carry: torch.Tensor  # [chunks·R]: the state before the first step of each chunk

    def before(self):
        """The state that each step started from, of a scan from the right."""
        return torch.cat((self.out[:, 1:], self.carry.unsqueeze(1)), 1)


def scan(a, b, mask, initial, shards: Shards, reverse: bool = True) -> State:
    """The recurrence over the chunks [chunks·R, T] of all ranks; initial [R]."""
    with backends.use_backend("torch"):  # float64
        alone = local_scan(a, b, reverse, mask=mask)
        product = (a if mask is None else torch.where(mask, a, 1.0)).prod(1)
        edge = (alone[:, 0] if reverse else alone[:, -1]) if b.shape[1] else torch.zeros_like(product)
        maps = torch.stack((product, edge)).unflatten(1, (shards.chunks, -1)).transpose(0, 1)
        carry = _Carry.apply(maps, initial, shards, reverse).flatten()
        return State(local_scan(a, b, reverse, mask=mask, initial=carry), carry)
