"""Triton kernels without a GPU: they compile for one, do not compile anew for every shape, and miss no kernel.

Launches are compiled and not made; ``make compile`` does the same for every variant and every architecture.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlfast import backends
from rlfast.ops.records import ENTROPY, Transform, Wanted

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.unpoisoned,  # nothing runs: every output is garbage
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]


@pytest.fixture(scope="module")
def tool():
    assert not backends.interpreting(), "the interpreter compiles nothing: run without TRITON_INTERPRET=1"
    pytest.importorskip("triton")
    from tools import compile_kernels

    return compile_kernels


def _variants(launched) -> dict:
    """How often each kernel was compiled."""
    count = {}
    for _, kernel in {kernel.hash: (function, kernel) for function, kernel in launched}.values():
        count[kernel.metadata.name] = count.get(kernel.metadata.name, 0) + 1
    return count


def _forward_and_backward(rows, vocab: int = 1008, temperature: float = 0.7):
    from rlfast.kernels import token_logps

    transform = Transform(temperature, 0.0, 1.0)
    logits = torch.zeros(*rows, vocab, dtype=torch.bfloat16)
    targets, row = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    out = token_logps.forward(logits, targets, None, transform, Wanted(ENTROPY, 0))
    token_logps.backward(logits, targets, None, transform, out.aux, (row, None, None), logits)


def test_no_kernel_spills_and_none_is_missed(tool):
    done, reached = [], set()
    for only in (
        "bfloat16 scaled wide all outputs",
        "bfloat16 gae all outputs",
        "bfloat16 gae whitened",
        "bfloat16 baseline 0",
        "bfloat16 ppo_clip k3 unit=1",
        "bfloat16 jsd wide all outputs",
        "bfloat16 forward_kl wide all outputs",
        "bfloat16 logistic log_ratio mean packed all fields",
        "bfloat16 kto packed all fields",
        "bfloat16 ranked plackett_luce K=8 packed all fields",
        "bfloat16 attention D=128 Dv=128 in parts pages of 16 all options",
        "bfloat16 attention D=128 Dv=128 pages of 16 shared prefix",
        "bfloat16 sampled wide all outputs",
    ):
        found = tool.compile_triton(90, only, lambda text: None)
        done, reached = done + found[0], reached | found[1]
    assert tool.grid_kernels() == reached
    assert not [x for x in done if x.spill]
    assert all(0 < x.registers <= 255 for x in done)


def test_every_op_has_cases(tool):
    ops = {m.__name__.rpartition(".")[2] for m in tool.modules() if hasattr(m, "COMPILE")}
    assert ops == {op for op, names in backends.IMPLEMENTED.items() if "triton" in names}


def test_a_kernel_that_no_case_launches_is_noticed(tool, monkeypatch):
    for module in (m for m in tool.modules() if hasattr(m, "COMPILE")):
        monkeypatch.setattr(module, "COMPILE", ())
    assert tool.grid_kernels() - tool.compile_triton(90, "", lambda text: None)[1]


def test_row_12_no_recompilation_per_length_or_temperature(tool):
    with tool.compile_only(90) as launched:
        for length in range(1, 51):
            _forward_and_backward((1, length))
            _forward_and_backward((3, length), temperature=0.5 + length / 150)
    assert _variants(launched) == {"fold": 1, "merge": 1, "gradient": 1}


@pytest.mark.parametrize("keep", (False, True), ids=("recompute", "keep"))
def test_row_12_no_recompilation_of_the_head(tool, keep):
    from rlfast.kernels import linear_token_logps

    weight = torch.zeros(1008, 64, dtype=torch.bfloat16)
    with tool.compile_only(90) as launched:
        for length in range(1, 51):
            hidden = torch.zeros(length, 64, dtype=torch.bfloat16)
            targets, rows = torch.zeros(length, dtype=torch.int64), torch.zeros(length)
            transform = Transform(0.5 + length / 150, 0.0, 1.0)
            out, kept = linear_token_logps.forward(hidden, weight, None, targets, None, transform, Wanted(0, 0), keep)
            row, needs = (rows, None, None), (True, True, False)
            head, rest = (hidden, weight, None), (needs, kept, None, hidden.dtype)
            linear_token_logps.backward(*head, targets, None, transform, out.aux, row, *rest)
    assert set(_variants(launched).values()) == {1}


def test_row_12_no_recompilation_per_shape_or_rate_of_a_scan(tool):
    from rlfast.kernels import affine_scan
    from rlfast.ops.scan_records import ADVANTAGES, RETURNS, REVERSE, Inputs, Options

    nothing = Inputs(*[None] * len(Inputs._fields))
    with tool.compile_only(90) as launched:
        for steps in range(1, 51):
            x = nothing._replace(rewards=torch.zeros(3, steps), values=torch.zeros(3, steps))
            options = Options(steps / 51, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, ADVANTAGES | RETURNS | REVERSE, 0, 0.0)
            affine_scan.forward(x, options)
    assert _variants(launched) == {"scan_rows": 1} and len(launched) == 50


def test_few_long_rows_take_two_launches(tool):
    from rlfast.kernels import affine_scan

    for name, launches in (("float32 gae", 1), ("float32 gae few long rows", 2)):
        (case,) = (case for case in affine_scan.COMPILE if str(case) == name)
        with tool.compile_only(90) as launched:
            affine_scan.launch_to_compile(case)
        assert len(launched) == launches


def test_row_12_vocabularies_compile_twice_for_wide_and_narrow_loads(tool):
    with tool.compile_only(90) as launched:
        for vocab in (1000, 1008, 1009, 4097, 8192, 9000):
            _forward_and_backward((2, 2), vocab)
    assert _variants(launched) == {"fold": 2, "merge": 1, "gradient": 2}


def test_row_12_a_loss_compiles_once_for_every_length_epsilon_and_beta(tool):
    from rlfast.kernels import token_loss
    from rlfast.ops.loss_records import Settings

    with tool.compile_only(90) as launched:
        for length in range(1, 51):
            case = token_loss.CompileCase("ppo_clip", "k3", token_loss.BY_SEQUENCE, torch.float32, False)
            tokens = torch.zeros(1 + length % 5, length * 37)
            fields = token_loss.Fields(*(tokens,) * 5, *(None,) * 8)
            settings = Settings(beta=length / 100, off_policy=0.5, max_len=float(length))
            hyper = [0.1 + length / 200, 0.2 + length / 300, 3.0, 4.0]
            bounds = [float("inf"), 10.0 + length]
            token_loss.forward(
                fields, case.surrogate, case.estimator, case.plan, settings, hyper, bounds, (True, False)
            )
    assert _variants(launched) == {"token_loss": 1}
    assert len(launched) == 50, "one launch a call"


def _responses(rows: int):
    """A padded side of some responses, and an op's arguments beside it."""
    from rlfast.ops.preference_records import Rest, Side

    tokens = torch.zeros(rows, 37 * rows + 1)
    return Side(tokens, tokens, tokens == 0, None, None), Rest(*(torch.zeros(rows),) * 4, torch.ones(()))


