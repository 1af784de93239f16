"""Adapters of other attention libraries, driven by stand-ins with the libraries' own signatures."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from rlfast.rollout import Engine, SamplingParams, flash
from tests.attention_cases import Case, laid, solution
from tests.decoders import decoder, prompts
from tests.flash_stand_in import CALLS, LIBRARIES
from tests.numerics import assert_value

DECODE = Case((300, 1, 257), (1, 1, 1), heads=6, kv_heads=2, width=16, value_width=16, page_size=256, dtype="bf16")
CHUNK = replace(DECODE, new=(40, 1, 3))
OPTIONS = {
    "plain": {},
    "window": {"options": (("window", 37),)},
    "softcap": {"options": (("softcap", 5.0),), "size": 4.0},
}
WAYS = {
    ("flash-attn", 1): "flash_attn_with_kvcache",
    ("flash-attn", None): "flash_attn_varlen_func",
    ("flash-attn", 40): "flash_attn_varlen_func",
    ("flash-attn-4", 1): "flash-attn-4",
    ("flash-attn-4", None): "flash-attn-4",
    ("flashinfer", 1): "BatchDecodeWithPagedKVCacheWrapper",
    ("flashinfer", None): "BatchPrefillWithPagedKVCacheWrapper",
}


@pytest.fixture(autouse=True)
def calls():
    CALLS.clear()
    return CALLS


def call(attend, case: Case, arguments: dict, most_new=None):
    words = {"softcap": 0.0, "window": 0} | case.words
    return attend(*arguments.values(), words["scale"], words["softcap"], words["window"], most_new)


def hold(case: Case, got, arguments: dict) -> None:
    assert_value(str(case), got, *solution(case, arguments))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name, most_new", WAYS)
def test_values(name, most_new, options, calls):
    case = replace(CHUNK if most_new == 40 else DECODE, **OPTIONS[options])
    attend, x = flash.ADAPTERS[name](LIBRARIES[name]), laid(case)
    x["block_table"].clamp_(min=0)
    hold(case, call(attend, case, x, most_new), x)
    assert calls[-1] == WAYS[name, most_new]


@pytest.mark.parametrize("name", flash.NAMES)
def test_chunks(name):
    attend, x = flash.ADAPTERS[name](LIBRARIES[name]), laid(CHUNK)
    hold(CHUNK, call(attend, CHUNK, x, 40), x)


def test_one_new_token_for_some_is_no_decoding():
    """A sequence without one would be given another's."""
    case = replace(DECODE, lengths=(300, 1), new=(1, 0))
    x = laid(case)
    hold(case, call(flash.flash_attn(LIBRARIES["flash-attn"]), case, x, 1), x)


def test_sinks():
    case = replace(CHUNK, sinks=True)
    x = laid(case)
    x["sinks"] = x["sinks"].to(torch.bfloat16).float()
    hold(case, call(flash.flash_attn_4(LIBRARIES["flash-attn-4"]), case, x), x)
    for name in ("flash-attn", "flashinfer"):
        with pytest.raises(ValueError, match=f"sinks: expected None with {name}"):
            call(flash.ADAPTERS[name](LIBRARIES[name]), case, x)


