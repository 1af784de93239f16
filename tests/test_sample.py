"""``sample`` on every backend: the noise, the tokens, their numbers, what is kept, and what nothing may depend on."""

from __future__ import annotations

import pytest
import torch

import rlfast
from rlfast import backends, sampling
from rlfast.fallback import sample as fallback
from rlfast.kernels.formulas.noise import gumbel
from rlfast.kernels.lang import torch_version
from rlfast.ops import sample as sample_op
from rlfast.reference import sample as oracle
from rlfast.verify.sampling import floor, nucleus, ragged
from tests.cases import DTYPES, few
from tests.numerics import assert_same_bits, assert_value
from tests.sample_cases import P_VALUE, chi_squared, given, hold, hold_raw, moved, problem, run

OP = "sample"
KERNELS = ("torch", "cpu", "triton")
# Of Random123, kat_vectors: philox4x32, 10 rounds.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize("philox", (oracle.philox, fallback.philox), ids=("reference", "torch"))
@pytest.mark.parametrize("counter, key, wanted", KNOWN, ids=("zeros", "ones", "pi"))
def test_philox_known_answers(philox, counter, key, wanted):
    assert tuple(int(x) for x in philox(*(tuple(torch.tensor([w]) for w in part) for part in (counter, key)))) == wanted


def test_noise_is_right_and_finite_at_every_end():
    """−log(−log u) of the least and the largest numbers, about ½, and some of the rest."""
    ends = torch.arange(300)
    n = torch.cat((ends, ends + 2**23 - 150, 2**24 - 1 - ends, torch.arange(0, 2**24, 9973)))
    u = (n.double() + 0.5) * 2.0**-24
    truth = -torch.log(-torch.log(u))
    yardstick = -torch.log(-torch.log(u).float())
    assert_value("gumbel", torch_version(gumbel)(n.float()), truth, yardstick)
    assert 17.328 < float(truth.max()) < 17.33


def test_the_word_of_a_token():
    """Of word v % 4 of block v / 4 at (position, block), under the seed; negative ones count by their bits."""
    seed, position = -3, 2**40 + 5
    counter = tuple(torch.tensor([c]) for c in (5, 2**8, 2, 0))
    block = oracle.philox(counter, (0xFFFFFFFD, 0xFFFFFFFF))
    assert [int(x) for x in oracle.words(seed, position, 13)[8:12]] == [int(x) for x in block]
    numbers = fallback.numbers(torch.tensor([seed]), torch.tensor([position]), 13)
    assert torch.equal(numbers[0], oracle.words(seed, position, 13) >> 8)


@pytest.mark.parametrize("vocab", (1, 3, 31, 33, 1023, 1025, 4103))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option(backend, device, dtype, vocab):
    rows = few(20, 4)
    if vocab < 32:  # too few for options that cut between two of many
        logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
        edits = allowed = None
        ones, zeros = torch.ones(rows), torch.zeros(rows)
        options = {"temperature": ones * 0.7, "top_k": zeros.int() + 2, "top_p": ones, "min_p": zeros}
        options |= {"seeds": torch.arange(rows), "positions": torch.arange(rows)}
    else:
        logits, options, edits, allowed = problem(rows, vocab, DTYPES[dtype])
    out = run(logits, backend, device, **given(options, edits, allowed))
    hold(out, logits, options, edits, allowed)
    hold_raw(out, logits, backend, device)
    if backend != "reference":
        assert bool((out.logp <= 0).all()) and bool(((out.kept > 0) & (out.kept <= 1)).all())


@pytest.mark.backends("torch", "cpu")
def test_a_real_vocabulary(backend, device):
    for vocab in (50257, 151669):
        logits, options, edits, allowed = problem(8, vocab)
        hold(run(logits, backend, device, **given(options, edits, allowed)), logits, options, edits, allowed)


@pytest.mark.parametrize("isa", backends.isas())
@pytest.mark.backends("cpu")
def test_on_every_isa(backend, device, isa):
    logits, options, edits, allowed = problem(40, 4103)
    with backends.use_isa(isa):
        out = run(logits, backend, device, **given(options, edits, allowed))
        hold(out, logits, options, edits, allowed)
        hold_raw(out, logits, backend, device)


@pytest.mark.parametrize("scale", (0.0, 0.5, 2.0, 8.0))
@pytest.mark.backends(*KERNELS)
def test_tokens_are_the_oracles(backend, device, scale):
    """Flat and peaked rows, nothing cut: every word of the noise counts in a flat row."""
    rows = few(200, 8)
    logits = torch.randn(rows, 3000, generator=torch.Generator().manual_seed(3)) * scale
    ones, zeros = torch.ones(rows), torch.zeros(rows)
    options = {"temperature": ones, "top_k": zeros.int(), "top_p": ones, "min_p": zeros}
    options |= {"seeds": torch.arange(rows) * 7919 - 50, "positions": torch.arange(rows) * 2**33 - 9}
    out = run(logits, backend, device, **options)
    hold(out, logits, options)
    assert_same_bits("kept", out.kept, ones)
    assert bool((out.logp == out.logp_raw).all())