def _numbers(n: int, width: int) -> tuple[float, ...]:
    """Hyper-parameters that a call has not had."""
    return tuple((n + k) / 60 for k in range(width))


def test_row_12_a_pair_loss_compiles_once_for_every_length_beta_and_batch(tool):
    from rlfast.kernels import pair_loss
    from rlfast.ops.preference_records import METRICS, Settings, Term, allocate

    with tool.compile_only(90) as launched:
        for n in range(1, 51):
            side, rest = _responses(n)
            out = allocate(side.logp, side.logp, n, len(METRICS), (True, True, False))
            terms = [Term("log_ratio", False, "", 0.1 * n, (0.0,), ())]
            terms += [Term("power", True, "logistic", n / 7, (n / 51,), _numbers(n, 4))]
            pair_loss.forward(side, side, rest, terms, Settings(n / 50, n / 3), 0, out)
    assert _variants(launched) == {"pair_loss": 2} and len(launched) == 50  # with a tail, and without


def test_row_12_a_loss_of_single_responses_compiles_once(tool):
    from rlfast.kernels import unpaired_loss
    from rlfast.ops.preference_records import SINGLE_METRICS, Settings, Term, allocate

    with tool.compile_only(90) as launched:
        for n in range(1, 51):
            side, rest = _responses(n)
            out = allocate(side.logp, None, n, len(SINGLE_METRICS), (True, False, True), sides=1)
            terms = [Term("log_ratio", False, "", 0.1 * n, (0.0,), ())]
            terms += [Term("log_ratio", False, "kto", n / 7, (0.0,), _numbers(n, 3))]
            good = torch.ones(n, dtype=torch.bool)
            unpaired_loss.forward(side, good, rest._replace(margin=None), terms, Settings(1.0, n / 3), 0, out)
    assert _variants(launched) == {"unpaired_loss": 1} and len(launched) == 50


