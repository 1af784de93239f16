"""``bench.rollouts`` on a tiny model: every part of a result, its tables, and the adapters of what needs a GPU."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import report, rollouts, rollouts_cases, rollouts_report
from bench.rollouts_cases import Setting

TINY = Setting(2, 2, 8, 4, "float32", (("generate", 0.001), ("roofline", 2.0)), "tiny")


@pytest.fixture(scope="module")
def result():
    """As ``main`` makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rollouts.ROUNDS, "cpu", 2)
        patch.setattr(rollouts, "AGREE", 3)
        found = rollouts.run_setting(TINY, None, lambda text: None)
    made = rollouts.stamp("cpu", "python -m bench.rollouts")
    return made | {"rollouts": [found | {"stamp": report.stamp(made)}]}


def test_a_result(result):
    (row,) = json.loads(json.dumps(result))["rollouts"]
    assert set(row["arms"]) == {"rlfast", "generate", "generate_batch"} and "llama.cpp" in row["failures"]
    assert row["arms"]["rlfast"]["agree"] == 1.0
    parts = [row["split_ms"][part] for part in rollouts_report.PARTS["cpu"]]
    assert sum(parts) == pytest.approx(row["split_ms"]["step"], rel=0.5) and row["split_ms"]["steps"] == TINY.new - 1


def test_tables(result):
    (first, passed), (_, missed) = ((text, ok) for _, text, _, ok in rollouts_report.outcomes(result))
    assert (first, passed, missed) == ("≥ 0.001× generate", True, False)
    whole, steps = "\n".join(rollouts_report.figures(result)).split("\n\n")
    assert "× llama.cpp" in whole and TINY.name in steps and "linears and sampler" in steps
    on_gpu = result | {"machine": result["machine"] | {"gpu": "NVIDIA H200"}}
    (row,) = on_gpu["rollouts"]
    split = dict.fromkeys(("step", *rollouts_report.PARTS["cuda"]), 1.0)
    on_gpu = on_gpu | {"rollouts": [row | {"split_ms": split, "share": {"roofline": 0.75}}]}
    whole, steps = "\n".join(rollouts_report.figures(on_gpu)).split("\n\n")
    assert "× vLLM" in whole and "75%" in whole and "forward" in steps and "linears" not in steps


def test_what_was_not_measured_is_told():
    rows = report._on_gpu([("a case", "≥ 2× it")])
    assert rows[-1] == "| a case | ≥ 2× it | not yet measured |"
    assert any("Qwen3-0.6B" in line and "not yet measured" in line for line in report.targets([]))


class FakeLLM:
    """Takes what both libraries' engines take, and answers with the prompts' first ids."""

    def __init__(self, model=None, **options):
        self.options = options

    def generate(self, prompts, params, use_tqdm):
        assert use_tqdm is False
        if isinstance(prompts[0], dict):
            one = lambda p: SimpleNamespace(token_ids=tuple(p["prompt_token_ids"][: params.max_tokens]))  # noqa: E731
            return [SimpleNamespace(outputs=[one(p)] * params.n) for p in prompts]
        return [{"text": "", "token_ids": p[: params.max_tokens]} for p in prompts]


def test_engines_of_a_gpu(monkeypatch, tmp_path):
    for name in ("vllm", "nanovllm"):
        module = ModuleType(name)
        module.LLM, module.SamplingParams = FakeLLM, lambda **words: SimpleNamespace(**words)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(rollouts_cases.arms, "has", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 << 30, 80 << 30))
    model, _ = rollouts_cases.load(TINY, "cpu")
    engine = rollouts_cases.engine_of(TINY, model, None)
    prompts = rollouts_cases.prompts_of(TINY, None)
    found, why = rollouts_cases._on_gpu(TINY, model, engine, tmp_path)
    assert set(found) == {"vLLM", "nano-vllm"} and not why
    for run in found.values():
        assert run(prompts, 2, 3) == [p[:3] for p in prompts for _ in range(2)]
    assert found["vLLM"](prompts, 1, 3, greedy=True) == [p[:3] for p in prompts]
    assert found["nano-vllm"](prompts, 1, 3, greedy=True) is None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "random weights" / "tiny"
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 0
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_what_is_not_installed_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(rollouts_cases.arms, "has", lambda name: False)
    found, why = rollouts_cases._on_gpu(TINY, None, None, tmp_path)
    assert found == {} and why["vLLM"] == "vllm is not installed"
