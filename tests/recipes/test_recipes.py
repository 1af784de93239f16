"""Two steps of every recipe beside an independent float64 script, to 1e-6; a coefficient 1% off is found."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers

import rlfast
from rlfast.recipes import classic, pairs, reasoning
from rlfast.recipes.training import Task, fitted, train
from tests.recipes.expected import EXPECTED
from tests.recipes.follow import Truth

VOCAB, TOKENS, RATE = 64, 6, 0.05
STEPS = {name: 2 for name in EXPECTED} | {"internlm2": 3}  # its critic is trained alone at first
PROMPTS, ANSWERS = [[5, 6, 7], [8, 9], [10, 3, 11, 4], [12]], [[4, 5], [6, 7, 2], [8], [9, 2]]


@functools.cache
def decoder(seed: int):
    """A tiny random model; many of its tokens end a response, so that lengths differ."""
    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size=VOCAB, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=list(range(48, VOCAB)), tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.3)
    return model.eval()


def reward(number, rollout) -> float:
    """Of the tokens alone; no two answers are likely to have the same."""
    return sum((k + 1) * token for k, token in enumerate(rollout.tokens)) % 97 / 60 + 0.01 * number


def at_size(name: str):
    """A recipe at the size of the test, with several updates a batch, so that ratios leave 1."""
    recipe = fitted(rlfast.recipe(name), batch=2, candidates=4, max_tokens=TOKENS, steps=2, learning_rate=RATE)
    for path, _ in recipe.values():
        if path.endswith("epochs"):
            recipe = recipe.replaced(path, 3)
        if path.endswith("minibatches"):
            recipe = recipe.replaced(path, 1)
        if path.endswith("candidates"):
            recipe = recipe.replaced(path, 4)
        if path.endswith("entropy.target"):
            recipe = recipe.replaced(path, 10.0)  # above the entropy of a random model
    return recipe


def follow(name: str, recipe) -> int:
    """Run a recipe beside the truth; how many updates that were."""
    model, teacher = copy.deepcopy(decoder(0)), decoder(1)
    truth = Truth(EXPECTED[name], model, teacher, PROMPTS, ANSWERS, reward, RATE)
    updates, task = 0, Task(PROMPTS, ANSWERS, reward)
    options = {"teacher": teacher, "max_tokens": TOKENS, "kv_budget": 1 << 20, "watch": truth.begins}
    for record in train(recipe, model, task, STEPS[name], **options):
        truth.follow(record)
        updates += 1
    truth.end(model)
    return updates


def test_every_recipe_is_expected():
    systems = {row.name for rows in (classic.ROWS, pairs.ROWS, reasoning.ROWS) for row in rows}
    assert systems == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_two_steps_are_those_of_the_formulas(name):
    assert follow(name, at_size(name)) >= STEPS[name]


SIZES = ("batch", "candidates", "epochs", "minibatches", "warm_up", "learning_rate", "critic_rate", "lora", "runs",
         "refresh", "max_len", "buffer")  # fmt: skip
SILENT = {
    ("nemotron4", "2.loss.nll"): "a weight of 1e-5: a hundredth of it is below the tolerance",
    ("deepseek_r1", "0.loss.eps_low"): "no ratio is below 1 − 10",
    ("skywork", "0.entropy.target"): "a threshold: the entropy is on the same side of it",
}


def coefficients(name: str) -> list[str]:
    """The paths of what a recipe multiplies, bounds or divides by; temperatures where log-probs have them."""
    values = dict(rlfast.recipe(name).values())
    policies = {path.partition("advantage")[0] for path in values if ".advantage." in path}
    found = []
    for path, x in values.items():
        stem, _, option = path.rpartition(".")
        known = isinstance(x.value, float) and x.value and option not in SIZES and (name, path) not in SILENT
        if known and (option != "temperature" or f"{stem}." in policies):
            found.append(path)
    return found


@pytest.mark.parametrize("name,path", [(name, path) for name in EXPECTED for path in coefficients(name)])
def test_a_coefficient_that_is_off_by_one_per_cent_is_found(name, path):
    recipe = at_size(name)
    value = dict(recipe.values())[path].value
    with pytest.raises(AssertionError, match="off by"):
        follow(name, recipe.replaced(path, value * 0.99))