def test_row_12_a_ranked_loss_compiles_once_for_each_tile(tool):
    from rlfast.kernels import ranked_loss
    from rlfast.ops.ranked_records import Groups, Settings, allocate

    with tool.compile_only(90) as launched:
        for n in range(1, 51):
            size = 5 + n % 4  # a tile of 8
            x = torch.zeros(n, size)
            groups = Groups(x, x, x, torch.ones_like(x), x == 0, None, torch.ones(n), torch.ones(()))
            settings = Settings(n / 50, n / 7, float(n), n / 9, 1.0, n / 3)
            ranked_loss.forward(groups, "plackett_luce", settings, 0, size, allocate(groups, (True, True)))
    assert _variants(launched) == {"ranked_loss": 1} and len(launched) == 50


def test_row_12_no_recompilation_of_a_divergence(tool):
    """But what reads the teacher's rows of ``aux`` is there twice: they begin at a multiple of 16 bytes or do not."""
    from rlfast.kernels import divergence
    from rlfast.ops.divergence_records import FORWARD, Measure

    with tool.compile_only(90) as launched:
        for n in range(1, 51):
            logits, row = torch.zeros(n, 1008, dtype=torch.bfloat16), torch.zeros(n)
            transforms = Transform(0.5 + n / 150, 0.0, 1.0), Transform(1.5 - n / 150, 0.0, 1.0)
            measure = Measure(FORWARD, 0.5)
            out = divergence.forward(logits, logits, None, None, *transforms, measure, 0)
            saved, grads = divergence.views_of(out.aux, 0, 0, False), (row, None, None, None)
            divergence.backward(logits, logits, None, None, *transforms, measure, saved, grads, logits)
    assert _variants(launched) == {"fold_pair": 1, "merge": 2, "merge_gaps": 1, "pair_gradient": 2}


def test_launches_do_not_grow_with_the_batch(tool):
    for rows in ((1, 1), (3, 40)):
        with tool.compile_only(90) as launched:
            _forward_and_backward(rows)
        assert [function.__name__ for function, _ in launched] == ["fold", "merge", "gradient"]


def test_wide_rows_are_loaded_16_bytes_at_a_time(tool):
    with tool.compile_only(90) as launched:
        _forward_and_backward((2, 2), 4096)
    for function, kernel in launched:
        if function.__name__ != "merge":
            assert "ld.global.v4.b32" in kernel.asm["ptx"], function.__name__


def test_products_and_sums_are_not_fused(tool):
    with tool.compile_only(90) as launched:
        _forward_and_backward((2, 2))
    for _, kernel in launched:
        assert kernel.metadata.enable_fp_fusion is False


def test_formulas_without_triton():
    """What ``lang`` hands out when Triton cannot be imported, in a process of its own."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from rlfast.kernels import lang
from rlfast.kernels.formulas import logit
assert not lang.NATIVE and lang.tl is lang.TorchVocabulary
x = torch.tensor([-30.0, -1.0, 0.0, 2.0])
for f in (logit.softplus, lang.torch_version(logit.softplus)):
    torch.testing.assert_close(f(x), torch.nn.functional.softplus(x, threshold=1e9))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
