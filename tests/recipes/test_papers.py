"""Two steps of every related paper's recipe, against float64; a coefficient 1% off does not pass."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections import deque
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import transformers
from typer.testing import CliRunner

import rlfast
from rlfast import cli
from rlfast.recipes import papers, said
from rlfast.recipes.agents import room_of
from rlfast.recipes.gridworld import GridWorld
from rlfast.recipes.session import run
from rlfast.recipes.training import Session, Task, fitted, train
from tests.recipes import paper_oracle as oracle
from tests.recipes import room_oracle
from tests.recipes.expected import EXPECTED
from tests.recipes.mistakes import RATES, coefficients, counts

RATE, TOKENS, EPOCHS, BATCH = 0.05, 5, 2, 3
NEAR = {"rtol": 1e-6, "atol": 1e-6}
VOCAB = 128
SEEDS = {"llm_teacher": 8}  # by which different advice has different returns
TEACHER_RATE = 2e-3  # with a larger one, every advice is the same after one step


class Characters:
    """A token a character of ASCII; verdicts and actions are one token, as a real vocabulary has them."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": oracle.encoded(text)}

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode()


def tiny():
    """A random model in float64."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.3, bos_token_id=None,
        eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def graded(number: int, rollout) -> float:
    """By the tokens; right is 1 and more."""
    return (sum(rollout.tokens) + number) % 7 / 4


TASK = Task([list(b"Why?"), list(b"And you"), list(b"6 x 7")], [list(b"So."), list(b"Me too"), list(b"42")], graded)


@functools.cache
def at_size(name: str):
    """A recipe at the size of the test."""
    recipe = fitted(rlfast.recipe(name), batch=BATCH, candidates=4, learning_rate=RATE)
    epochs = {path: EPOCHS for path, _ in recipe.values() if path.endswith("epochs")}  # so that ratios leave 1
    slower = {path: TEACHER_RATE for path, _ in recipe.values() if path.endswith("teacher_rate")}
    for path, value in (epochs | slower).items():
        recipe = recipe.replaced(path, value)
    return recipe


def steps(name: str, recipe=None):
    """[(stage, models as it began, records)] of two steps, and the model at the end."""
    recipe, found = recipe or at_size(name), []

    def watch(stage, models):
        found.append((stage, {k: copy.deepcopy(x) for k, x in models.items() if x is not None}, []))

    model = tiny()
    options = {"tokenizer": Characters(), "max_tokens": TOKENS, "seed": SEEDS.get(name, 5), "kv_budget": 1 << 20}
    for record in train(recipe, model, TASK, steps=2, watch=watch, **options):
        found[-1][2].append(record)
    return found, model


def drawn(answers) -> torch.Tensor:
    """[tokens]: what the sampler says of them."""
    return torch.cat([r.logp for r in answers.rollouts]).double()


def agree(records, wanted) -> int:
    """The records of a stage with what they should have come to; how many there were."""
    wanted = list(wanted)
    assert len(records) == len(wanted)
    for record, expected in zip(records, wanted, strict=True):
        data = record.data
        assert record.loss == pytest.approx(expected["loss"], rel=1e-6, abs=1e-6)
        if "value_loss" in expected:
            assert data["value_loss"] == pytest.approx(expected["value_loss"], rel=1e-6, abs=1e-6)
        if "advantages" in expected:
            got = data["measured"].advantages if "measured" in data else data["advantages"]
            torch.testing.assert_close(got.double(), expected["advantages"], **NEAR)
        if "probability" in expected:
            torch.testing.assert_close(data["judged"].probability.double(), expected["probability"], **NEAR)
        if "sampled" in expected:
            torch.testing.assert_close(drawn(data["answers"]), expected["sampled"], **NEAR)
        if "other" in expected:
            torch.testing.assert_close(drawn(data["other"]), expected["other"], **NEAR)
        if "acted" in expected:
            play = data["play"]
            torch.testing.assert_close(play.logp[play.mask].double(), expected["acted"][play.mask], **NEAR)
        if "pairs" in expected:
            sides = data["pairs"]
            for (best, worst), *rows in zip(expected["pairs"], sides.chosen.ids, sides.rejected.ids, strict=True):
                for tokens, ids in zip((best, worst), rows, strict=True):
                    assert bytes(tokens) in bytes(ids.tolist())
        if "scores" in expected:
            torch.testing.assert_close(data["scores"].double(), expected["scores"], **NEAR)
        if "rows" in expected:
            assert data["rows"].tolist() == expected["rows"]
    return len(wanted)


def policy_stage(stage, records, scores, **options) -> int:
    given = {"scores": scores, "beta": 0.05, "lam": 0.95} | options
    return agree(records, oracle.actor_critic(stage, records, RATE, RATE, **given))


def check_rlaif(found, model):
    (_, first, labels), (_, second, updates) = found
    assert agree(labels, oracle.labelled_rewards(first, labels, RATE)) == 2
    plain = {"lam": 1.0, "ppo": False, "clip": None}
    assert policy_stage(second, updates, oracle.model_scores(second), **plain) == 4


def check_expo(found, model):
    ((_, models, records),) = found
    wanted = list(oracle.dpo(models, records, RATE))
    assert agree(records, wanted) == 4
    start, tuned = models["policy"].state_dict(), wanted[-1]["policy"].state_dict()
    for key, x in model.state_dict().items():
        torch.testing.assert_close(x, tuned[key] + 0.5 * (tuned[key] - start[key]), rtol=1e-7, atol=1e-7)


def check_embedding_rewards(found, model):
    (_, first, updates), (_, second, best) = found
    records = updates[::4]  # the answers that four updates are on
    wanted = oracle.embedded_rewards(first, [r for r in records for _ in range(4)], RATE)
    assert agree(updates, wanted) == 8
    assert agree(best, oracle.best_by_ensemble(second, best, RATE)) == 2


class Whole(NamedTuple):
    """A restart's answer to its prompt, with what it goes on from."""

    tokens: list[int]