@pytest.mark.backends("cpu", "triton", "torch")
def test_long_ids_and_far_positions(backend, device):
    """Words of the last leaf of a large vocabulary, under seeds and positions of 64 bits: two ids to choose from."""
    rows, vocab = few(40, 12), few(151669, 9001)
    ids = torch.stack((torch.arange(rows) * 97 + vocab - 4000, torch.full((rows,), vocab - 1)), 1)
    logits = torch.full((rows, vocab), -torch.inf).scatter(1, ids, 0.0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(2))
    out = run(logits, backend, device, seeds=seeds, positions=seeds.flip(0))
    wanted = []
    for i in range(rows):
        noise = oracle.gumbel(int(seeds[i]), int(seeds.flip(0)[i]), vocab)
        wanted.append(int(ids[i, noise[ids[i]].argmax()]))
    assert out.tokens.tolist() == wanted
    assert 0 < sum(token == vocab - 1 for token in wanted) < rows


def sampled(rows: list[dict], positions: list[int], vocab: int, backend, device) -> list[int]:
    """The tokens of rows of a few logits each, −inf elsewhere, under the seed 5."""
    logits = torch.full((len(rows), vocab), -torch.inf)
    for i, row in enumerate(rows):
        logits[i, list(row)] = torch.tensor(list(row.values()))
    return run(logits, backend, device, seeds=5, positions=torch.tensor(positions)).tokens.tolist()


@pytest.mark.backends(*KERNELS)
def test_the_rarest_words(backend, device):
    """Where 1 − u is a few 2⁻²⁴ and u is no float32: against another id that is a hundredth behind, and one ahead."""
    vocab, count = 1 << 16, few(250, 60)
    numbers = fallback.numbers(torch.full((count,), 5), torch.arange(count), vocab)
    hits = (numbers >= 2**24 - 16).nonzero().tolist()
    assert len(hits) > few(5, 1)
    rows, positions, wanted = [], [], []
    for position, v in hits:
        other = v ^ 2048
        lead = oracle.gumbel(5, position, vocab)[[v, other]]
        for ahead in (-0.01, 0.01):
            rows.append({v: 0.0, other: float(lead[0] - lead[1]) + ahead})
            positions.append(position)
            wanted.append(v if ahead < 0 else other)
    assert sampled(rows, positions, vocab, backend, device) == wanted


@pytest.mark.backends(*KERNELS)
def test_of_equal_ones_the_first_leads(backend, device):
    """Two ids of one number, the second in the leaf whose third id has the largest logit, and so runs first."""
    vocab, rows, positions, wanted = 9000, [], [], []
    for position in range(60):
        numbers = fallback.numbers(torch.tensor([5]), torch.tensor([position]), vocab)[0]
        order = numbers.argsort(stable=True)
        same = (numbers[order][1:] == numbers[order][:-1]).nonzero().flatten().tolist()
        for first, second in ((int(order[i]), int(order[i + 1])) for i in same):
            third = second ^ 1
            if first // 4096 < second // 4096 and numbers[third] < 0.8 * numbers[first]:
                rows.append({first: 0.0, second: 0.0, third: 0.05})
                positions.append(position)
                wanted.append(first)
    assert len(rows) > 3
    some = slice(few(len(rows), 4))
    assert sampled(rows[some], positions[some], vocab, backend, device) == wanted[some]


# The distribution sampled from, and the options that lead to it from softmax(ROW).
ROW = torch.tensor([1.3, 0.4, -0.2, 2.0, 0.1, -1.5, 0.9, 0.0, -3.0, 1.1, 0.3, -0.7])


def tempered(t: float):
    return torch.softmax(ROW.double() / t, 0)


def only(p, ids):
    q = torch.zeros_like(p)
    q[ids] = p[ids]
    return q / q.sum()


def largest(p, n: int):
    return only(p, p.argsort(descending=True)[:n])


def penalised():
    """Repetition 1.3 of ids 3, 0, 5; presence 0.4 and frequency 0.25 of ids 0 (twice) and 5 (once)."""
    x = ROW.double().clone()
    for i in (3, 0, 5):
        x[i] = x[i] / 1.3 if x[i] > 0 else x[i] * 1.3
    x[0] -= 0.4 + 2 * 0.25
    x[5] -= 0.4 + 0.25
    return torch.softmax(x, 0)


