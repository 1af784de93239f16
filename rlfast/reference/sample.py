"""A token sampled from a row of logits: the definition, a row at a time, by sorting the whole distribution."""

import math

import torch

WORD = 0xFFFFFFFF


def philox(counter, key):
    """Four words of 32 bits of a counter of four and a key of two, in int64: Philox4x32-10.

    Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2⁶⁴, as int64 wraps
        c0, c1, c2, c3 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD, ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def words(seed: int, position: int, vocab: int):
    """The word of every token, int64 [vocab]."""
    block = torch.arange((vocab + 3) // 4)
    zero = torch.zeros_like(block)
    counter = (zero + (position & WORD), zero + ((position >> 32) & WORD), block, zero)
    return torch.stack(philox(counter, (seed & WORD, (seed >> 32) & WORD)), -1).flatten()[:vocab]


def gumbel(seed: int, position: int, vocab: int):
    """−log(−log u) of every token, float64 [vocab]; u is in (0, 1)."""
    u = ((words(seed, position, vocab) >> 8).double() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(u))


def edited(x, edits, allowed):
    """The logits of a row with (id, value) pairs put in, in their order, and −inf where ``allowed`` is False."""
    w = x.clone()
    for at, value in edits or ():
        w[at] = value
    return w if allowed is None else torch.where(allowed | w.isnan(), w, -math.inf)


def probabilities(w, temperature):
    """softmax(w / T); T is 0 where the largest is taken, for which T = 1 counts."""
    return torch.softmax((w - w.max()) / (temperature or 1.0), -1)


def keeps(w, q, top_k: int, top_p: float, min_p: float):
    """Which ids top-k, then top-p, then min-p leave. Ties with the last that stays stay too."""
    order = torch.argsort(w, descending=True)
    keep = torch.ones_like(w, dtype=torch.bool)
    if 0 < top_k < len(w):
        keep = w >= w[order[top_k - 1]]
    if top_p < 1:
        p = torch.where(keep, q, 0.0)
        reached = (p / p.sum())[order].cumsum(0) >= top_p
        last = int(reached.to(torch.int8).argmax()) if bool(reached.any()) else len(w) - 1
        keep = keep & (w >= w[order[last]])
    return keep & (q >= min_p * q.max())


def perturbed(w, keep, temperature, seed: int, position: int):
    """What the token is the argmax of."""
    if temperature == 0:
        return w
    value = (w - w.max()) / temperature + gumbel(seed, position, len(w)).to(w.dtype)
    return torch.where(keep & (w > -math.inf), value, -math.inf)


def row(x, temperature, top_k, top_p, min_p, seed, position, edits=None, allowed=None, token=None) -> tuple:
    """(token, logp_raw, logp, kept, entropy) of one row; of a given token, if there is one."""
    w, nothing = edited(x, edits, allowed), x.new_tensor(math.nan)
    wrong = x.isnan().any() or w.isnan().any() or (x == math.inf).any() or not w.max().isfinite()
    if bool(wrong):
        return torch.tensor(-1), nothing, nothing, nothing, nothing
    q = probabilities(w, temperature)
    keep = torch.ones_like(w, dtype=torch.bool) if temperature == 0 else keeps(w, q, top_k, top_p, min_p)
    if token is None:
        value = perturbed(w, keep, temperature, seed, position)
        token = (value == value.max()).to(torch.int8).argmax()
    raw = torch.log_softmax(x, -1)
    entropy = -torch.where(raw > -math.inf, raw.exp() * raw, 0.0).sum()
    if temperature == 0:
        return token, raw[token], torch.zeros_like(entropy), q[token], entropy
    z = torch.where(keep, (w - w.max()) / temperature, -math.inf)
    return token, raw[token], torch.log_softmax(z, -1)[token], q[keep].sum(), entropy


def sample(
    logits,  # [M, V]
    temperature, top_k, top_p, min_p, seeds, positions,  # [M] each
    *,
    edits=None,  # a list of (id, value) pairs a row
    allowed=None,  # bool [M, V]
    tokens=None,  # [M]: those that the others are asked of, in place of the sampled ones
    dtype=None,
):  # fmt: skip
    """(tokens, logp_raw, logp, kept, entropy), each [M]. Computes in ``dtype`` (default: float32, or float64)."""
    dtype = dtype or (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    options = [x.tolist() for x in (temperature, top_k, top_p, min_p, seeds, positions)]
    rows = []
    for i, x in enumerate(logits.to(dtype)):
        given = (edits and edits[i], None if allowed is None else allowed[i], None if tokens is None else tokens[i])
        rows.append(row(x, *(option[i] for option in options), *given))
    if not rows:
        return (torch.empty(0, dtype=torch.int64), *(logits.new_empty(0, dtype=dtype) for _ in range(4)))
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))