def check_satori(found, model):
    (_, first, pairs), (_, second, updates) = found
    assert agree(pairs, oracle.pair_rewards(first, pairs, RATE)) == 2
    scores = oracle.satori_scores(second, 0.5)
    assert policy_stage(second, updates, scores, beta=None, temperature=0.6) == 4
    taken = []
    for record in updates:
        answers, start = record.data["answers"], record.data["start"]
        half = len(answers.rollouts) // 2
        right = answers.rewards[:half] >= 1
        assert start.tolist() == [0] * half + [1 if x else -1 for x in right.tolist()]
        assert len({*start.tolist()}) == 3  # both kinds of restarts are there
        for one, more in zip(answers.rollouts[:half], answers.rollouts[half:], strict=True):
            whole = [*one.prompt_tokens, *one.tokens]
            assert more.prompt_tokens == whole[: len(more.prompt_tokens)]
            assert len(one.prompt_tokens) <= len(more.prompt_tokens)
            taken.append(len(whole) - len(more.prompt_tokens))
        for number, x, r in zip(answers.numbers, answers.rollouts, answers.rewards.tolist(), strict=True):
            assert r == graded(number, Whole([*x.prompt_tokens, *x.tokens][len(TASK.prompts[number]) :]))
    assert set(taken) == {0, 1, 2, 3, 4}, f"{sorted(taken)}"


def check_inverse_rl(found, model):
    (_, first, expert), (_, second, pairs), (_, third, updates) = found
    assert policy_stage(first, expert, lambda answers: answers.rewards) == 4
    assert agree(pairs, oracle.margin_rewards(second, pairs, RATE)) == 2
    for a, b in zip(first["policy"].parameters(), third["policy"].parameters(), strict=True):
        assert torch.equal(a, b)  # the last stage begins where the first did
    assert any(not torch.equal(a, b) for a, b in zip(second["policy"].parameters(), second["before"].parameters()))  # noqa: B905
    assert policy_stage(third, updates, oracle.model_scores(third)) == 4


def check_rlrf(found, model):
    ((_, models, records),) = found
    assert agree(records, oracle.dpo(models, records, RATE, oracle.rated_pairs)) == 4


def check_linvit(found, model):
    ((_, models, records),) = found
    assert agree(records, room_oracle.guided(models, records, RATE)) == 2


def check_llm_feedback(found, model):
    (_, first, early), (_, second, labels), (_, third, late) = found
    assert agree(early, room_oracle.agent(first, early, RATE)) == 4
    assert agree(labels, room_oracle.preferred_steps(second, labels, RATE)) == 2
    assert agree(late, room_oracle.agent(third, late, RATE, share=1.0)) == 4


def check_llm_teacher(found, model):
    ((_, models, records),) = found
    assert [r.kind for r in records] == ["agent", "agent", "teacher"] * 2
    assert agree(records, room_oracle.advised(models, records, RATE, TEACHER_RATE)) == 6