DISTRIBUTIONS = {
    "plain": ({}, tempered(1.0)),
    "temperature 0.7": ({"temperature": 0.7}, tempered(0.7)),
    "temperature 1.3": ({"temperature": 1.3}, tempered(1.3)),
    "top-k": ({"top_k": 5}, largest(tempered(1.0), 5)),
    "top-p": ({"top_p": nucleus(tempered(1.0), 7)}, largest(tempered(1.0), 7)),
    "min-p": ({"min_p": floor(tempered(0.7), 6), "temperature": 0.7}, largest(tempered(0.7), 6)),
    "all": (
        {"top_k": 8, "top_p": nucleus(largest(tempered(1.3), 8), 5), "min_p": 0.05, "temperature": 1.3},
        largest(tempered(1.3), 5),
    ),
    "allowed": ({"allowed": torch.arange(12) % 3 != 0}, only(tempered(1.0), torch.arange(12) % 3 != 0)),
    "penalties": ("penalties", penalised()),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distribution(backend, device, name):
    """χ² of the tokens of many positions."""
    options, wanted = DISTRIBUTIONS[name]
    n = 3000 if backend == "reference" else few(20_000, 80)
    logits = ROW.expand(n, -1)
    if options == "penalties":
        index = torch.arange(n + 1)
        options = {
            "edits": rlfast.penalty_edits(
                logits, torch.tensor([3, 0]).repeat(n), index * 2, torch.tensor([0, 5, 0]).repeat(n), index * 3,
                repetition=1.3, presence=0.4, frequency=0.25,
            )
        }  # fmt: skip
    if "allowed" in options:
        options = {"allowed": options["allowed"].expand(n, -1)}
    tokens = run(logits, backend, device, seeds=11, positions=torch.arange(n), **options).tokens
    assert chi_squared(tokens, wanted) > P_VALUE


@pytest.mark.backends("torch", "cpu")
def test_a_wrong_distribution_is_noticed(backend, device):
    """The test has the power to tell a temperature of 1 from 1.1, and seeds give different tokens."""
    logits = ROW.expand(20_000, -1)
    first = run(logits, backend, device, seeds=11, positions=torch.arange(20_000)).tokens
    assert chi_squared(first, tempered(1.1)) < P_VALUE < chi_squared(first, tempered(1.0))
    second = run(logits, backend, device, seeds=12, positions=torch.arange(20_000)).tokens
    chance = float((tempered(1.0) ** 2).sum())
    assert abs(float((first == second).double().mean()) - chance) < 0.02


def check_support(row, wanted: list[int], backend, device, **options):
    """What is sampled of a row are these ids, each of them if there are draws enough; and they are what is kept."""
    n = few(400, 3)
    out = run(row.expand(n, -1), backend, device, seeds=5, positions=torch.arange(n), **options)
    found = sorted(set(out.tokens.tolist()))
    assert found == wanted or (n < 400 and set(found) <= set(wanted)), f"{options}: {found}"
    truth, own = (torch.softmax(row.to(dtype), 0)[wanted].sum().expand(n) for dtype in (torch.float64, torch.float32))
    assert_value(f"{options}: kept", out.kept, truth, own)


def test_ties_at_a_threshold_stay(backend, device):
    quarters = torch.zeros(5).index_fill(0, torch.tensor([2]), -torch.inf)
    for option in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0}):
        check_support(quarters, [0, 1, 3, 4], backend, device, **option)
    steps = torch.tensor([0.5, 0.125, 0.125, 0.25]).log()
    for option in ({"top_k": 3}, {"top_p": 0.8}):
        check_support(steps, [0, 1, 2, 3], backend, device, **option)
    for option in ({"top_k": 2}, {"top_p": 0.6}):
        check_support(steps, [0, 3], backend, device, **option)
    check_support(torch.tensor([0.0, -0.0, -1.0]), [0, 1], backend, device, top_k=1)  # zeros of either sign


