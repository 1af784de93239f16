"""Tiny random decoders of many families, and the prompts that the rollout tests give them."""

from __future__ import annotations

import functools

import torch
import transformers

VOCAB, CONTEXT = 211, 256
# Activations are of a multiple of 128: of what is left beside whole pairs of vectors, in the share of each of two
# threads, torch computes SiLU and GELU by other code.
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "head_dim": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What a family's config has beside or instead of TINY.
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": MOE,
    "mistral": {"sliding_window": 16},
    "mixtral": MOE,
    "gemma": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 32},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 16},
    "gpt_neox": {},
    "smollm3": {},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    "starcoder2": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "glm4": {"partial_rotary_factor": 0.5},
    "ernie4_5": {},
    "exaone4": {"sliding_window": 16},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "gpt_oss": {"sliding_window": 16, **MOE},
    "cohere2": {"sliding_window": 16, "logit_scale": 0.25},
}
# Families whose attention is their own.
UNREACHED = {
    "falcon": {"ffn_hidden_size": 96},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
}


@functools.cache
def decoder(family: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random model. Its weights are large enough that no two logits are near one another by chance."""
    options = TINY | {**FAMILIES, **UNREACHED}[family]
    if family in UNREACHED:  # which derives it
        del options["head_dim"]
    config = transformers.AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.2)
    return model.to(dtype).eval()


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Prompts of random tokens and lengths."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=rng).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in lengths]