CHECKS = {row.name: globals()[f"check_{row.name}"] for row in papers.ROWS}
MISTAKES = coefficients((name, at_size(name)) for name in CHECKS)
SIZES = [size for size in counts((name, at_size(name)) for name in CHECKS) if size[1].endswith(RATES)]


@pytest.mark.parametrize("name", CHECKS)
def test_the_command_line_runs_it(name):
    options = ["--steps", "1", "--batch", "2", "--candidates", "2", "--max-tokens", "4", "--json"]
    done = CliRunner().invoke(cli.app, ["train", name, *options])
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert records and all(math.isfinite(r["loss"]) and math.isfinite(r["reward"]) for r in records)


@pytest.mark.parametrize("name", ("rlaif", "rlrf", "linvit"))
def test_what_reads_texts_wants_a_tokenizer(name):
    with pytest.raises(ValueError, match=r"tokenizer: expected the model's, since .* got None"):
        list(train(fitted(rlfast.recipe(name), batch=2, candidates=2), tiny(), TASK, 1))


def test_a_judge_wants_two_answers():
    options = {"tokenizer": Characters(), "max_tokens": TOKENS, "kv_budget": 1 << 20}
    with pytest.raises(ValueError, match="candidates: expected 2, which a judge compares, got 1"):
        list(train(fitted(rlfast.recipe("rlaif"), batch=2, candidates=1), tiny(), TASK, 1, **options))


def test_a_reference_without_weights_of_its_own_is_moved_nowhere():
    row = rlfast.recipe("tr_dpo")
    row = replace(row, stages=(replace(row.stages[0], lora=said(4, "")),))
    with pytest.raises(ValueError, match=r"anchor: expected None with lora, .* got ema_update"):
        list(train(fitted(row, batch=2), tiny(), TASK, 1))


class Witness:
    """A judge that sees whether an episode ends at its goal, and likes what it reads first."""

    tokenizer = Characters()

    def choose(self, prompts, candidates):
        found = []
        for prompt in prompts:
            goal = prompt.split("Reach ")[1].split(".")[0]
            ways = [prompt.split(f"Response {x}: ")[1].split("\n")[0].split() for x in "AB"]
            found.append(torch.tensor([4.0 * (way[-1] == goal) - 0.1 * len(way) for way in ways]))
        return [x + torch.tensor([0.5, 0.0]) for x in found]


def test_preferences_undo_a_wrong_goal():
    """Taught to go to the corner, an agent learns from a judge alone to go where its goal is."""
    session = Session(tiny(), TASK, tokenizer=Characters(), kv_budget=1 << 20)
    session.engine, room, reached = Witness(), room_of(session), []
    recipe = fitted(rlfast.recipe("llm_feedback"), learning_rate=0.02)
    for stage, steps in zip(recipe.stages, (60, 150, 150), strict=True):
        deque(run(session, replace(stage, batch=said(32, "here")), steps), maxlen=0)
        rng = torch.Generator().manual_seed(9)
        for corner in (True, False):
            starts = room.world.starts(400, rng, corner)
            play = room.world.play(lambda c, g: room.act(room.seen(c, g))[0], *starts, rng)
            reached.append(play.reached.float().mean().item())
    assert reached[0] > 0.9 and reached[1] < 0.4
    assert reached[-1] > reached[1] + 0.25


def test_walls_and_starts_of_the_room():
    world, rng = GridWorld(size=2, horizon=3), torch.Generator().manual_seed(0)
    moved = world.move(torch.arange(4)[:, None].expand(4, 4), torch.arange(4).expand(4, 4))
    assert moved.tolist() == [[0, 2, 0, 1], [1, 3, 0, 1], [0, 2, 2, 3], [1, 3, 2, 3]]
    for corner in (True, False):
        cells, goal = world.starts(200, rng, corner)
        assert (cells != goal).all() and (not corner or (goal == 3).all())
    with pytest.raises(ValueError, match="size: expected an int ≥ 2, got 1"):
        GridWorld(size=1)
    with pytest.raises(TypeError, match=r"horizon: expected an int ≥ 1, got 1\.5"):
        GridWorld(horizon=1.5)


def test_every_recipe_is_checked_here_or_beside():
    assert set(EXPECTED) | set(CHECKS) == set(rlfast.RECIPES) and not set(EXPECTED) & set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_two_steps_are_the_papers(name):
    CHECKS[name](*steps(name))


@pytest.mark.parametrize("name, path, value", MISTAKES + SIZES)
def test_one_per_cent_shows(name, path, value):
    with pytest.raises(AssertionError):
        CHECKS[name](*steps(name, at_size(name).replaced(path, value)))