def test_the_most_probable_always_stays(backend, device):
    for option in ({"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-7}, {"min_p": 1.0}):
        check_support(ROW, [3], backend, device, **option)


def test_off_is_off(backend, device):
    n = few(60, 8)
    call = {"seeds": torch.arange(n), "positions": 3}
    logits = torch.randn(n, 700, generator=torch.Generator().manual_seed(8))
    plain = run(logits, backend, device, **call)
    for option in ({"top_k": 700}, {"top_k": 2**31 - 1}, {"top_p": 1.0}, {"min_p": 0.0}, {"temperature": 1.0},
                   {"allowed": torch.ones(n, 700, dtype=torch.bool)}, {"edits": ragged([[]] * n)}):  # fmt: skip
        for name, a, b in zip(plain._fields, run(logits, backend, device, **call, **option), plain, strict=True):
            if name in ("tokens", "logp_raw", "entropy") or backend != "triton":
                assert_same_bits(f"{name} {list(option)}", a, b)


def test_greedy_takes_the_first_of_the_largest(backend, device):
    logits = torch.zeros(4, 3000)
    logits[:, [40, 2900, 1100]] = 2.0
    allowed = torch.ones(4, 3000, dtype=torch.bool)
    allowed[1, 40] = False
    edits = ragged([[], [], [(40, 0.0), (1100, -torch.inf)], [(2999, 2.5)]])
    out = run(logits, backend, device, temperature=0, top_k=3, top_p=0.1, seeds=1, positions=2, allowed=allowed,
              edits=edits)  # fmt: skip
    assert out.tokens.tolist() == [40, 1100, 2900, 2999]
    assert out.logp.tolist() == [0.0] * 4
    w = logits.clone()
    w[1, 40], w[2, 40], w[2, 1100], w[3, 2999] = -torch.inf, 0.0, -torch.inf, 2.5
    truth, own = (
        torch.softmax(w.to(dtype), -1).gather(1, out.tokens.unsqueeze(1)) for dtype in (torch.float64, torch.float32)
    )
    assert_value("kept", out.kept, truth.squeeze(1), own.squeeze(1))
    hold_raw(out, logits, backend, device)


def test_rows_without_a_token(backend, device):
    """NaN, +inf, nothing finite, nothing allowed: −1 and NaN, and the neighbours as if they were alone."""
    logits = torch.randn(8, 1100, generator=torch.Generator().manual_seed(4))
    logits[1, 1050], logits[2, 3], logits[3] = torch.nan, torch.inf, -torch.inf
    allowed = torch.ones(8, 1100, dtype=torch.bool)
    allowed[4] = False
    away = [(1050, 0.0)], [(3, 0.0)]  # an edit takes a NaN away, and an infinity, but not out of the raw distribution
    edits = ragged([[], *away, [], [], [(1099, float("nan"))], [(7, float("inf"))], [(7, -torch.inf)]])
    call = {"seeds": torch.arange(8), "positions": 9, "top_k": 50, "top_p": 0.9, "temperature": 0.8}
    out = run(logits, backend, device, **call, allowed=allowed, edits=edits)
    lost = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0]).bool()
    assert torch.equal(out.tokens < 0, lost)
    for x in out[1:]:
        assert torch.equal(x.isnan(), lost)
    alone = run(logits[:1], backend, device, **call | {"seeds": 0})
    assert_same_bits("tokens", out.tokens[:1], alone.tokens)
    greedy = run(logits, backend, device, temperature=0, seeds=0, positions=0, allowed=allowed, edits=edits)
    assert torch.equal(greedy.tokens < 0, lost)


def test_logits_far_from_zero(backend, device):
    """A common offset of 1e6, z ≈ −1e4, half the row and a whole leading block at −inf: the same tokens."""
    rows = few(60, 6)
    base = torch.round(torch.randn(rows, 5000, generator=torch.Generator().manual_seed(6)) * 16) / 8
    call = {"seeds": torch.arange(rows), "positions": 1, "temperature": 0.5, "top_k": 900}
    wanted = run(base, backend, device, **call)
    for logits in (base + 1e6, base - 1e4):
        out = run(logits, backend, device, **call)
        assert torch.equal(out.tokens, wanted.tokens)
        for name in ("logp", "kept", "entropy", "logp_raw"):
            assert_value(name, getattr(out, name), getattr(wanted, name).double(), getattr(wanted, name))
    holes = base.clone()
    holes[:, :4200], holes[:, 4201::2] = -torch.inf, -torch.inf
    options = {"temperature": torch.full((rows,), 1.5), "top_k": torch.zeros(rows).int(), "top_p": torch.ones(rows)}
    options |= {"min_p": torch.zeros(rows), "seeds": torch.arange(rows), "positions": torch.arange(rows)}
    hold(run(holes, backend, device, **options), holes, options)


