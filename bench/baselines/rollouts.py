"""Generation by others on the same weights: transformers, llama.cpp, vLLM, nano-vllm.

A baseline is made once, and called with (prompts, samples, new, greedy): lists of ids, samples of each, tokens of each
sample. It returns the tokens of every sample, those of one prompt together; None where it cannot be greedy.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

NO_END = -1  # no token is the end of sequence


def generate(model):
    """One padded batch, a cache of its own; no log-probs."""

    def run(prompts, samples, new, greedy=False):
        ids = torch.tensor([p for p in prompts for _ in range(samples)], device=model.device)
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=not greedy, max_new_tokens=new, eos_token_id=NO_END,
                pad_token_id=0, **({} if greedy else {"top_k": 0, "top_p": 1.0, "temperature": 1.0}),
            )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    return run


def generate_batch(model):
    """transformers' continuous batching over a paged cache with shared prefixes, sized for the work; no log-probs."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    def run(prompts, samples, new, greedy=False):
        repeated = [p for p in prompts for _ in range(samples)]
        page = 32
        blocks = len(repeated) * (-(-(len(prompts[0]) + new) // page) + 1)
        how = ContinuousBatchingConfig(page_size=page, num_blocks=blocks, max_batch_tokens=2048)
        config = GenerationConfig(
            do_sample=not greedy, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new,
            eos_token_id=NO_END, pad_token_id=0,
        )  # fmt: skip
        found = model.generate_batch(repeated, generation_config=config, continuous_batching_config=how, warmup=False)
        outputs = sorted(found.values(), key=lambda out: int(out.request_id.rsplit("_", 1)[-1]))
        return [out.generated_tokens for out in outputs]

    return run


def save(model, folder: Path) -> None:
    """The weights and a tokenizer of one word, which is all that they need who get ids and are asked for ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<end>").save_pretrained(folder)


def vllm(folder: Path, wanted: float, rows: int, longest: int):
    """vLLM with its prefix caching, in ``wanted`` bytes of the GPU; no log-probs."""
    from vllm import LLM, SamplingParams

    total = torch.cuda.get_device_properties(0).total_memory
    engine = LLM(
        model=str(folder), skip_tokenizer_init=True, gpu_memory_utilization=min(0.9, wanted / total),
        max_model_len=longest, max_num_seqs=rows, enable_prefix_caching=True,
    )  # fmt: skip

    def run(prompts, samples, new, greedy=False):
        params = SamplingParams(
            n=samples, max_tokens=new, ignore_eos=True, temperature=0.0 if greedy else 1.0, detokenize=False
        )
        found = engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(out.token_ids) for request in found for out in request.outputs]

    return run


def nano_vllm(folder: Path, wanted: float, rows: int, longest: int):
    """nano-vllm, beside what is on the GPU already; it has no greedy sampling, and no samples of one prompt."""
    from nanovllm import LLM, SamplingParams

    free, total = torch.cuda.mem_get_info()
    share = min(0.95, (total - free + wanted) / total)
    engine = LLM(str(folder), gpu_memory_utilization=share, max_model_len=longest, max_num_seqs=rows)

    def run(prompts, samples, new, greedy=False):
        if greedy:
            return None
        params = SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True)
        found = engine.generate([p for p in prompts for _ in range(samples)], params, use_tqdm=False)
        return [out["token_ids"] for out in found]

    return run


class LlamaCpp:
    """llama.cpp through its C interface, by llama-cpp-python.

    Args:
        source: a GGUF file of the weights.
        folder: where they are kept in ``kind``.
        kind: "F32", "F16" or "BF16".
    """

    def __init__(self, source: Path, folder: Path, kind: str, threads: int, sequences: int, positions: int):
        import llama_cpp

        self.lib = lib = llama_cpp
        path = folder / f"{source.stem}-{kind.lower()}.gguf"
        self._quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._quiet, None)
        if not path.exists():
            how = lib.llama_model_quantize_default_params()
            how.allow_requantize = True
            how.ftype = {"F32": lib.LLAMA_FTYPE_ALL_F32, "F16": lib.LLAMA_FTYPE_MOSTLY_F16, "BF16": 32}[kind]
            if lib.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(how)):
                raise RuntimeError(f"llama.cpp does not convert {source.name} to {kind}")
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(str(path).encode(), options)
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = positions, 2048, 512
        settings.n_seq_max, settings.kv_unified = sequences, True
        settings.n_threads = settings.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, settings)
        self.batch = lib.llama_batch_init(2048, 0, 1)

    def __call__(self, prompts, samples, new, greedy=False):
        lib, context = self.lib, self.context
        memory = lib.llama_get_memory(context)
        lib.llama_memory_clear(memory, False)
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        last = lib.llama_sampler_init_greedy() if greedy else lib.llama_sampler_init_dist(1)
        lib.llama_sampler_chain_add(chain, last)
        found = []
        for group, prompt in enumerate(prompts):  # one prompt a call: its logits are those of its last token
            self._decode([(t, at, group * samples, at == len(prompt) - 1) for at, t in enumerate(prompt)])
            found += [[lib.llama_sampler_sample(chain, context, len(prompt) - 1)] for _ in range(samples)]
            for other in range(1, samples):
                lib.llama_memory_seq_cp(memory, group * samples, group * samples + other, -1, -1)
        for step in range(new - 1):
            self._decode([(tokens[-1], len(prompts[0]) + step, i, True) for i, tokens in enumerate(found)])
            for i, tokens in enumerate(found):
                tokens.append(lib.llama_sampler_sample(chain, context, i))
        lib.llama_sampler_free(chain)
        return found

    def _decode(self, entries) -> None:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