def test_what_a_library_cannot_do_is_refused():
    first = flash.flash_attn(LIBRARIES["flash-attn"])
    for case, message in (
        (replace(CHUNK, page_size=16), "page_size: expected a multiple of 256 with flash-attn, got 16"),
        (replace(CHUNK, value_width=8), "v_cache: expected a width of 16 like q with flash-attn, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            call(first, case, laid(case))
    for name in flash.NAMES:
        case = replace(CHUNK, dtype="f32")
        with pytest.raises(TypeError, match=f"q: expected float16 or bfloat16 with {name}, got torch.float32"):
            call(flash.ADAPTERS[name](LIBRARIES[name]), case, laid(case))
    case = replace(DECODE, value_width=8)
    with pytest.raises(ValueError, match="v_cache: expected a width of 16 like q with flashinfer, got 8"):
        call(flash.Flashinfer(LIBRARIES["flashinfer"]), case, laid(case), 1)


def test_widths_that_differ():
    case = replace(CHUNK, value_width=8, page_size=16)
    x = laid(case)
    for name in ("flash-attn-4", "flashinfer"):
        hold(case, call(flash.ADAPTERS[name](LIBRARIES[name]), case, x), x)


def test_flashinfer_plans_once_for_the_layers_of_a_step(calls):
    attend, x = flash.Flashinfer(LIBRARIES["flashinfer"]), laid(DECODE)
    for _ in range(3):
        call(attend, DECODE, x, 1)
    assert calls.count("plan") == 1
    x["kv_lens"].sub_(0)  # written to: it may hold something else
    call(attend, DECODE, x, 1)
    call(attend, DECODE, x | {"block_table": x["block_table"].clone()}, 1)
    call(attend, replace(DECODE, options=(("window", 9),)), x, 1)
    assert calls.count("plan") == 4


def test_why_not_says_why(monkeypatch):
    for name in flash.NAMES:
        flash.why_not.cache_clear()
        monkeypatch.setattr(flash, "_there", lambda module: False)
        assert flash.why_not(name).startswith("not installed (pip install")
        with pytest.raises(RuntimeError, match=f"attention '{name}' is not available: not installed"):
            flash.attention(name)
        flash.why_not.cache_clear()
        monkeypatch.setattr(flash, "_there", lambda module: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for capability, reason in (((7, 0), f"needs sm_{flash.CAPABILITY[name]} or later"), ((10, 0), None)):
            flash.why_not.cache_clear()
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
            assert (flash.why_not(name) or "").startswith(reason or "")
            assert (flash.why_not(name) is None) == (reason is None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        flash.why_not.cache_clear()
        assert flash.why_not(name) == "torch sees no CUDA device"
    flash.why_not.cache_clear()
    with pytest.raises(ValueError, match="name: expected one of"):
        flash.why_not("xformers")


@pytest.fixture
def installed(monkeypatch):
    """The stand-ins, where the engine looks for the libraries."""
    monkeypatch.setattr(flash, "why_not", lambda name: None)
    found = {flash.MODULES[name]: library for name, library in LIBRARIES.items()}
    imported = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *more: found.get(name) or imported(name, *more))


@pytest.mark.parametrize("name", flash.NAMES)
def test_an_engine_attends_by_a_library(name, installed, calls):
    """Pages fit it by themselves; the tokens are near ours, and the bits promised to nobody."""
    model, given = decoder("llama", torch.bfloat16), prompts(3)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    one = Engine(model, kv_budget=1 << 22, use_attention=name)
    assert one.page_size == (256 if name == "flash-attn" else 16) and not one.bitwise
    wanted = Engine(model, kv_budget=1 << 22).generate(given, params)
    for got, ours in zip(one.generate(given, params), wanted, strict=True):
        torch.testing.assert_close(got.logp_raw[:1], ours.logp_raw[:1], rtol=0.05, atol=0.05)
    assert calls


@pytest.mark.parametrize("name", (None, *flash.NAMES))
def test_what_plans_on_the_host_is_in_no_graph(name, installed, monkeypatch):
    """A graph's replay would not plan: every step would attend to the first one's lengths."""
    model, options = decoder("llama", torch.bfloat16), {"kv_budget": 1 << 22, "use_attention": name}
    for graphs in (None, True):
        one = Engine.__new__(Engine, model)
        with monkeypatch.context() as there:
            there.setattr(type(one.decoder), "device", torch.device("cuda"))
            if name == "flashinfer" and graphs:
                with pytest.raises(ValueError, match="graphs: expected None or False with flashinfer"):
                    one.__init__(model, graphs=graphs, **options)
            else:
                one.__init__(model, graphs=graphs, **options)
                assert (one.graphs is None) == (name == "flashinfer")


def test_an_engine_says_what_a_library_cannot_do(installed):
    """When it is made, not in its first step."""
    half = decoder("llama", torch.bfloat16)
    for model, options, kind, said in (
        (half, {"page_size": 16}, ValueError, "page_size: expected a multiple of 256 with flash-attn, got 16"),
        (decoder("llama"), {}, TypeError, "q: expected float16 or bfloat16 with flash-attn, got torch.float32"),
        (decoder("gpt_oss", torch.bfloat16), {}, ValueError, "sinks: expected None with flash-attn, which has none"),
    ):
        with pytest.raises(kind, match=said):
            Engine(model, kv_budget=1 << 24, use_attention="flash-attn", **options)
    wide = [layer._replace(widths=(512, 512)) for layer in Engine(half, kv_budget=1 << 22).decoder.layers]
    with pytest.raises(ValueError, match="q: expected heads of at most 256 with flash-attn, got 512"):
        flash.attention("flash-attn", wide, 256)