def test_edits_and_masks(backend, device):
    """Of equal ids the last counts, and the mask comes after; ids at the ends of leaves."""
    rows, vocab = few(40, 6), 4100
    draw = torch.Generator().manual_seed(12)
    logits = torch.randn(rows, vocab, generator=draw)
    edits = []
    for i in range(rows):
        ids = [*torch.randint(vocab, (30,), generator=draw).tolist(), 1023, 1024, 4095, 4096, vocab - 1, i]
        edits.append([(j, float(v)) for j, v in zip(ids, torch.randn(36, generator=draw) * 3, strict=True)])
        edits[-1] += [(ids[0], 9.0), (ids[1], 9.5), (ids[0], -2.0)]
    allowed = torch.rand(rows, vocab, generator=draw) < 0.7
    options = {"temperature": torch.ones(rows), "top_k": torch.full((rows,), 40).int(), "top_p": torch.ones(rows)}
    options |= {"min_p": torch.zeros(rows), "seeds": torch.arange(rows), "positions": torch.arange(rows)}
    out = run(logits, backend, device, **given(options, edits, allowed))
    hold(out, logits, options, edits, allowed)
    assert bool(allowed.gather(1, out.tokens.unsqueeze(1)).all())
    words = torch.zeros(rows, -(-vocab // 32), dtype=torch.int32)
    for v in range(vocab):
        words[:, v // 32] |= torch.where(allowed[:, v], torch.tensor(1 << v % 32).int(), 0)
    packed = run(logits, backend, device, **given(options, edits, words))
    for name, a, b in zip(out._fields, packed, out, strict=True):
        assert_same_bits(name, a, b)


@pytest.mark.backends(*KERNELS)
def test_nothing_depends_on_the_batch(backend, device):
    """A row alone, among others, in another order, of any stride: the same token and the same bits."""
    rows = few(24, 6)
    logits, options, edits, allowed = problem(rows, 2500)
    whole = run(logits, backend, device, **given(options, edits, allowed))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    turned = {k: x[order] for k, x in options.items()}
    mixed = run(logits[order], backend, device, **given(turned, [edits[i] for i in order], allowed[order]))
    for name, a, b in zip(whole._fields, mixed, whole, strict=True):
        assert_same_bits(name, a, b[order])
    for i in (0, rows - 1):
        one = {k: x[i : i + 1] for k, x in options.items()}
        alone = run(logits[i : i + 1], backend, device, **given(one, edits[i : i + 1], allowed[i : i + 1]))
        for name, a, b in zip(whole._fields, alone, whole, strict=True):
            assert_same_bits(name, a, b[i : i + 1])
    wide = torch.full((rows, 2600), torch.nan)
    wide[:, 64:2564] = logits
    strided = run(wide[:, 64:2564], backend, device, **given(options, edits, allowed))
    for name, a, b in zip(whole._fields, strided, whole, strict=True):
        assert_same_bits(name, a, b)


@pytest.mark.backends("cpu")
def test_threads_do_not_change_bits(backend, device, threads):
    """Rows shared out, or the leaves of few rows."""
    logits, options, edits, allowed = problem(5, 50257)
    for rows in (1, 2, 5):
        found = []
        for n in (1, 2, 3, 7):
            threads(n)
            some = {k: x[:rows] for k, x in options.items()}
            found.append(run(logits[:rows], backend, device, **given(some, edits[:rows], allowed[:rows])))
        for other in found[1:]:
            for name, a, b in zip(other._fields, other, found[0], strict=True):
                assert_same_bits(name, a, b)


@pytest.mark.backends("torch", "reference")
def test_float64(backend, device):
    logits, options, edits, allowed = problem(20, 300, torch.float64)
    out = run(logits, backend, device, **given(options, edits, allowed))
    assert all(x.dtype == torch.float64 for x in out[1:])
    wanted = oracle.sample(logits, **options, edits=edits, allowed=allowed, dtype=torch.float64)
    assert torch.equal(out.tokens, wanted[0])
    for name, a, b in zip(out._fields, out, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=name)


def test_no_rows(backend, device):
    out = run(torch.empty(0, 9), backend, device, seeds=torch.empty(0).long(), positions=1)
    assert [x.shape for x in out] == [(0,)] * 5


def test_logits_that_need_a_gradient(backend, device):
    logits = torch.randn(3, 40, requires_grad=True)
    with rlfast.use_backend(backend):
        out = rlfast.sample(logits.to(device), seeds=1, positions=2)
    assert not any(x.requires_grad for x in out)


def sample_arguments(rows: int = 4, vocab: int = 70) -> tuple:
    """Arguments of the op."""
    logits, options, edits, _ = problem(rows, vocab)
    ends, ids, values = ragged(edits)
    bits = torch.full((rows, -(-vocab // 32)), -1, dtype=torch.int32)
    options = (*list(options.values())[:4], options["seeds"], options["positions"])
    return (logits, *options, ends.int(), ids.int(), values, bits)


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu", "reference")
def test_opcheck(backend, device):
    args = sample_arguments()
    for given_args in (args, (*args[:7], None, None, None, None)):
        torch.library.opcheck(sample_op.op, (*given_args, backend))


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
def test_compiled_without_a_graph_break(backend, device):
    logits, options, edits, allowed = problem(4, 70)
    torch._dynamo.reset()
    function = torch.compile(rlfast.sample, fullgraph=True, backend="aot_eager")
    for call in (given(options, edits, allowed), {"seeds": 3, "positions": 1, "temperature": 0.8, "top_p": 0.9}):
        with rlfast.use_backend(backend):
            compiled, eager = function(logits, **call), rlfast.sample(logits, **call)
        for name, a, b in zip(eager._fields, compiled, eager, strict=True):
            assert_same_bits(name, a, b)


def test_an_id_that_is_none_loses_its_row(backend, device):
    """What compiled code or a GPU does not look at; nothing outside of the row is read or written."""
    args = list(sample_arguments(3, 70))
    args[7:10] = torch.tensor([0, 1, 2, 2]).int(), torch.tensor([70, 69]).int(), torch.tensor([1.0, 2.0])
    tokens = sample_op.op(*(x.to(device) for x in args), backend)[0]
    assert tokens[0] == -1 and bool((tokens[1:] >= 0).all())


GOOD = {"seeds": 1, "positions": 2}
BAD = {
    "logits": ({"logits": torch.zeros(3)}, ValueError, "logits: expected shape [M, V]"),
    "logits-dtype": ({"logits": torch.zeros(3, 4).long()}, TypeError, "logits: expected dtype"),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature: expected 0 or a float"),
    "temperature-nan": ({"temperature": torch.tensor([1.0, torch.nan, 1.0])}, ValueError, "temperature: expected 0 or"),
    "temperature-shape": ({"temperature": torch.ones(2)}, ValueError, "temperature: expected shape (3,)"),
    "temperature-bool": ({"temperature": False}, TypeError, "temperature: expected a float"),
    "top_k": ({"top_k": -1}, ValueError, "top_k: expected an int from 0"),
    "top_k-float": ({"top_k": 3.0}, TypeError, "top_k: expected an int"),
    "top_k-tensor": ({"top_k": torch.ones(3)}, TypeError, "top_k: expected dtype"),
    "top_k-row": ({"top_k": torch.tensor([1, -2, 3])}, ValueError, "top_k: expected ints from 0 to 2147483647, got -2"),
    "top_p": ({"top_p": 1.01}, ValueError, "top_p: expected a float from 0 to 1"),
    "top_p-row": ({"top_p": torch.tensor([0.5, 2.0, 0.5])}, ValueError, "top_p: expected floats from 0 to 1, got 2.0"),
    "min_p": ({"min_p": float("nan")}, ValueError, "min_p: expected a float from 0 to 1"),
    "seeds": ({"seeds": 0.5}, TypeError, "seeds: expected an int"),
    "seeds-range": ({"seeds": 2**63}, ValueError, "seeds: expected an int from -2**63"),
    "positions": ({"positions": torch.zeros(4).long()}, ValueError, "positions: expected shape (3,)"),
    "edits": ({"edits": [1]}, TypeError, "edits: expected rlfast.Edits"),
    "edits-ends": ({"edits": ragged([[]] * 2)}, ValueError, "edits ends: expected shape (4,)"),
    "edits-order": (
        {"edits": (torch.tensor([0, 2, 1, 2]), torch.zeros(2).long(), torch.zeros(2))},
        ValueError,
        "edits ends: expected numbers that ascend from 0 to 2",
    ),
    "edits-id": ({"edits": ragged([[(5, 1.0)], [], []])}, ValueError, "edits ids: expected values in [0, 5), got 5"),
    "edits-values": (
        {"edits": (torch.zeros(4).long(), torch.zeros(2).long(), torch.zeros(1))},
        ValueError,
        "edits values: expected shape (2,)",
    ),
    "allowed": ({"allowed": torch.ones(3, 4).bool()}, ValueError, "allowed: expected bool of shape (3, 5), or int32"),
    "allowed-dtype": ({"allowed": torch.ones(3, 1)}, TypeError, "allowed: expected dtype bool or int32"),
    "allowed-bits": (
        {"allowed": torch.ones(3, 2).int()},
        ValueError,
        "allowed: expected bool of shape (3, 5), or int32",
    ),
    "device": ({"top_p": torch.ones(3, device="meta")}, ValueError, "top_p: expected device cpu"),
}


@pytest.mark.parametrize("change, kind, words", BAD.values(), ids=BAD)
def test_bad_arguments_are_named(change, kind, words):
    with pytest.raises(kind) as caught:
        rlfast.sample(**{"logits": torch.zeros(3, 5), **GOOD} | change)
    assert words in str(caught.value), str(caught.value)


def penalties_by_hand(x, prompt, output, r, p, f, bias):
    """A row's logits, penalised id by id."""
    x = x.double().clone()
    for i, value in bias:
        x[i] += value
    for i in set(prompt) | set(output):
        x[i] = x[i] / r if x[i] > 0 else x[i] * r
    for i in set(output):
        x[i] -= f * output.count(i) + p
    return x


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalties(dtype):
    """Against id by id, over uneven lists, empty ones among them; a bias given twice counts twice."""
    rows, vocab, draw = 7, 50, torch.Generator().manual_seed(3)
    logits = (torch.randn(rows, vocab, generator=draw) * 3).to(DTYPES[dtype])

    def lists(longest):
        return [torch.randint(vocab, (int(n),), generator=draw).tolist() for n in torch.randint(longest, (rows,))]

    def flat(found):
        return torch.tensor([i for row in found for i in row], dtype=torch.int64), torch.tensor(
            [0, *map(len, found)]
        ).cumsum(0)

    torch.manual_seed(0)
    prompt, output = lists(20), lists(30)
    output[2] = []
    bias = [[(i, 1.5), (3, -torch.inf), (i, 0.25)] for i in range(rows)]
    r, p, f = torch.linspace(0.8, 1.6, rows), torch.linspace(-0.5, 1.0, rows), torch.linspace(0.0, 0.6, rows)
    edits = rlfast.penalty_edits(
        logits, *flat(prompt), *flat(output), repetition=r, presence=p, frequency=f, bias=ragged(bias)
    )
    for i in range(rows):
        wanted = penalties_by_hand(
            logits[i], prompt[i], output[i], r[i].double(), p[i].double(), f[i].double(), bias[i]
        )
        got = logits[i].double().clone()
        own = slice(int(edits.ends[i]), int(edits.ends[i + 1]))
        got[edits.ids[own].long()] = edits.values[own].double()
        assert_value(f"row {i}", got.float(), wanted, wanted.float())
    nothing = rlfast.penalty_edits(logits)
    assert nothing.ends.tolist() == [0] * (rows + 1) and not len(nothing.ids)


def test_penalties_are_those_of_transformers():
    processors = pytest.importorskip("transformers").generation.logits_process
    logits, ids = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)), torch.randint(40, (3, 9))
    wanted = processors.SequenceBiasLogitsProcessor([[[7], 2.0], [[int(ids[0, 0])], -3.0]])(ids, logits)
    wanted = processors.RepetitionPenaltyLogitsProcessor(1.4)(ids, wanted)
    bias = ragged([[(7, 2.0), (int(ids[0, 0]), -3.0)]] * 3)
    edits = rlfast.penalty_edits(
        logits, ids[:, :4].flatten(), torch.arange(4) * 4, ids[:, 4:].flatten(), torch.arange(4) * 5, repetition=1.4,
        bias=bias,
    )  # fmt: skip
    row = torch.arange(3).repeat_interleave(edits.ends.diff())
    assert_same_bits("penalised", logits.index_put((row, edits.ids.long()), edits.values), wanted)


def test_bad_penalties_are_named():
    logits, ids, ends = torch.zeros(2, 5), torch.tensor([1, 4]), torch.tensor([0, 1, 2])
    for change, words in (
        ({"repetition": 0.0}, "repetition: expected a float from"),
        ({"presence": float("inf")}, "presence: expected a finite float"),
        ({"output_ids": ids}, "output_ends: expected a tensor, since output_ids is given, got None"),
        ({"prompt_ends": ends}, "prompt_ids: expected a tensor, since prompt_ends is given, got None"),
        ({"output_ids": ids + 1, "output_ends": ends}, "output ids: expected values in [0, 5), got 5"),
        ({"output_ids": ids, "output_ends": ends[:2]}, "output ends: expected shape (3,)"),
    ):
        with pytest.raises(ValueError) as caught:
            rlfast.penalty_edits(logits, **change)
        assert words in str(caught.value), str(caught.value)


@pytest.mark.backends("torch", "cpu")
def test_the_mass_of_many(backend, device):
    """A nucleus of tens of thousands, and top-k beyond every shortcut."""
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 50257, generator=draw)
    for k, n in ((0, 20_000), (1500, 400), (30_000, 9000)):
        wide, single = (torch.softmax(logits.to(dtype), -1) for dtype in (torch.float64, torch.float32))
        top_p = torch.tensor([nucleus(largest(row, k) if k else row, n) for row in wide])
        out = run(logits, backend, device, top_k=k, top_p=top_p, seeds=torch.arange(4), positions=1)
        truth, own = (q.sort(descending=True).values[:, :n].sum(-1) for q in (wide, single))
        assert_value(f"kept {k} {n}", out.kept, truth, own)


@pytest.mark.backends("cpu")
def test_cut_at_every_rank(backend, device):
    """top_k = 1 … V of a row of distinct numbers of both signs keeps that many, on every instruction set."""
    vocab = 1100
    x = torch.randn(vocab, generator=torch.Generator().manual_seed(7)) * 3
    k = torch.arange(1, vocab + 1)
    q = torch.softmax(x.double(), 0).sort(descending=True).values.cumsum(0)
    own = torch.softmax(x, 0).sort(descending=True).values.cumsum(0)
    for isa in backends.isas():
        with backends.use_isa(isa):
            out = run(x.expand(vocab, -1), backend, device, top_k=k, seeds=1, positions=k)
        assert_value(isa, out.kept, q, own)


def head_of(rows: int, vocab: int, dtype, seed: int = 0):
    """(hidden, weight, bias) whose logits are those of a trained model in size."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (rows, 24), (vocab, 24), (vocab,)
    return tuple(torch.randn(*shape, generator=draw).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", ({}, {"softcap": 3.0}, {"softcap": 5.0, "logit_scale": 0.7}), ids=str)
@pytest.mark.backends("torch", "cpu")  # those that have ``linear``
def test_from_hidden_states(backend, device, dtype, transform):
    """The bits of the two calls, in several tiles of rows, with every option by row."""
    rows, vocab = few(150, 70), 1030
    hidden, weight, bias = (x.to(device) for x in head_of(rows, vocab, DTYPES[dtype]))
    with rlfast.use_backend(backend):
        tiles = [rlfast.linear(part, weight, bias, wide=True) for part in hidden.split(sampling.ROWS)]
        logits = torch.cat(tiles) * transform.get("logit_scale", 1.0)
        cap = transform.get("softcap")
        logits = cap * torch.tanh(logits / cap) if cap else logits
        _, options, edits, allowed = problem(rows, vocab)
        more = {name: moved(x, device) for name, x in given(options, edits, allowed).items()}
        found = rlfast.linear_sample(hidden, weight, bias, **transform, **more)
        wanted = rlfast.sample(logits, **more)
        ends, *rest = (x.to(device) for x in ragged(edits))

        def made(z, rows_):
            assert torch.equal(z, logits[rows_])
            return ends[rows_.start : rows_.start + z.shape[0] + 1], *rest

        again = rlfast.linear_sample(hidden, weight, bias, **transform, **more | {"edits": made})
        none = rlfast.linear_sample(hidden, weight, bias, **transform, **more | {"edits": lambda z, _: None})
        plain = rlfast.sample(logits, **more | {"edits": None})
    for name in rlfast.Sampled._fields:
        for got, truth in ((found, wanted), (again, wanted), (none, plain)):
            assert_same_bits(name, getattr(got, name), getattr(truth, name))


@pytest.mark.backends("cpu")
def test_from_hidden_states_under_autocast(backend, device):
    """Cast as ``linear`` is; no row, no gradient."""
    hidden, weight, bias = head_of(5, 40, torch.float32)
    weight.requires_grad_()
    narrow = (x.detach().bfloat16() for x in (hidden, weight, bias))
    wanted = rlfast.linear_sample(*narrow, seeds=1, positions=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = rlfast.linear_sample(hidden, weight, bias, seeds=1, positions=2)
    for name in rlfast.Sampled._fields:
        assert_same_bits(name, getattr(found, name), getattr(wanted, name))
    assert not found.logp.requires_grad
    assert rlfast.linear_sample(hidden[:0], weight, seeds=1, positions=2).tokens.shape == (0,)


def test_a_bad_head_is_named():
    hidden, weight = torch.zeros(3, 8), torch.zeros(20, 8)
    fine = {"hidden": hidden, "weight": weight, "seeds": 1, "positions": 1}
    for change, kind, words in (
        ({"hidden": torch.zeros(2, 3, 8)}, ValueError, "hidden: expected shape [M, D], got (2, 3, 8)"),
        ({"hidden": [1.0]}, TypeError, "hidden: expected"),
        ({"weight": torch.zeros(20, 7)}, ValueError, "weight: expected shape (V, 8) to match hidden"),
        ({"weight": weight.double()}, TypeError, "weight: expected dtype torch.float32 like hidden"),
        ({"bias": torch.zeros(19)}, ValueError, "bias: expected shape (20,)"),
        ({"softcap": 0.0}, ValueError, "softcap: expected"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale: expected"),
        ({"seeds": torch.zeros(4, dtype=torch.int64)}, ValueError, "seeds: expected shape (3,)"),
        ({"top_p": 1.5}, ValueError, "top_p: expected"),
        ({"edits": 3}, TypeError, "edits: expected rlfast.Edits"),
        ({"edits": lambda z, rows: 3}, TypeError, "edits: expected rlfast.Edits"),
        ({"allowed": torch.ones(3, 19, dtype=torch.bool)}, ValueError, "allowed: expected bool of shape (3, 20)"),
    ):
        with pytest.raises(kind) as caught:
            rlfast.linear_sample(**fine | change)
        assert words in str(caught.value), str(caught.value)
