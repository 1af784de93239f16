"""Three recipes learn to add: GRPO, PPO with a critic and a reward model, and DPO, each beside a stock trainer.

    python -m bench.learning --recipe grpo|ppo|dpo [--seeds 3] [--steps N] [--model smollm2|tiny] [--json PATH]
    python -m bench.learning --picture docs/learning.png [--json PATH]

SmolLM2-135M-Instruct and one-digit sums, on a CPU; only the last layers learn, so that a step takes seconds. GRPO and
DPO stand beside TRL's trainers with the same options and seeds. TRL has no PPO any more: there the other arm is the
same loop on the torch backend, plain PyTorch. A curve is of the same problems at each of its points, before the first
step and every few: the mean reward of two samples of the policy to each, always by the same noise; for DPO the share of
pairs of the untrained model's answers that the implicit reward orders rightly, one half at first. Exit code 1 if a
curve of ours does not rise.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import rlfast
from bench.run import RESULTS, stamp
from rlfast.recipes import Recipe, said, tasks, use
from rlfast.recipes.models import Actor
from rlfast.recipes.preferences import Pairs, pairs_of
from rlfast.recipes.row import Policy
from rlfast.recipes.session import Session, Task
from rlfast.recipes.training import fitted, train

RESULT = RESULTS / "learning.json"
ARMS = ("stock", "rlfast")
LAYERS = 8  # of 30 that learn
TOKENS, TEMPERATURE = 16, 0.7
PROBLEMS, SAMPLES, CANDIDATES = 64, 2, 4  # that a point is of; candidates of a pair
FIXED = 1 << 16  # their seed, no run's
TRL = "TRL 1.16's default"
GRPO = Recipe(
    "grpo", "GRPO as TRL has it", "2402.03300", "V",
    (
        Policy(
            loss=use("loss", "dapo", like=said("trl", TRL)),
            advantage=use("group_advantage", method=said("grpo", TRL), like=said("trl", TRL)),
            candidates=said(4, "the demo's"),
            temperature=said(TEMPERATURE, "the demo's"),
        ),
    ),
)  # fmt: skip


class Plan(NamedTuple):
    """How a recipe is run: prompts and answers a step, steps, and what the curve is of. Each step is one update."""

    recipe: Recipe
    prompts: int
    answers: int
    steps: int
    rate: float
    stage: int  # whose curve it is
    measure: str
    stock: str


PLANS = {
    "grpo": Plan(GRPO, 4, 4, 20, 1e-4, 0, "reward", "TRL's GRPOTrainer"),
    "ppo": Plan(rlfast.recipe("gpt4"), 8, 2, 15, 5e-5, 1, "reward", "the torch backend"),
    "dpo": Plan(rlfast.recipe("zephyr"), 6, 4, 15, 5e-5, 0, "accuracy", "TRL's DPOTrainer"),
}


class Curve:
    """What a model is worth, before the first step and every few."""

    def __init__(self, measure: str, model: torch.nn.Module, tokenizer, task: Task, every: int):
        self.model, self.tokenizer, self.task, self.every = model, tokenizer, task, every
        self.pairs = None
        if measure == "accuracy":
            answers = self._answers(CANDIDATES)
            self.pairs = pairs_of(answers, answers.rewards)
            self.before = self._margins(self.pairs)
        self.points = {0: self._point()}

    def step(self, done: int) -> None:
        """After so many updates."""
        if done % self.every == 0:
            self.points[done] = self._point()

    def _point(self) -> float:
        if self.pairs is None:
            return self._answers(SAMPLES).rewards.mean().item()
        gained = self._margins(self.pairs) - self.before
        return ((gained > 0).float() + 0.5 * (gained == 0)).mean().item()

    def _answers(self, each: int):
        """To all problems, by the same noise each time."""
        stage = GRPO.replaced("0.batch", len(self.task.prompts)).replaced("0.candidates", each).stages[0]
        session = Session(self.model, self.task, tokenizer=self.tokenizer, max_tokens=TOKENS, seed=FIXED)
        return session.sample(stage, numbers=list(range(len(self.task.prompts))))

    @torch.no_grad()
    def _margins(self, pairs: Pairs) -> torch.Tensor:
        """How much likelier the better answers are, in nats."""
        actor = Actor(self.model)
        chosen, rejected = (actor.logps(x).logp.sum(-1) for x in (pairs.chosen, pairs.rejected))
        return chosen - rejected


def fixed(model: str, tokenizer) -> Task:
    """The problems that every point is of."""
    if model == "tiny":
        return tasks.toy(PROBLEMS // 4, seed=FIXED)
    return tasks.arithmetic(tokenizer, PROBLEMS, seed=FIXED)


def freeze(model: torch.nn.Module, layers: int = LAYERS) -> torch.nn.Module:
    """Only the last layers and what follows them learn; not the head, which is the embedding too."""
    model.requires_grad_(False)
    for part in (*model.model.layers[-layers:], model.model.norm):
        part.requires_grad_(True)
    return model


def ours(plan: Plan, model: str, seed: int, steps: int, every: int, rate: float, keep: Callable | None = None) -> Curve:
    """The recipe's loop."""
    policy, tokenizer, task = tasks.loaded(model, seed)
    recipe = fitted(
        plan.recipe, batch=plan.prompts, candidates=plan.answers, max_tokens=TOKENS, steps=steps, learning_rate=rate
    )
    for path in ["1.temperature", "0.temperature"][1 - plan.stage :]:
        recipe = recipe.replaced(path, TEMPERATURE)
    policy = policy if model == "tiny" else freeze(policy)
    curve = Curve(plan.measure, policy, tokenizer, fixed(model, tokenizer), every)
    for record in train(recipe, policy, task, steps, tokenizer=tokenizer, max_tokens=TOKENS, seed=seed):
        if record.stage == plan.stage:
            curve.step(record.step + 1)
            if keep is not None:
                keep(record, tokenizer)
    return curve


def followed(trainer, measure: str, every: int) -> Curve:
    """A trainer of TRL's, trained."""
    from transformers import TrainerCallback

    freeze(trainer.model)
    tokenizer = trainer.processing_class
    curve = Curve(measure, trainer.model, tokenizer, fixed("smollm2", tokenizer), every)

    class After(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            curve.step(state.global_step)

    trainer.add_callback(After())
    trainer.train()
    return curve


def stock_grpo(seed: int, steps: int, every: int, rate: float) -> Curve:
    """TRL's GRPOTrainer on the same prompts."""
    from rlfast.demo import grpo, model, trainer
    from rlfast.demo.settings import Settings

    trainer.quiet()
    plan = PLANS["grpo"]
    settings = Settings(
        batch=plan.prompts * plan.answers, generations=plan.answers, max_completion=TOKENS, learning_rate=rate,
        temperature=TEMPERATURE, seed=seed, model=str(model.prepare()),
    )  # fmt: skip
    return followed(grpo.build(settings, steps), plan.measure, every)


def stock_dpo(seed: int, steps: int, every: int, rate: float, pairs: list[dict]) -> Curve:
    """TRL's DPOTrainer on the pairs that ours had."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from rlfast.demo import model, trainer
    from rlfast.demo.settings import DpoSettings

    trainer.quiet()
    count = max(1, len(pairs) // steps)
    settings = DpoSettings(batch=count, learning_rate=rate, seed=seed, model=str(model.prepare()))
    config = DPOConfig(**trainer.options(settings, steps), beta=0.1)
    made = DPOTrainer(**trainer.loaded(settings), args=config, train_dataset=Dataset.from_list(pairs[: count * steps]))
    made.remove_callback(PrinterCallback)
    return followed(made, PLANS["dpo"].measure, every)


def stock(name: str, model: str, seed: int, steps: int, every: int, rate: float, pairs: list[dict]) -> Curve:
    """The other arm; of a tiny model, which has no tokenizer, the oracle's."""
    if name == "ppo" or model == "tiny":
        with rlfast.use_backend("reference" if model == "tiny" else "torch"):
            return ours(PLANS[name], model, seed, steps, every, rate)
    return stock_grpo(seed, steps, every, rate) if name == "grpo" else stock_dpo(seed, steps, every, rate, pairs)


def rises(points: dict[int, float]) -> float:
    """The last point less the first."""
    return points[max(points)] - points[min(points)]


def run(
    name: str,
    model: str,
    seeds: int,
    steps: int | None,
    rate: float | None,
    arms: tuple[str, ...] = ARMS,
    every: int = 5,
) -> dict:
    """The curves of a recipe by arm and seed."""
    plan = PLANS[name]
    steps, rate = steps or plan.steps, rate or plan.rate
    curves = {arm: {} for arm in arms}
    for seed in range(seeds):
        pairs: list[dict] = []

        def keep(record, tokenizer, pairs=pairs):
            """Texts of the pairs, for TRL."""
            if name == "dpo" and model != "tiny":
                pairs += _texts(record, tokenizer)

        for arm in reversed(arms):  # ours first: its pairs are TRL's
            options = {"seed": seed, "steps": steps, "every": every, "rate": rate}
            if arm == "rlfast":
                made = ours(plan, model, **options, keep=keep)
            else:
                made = stock(name, model, **options, pairs=pairs)
            curves[arm][str(seed)] = made.points
            print(f"{name}, seed {seed}, {arm}: {' '.join(f'{x:.3f}' for x in made.points.values())}", flush=True)
            gc.collect()
    beside = "the oracle backend" if model == "tiny" else plan.stock
    found = {"model": model, "steps": steps, "measure": plan.measure, "stock": beside, "curves": curves}
    found["settings"] = {"layers": LAYERS, "tokens": TOKENS, "learning_rate": rate, "prompts": plan.prompts,
                         "answers": plan.answers, "temperature": TEMPERATURE, "problems": PROBLEMS}  # fmt: skip
    return found


def _texts(record, tokenizer) -> list[dict]:
    """The pairs of a step as texts."""
    found, pairs = [], record.data["pairs"]
    for i in range(len(pairs.margin)):
        row = {}
        for side in ("chosen", "rejected"):
            batch = getattr(pairs, side)
            ids, first = batch.ids[i], int(batch.mask[i].int().argmax()) + 1
            row["prompt"] = tokenizer.decode(ids[:first])
            text = tokenizer.decode(ids[first : int(batch.attention[i].sum())])
            row[side] = text.removesuffix(tokenizer.eos_token)  # TRL puts one there
        found.append(row)
    return found


def draw(result: dict, path: Path) -> None:
    """A panel a recipe: a line a seed, both arms."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found = result["learning"]
    figure, axes = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3), layout="constrained", squeeze=False)
    for axis, (name, one) in zip(axes[0], found.items(), strict=True):
        for arm, colour in (("stock", "tab:gray"), ("rlfast", "tab:blue")):
            for i, curve in enumerate(one["curves"].get(arm, {}).values()):
                label = None if i else one["stock"] if arm == "stock" else arm
                axis.plot(
                    [int(x) for x in curve],
                    curve.values(),
                    marker=".",
                    color=colour,
                    alpha=0.8,
                    linewidth=1.2,
                    label=label,
                )
        axis.set_title(name.upper(), fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel("mean reward" if one["measure"] == "reward" else "pairs ordered rightly")
        axis.grid(alpha=0.2)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments=None) -> int:
    """Run, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=tuple(PLANS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each stage; by default what takes a few minutes")
    parser.add_argument("--every", type=int, default=5, help="steps between the points of a curve")
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--learning-rate", type=float, help="by default the plan's")
    parser.add_argument("--arm", choices=ARMS, help="only this one")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path, help="draw what the file has")
    args = parser.parse_args(arguments)
    before = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    learning, fine = before.get("learning", {}), True
    if args.recipe:
        arms = (args.arm,) if args.arm else ARMS
        one = run(args.recipe, args.model, args.seeds, args.steps, args.learning_rate, arms, args.every)
        learning[args.recipe] = one
        gains = {seed: rises(curve) for seed, curve in one["curves"].get("rlfast", {}).items()}
        by = ", ".join(f"{x:+.3f}" for x in gains.values())
        print(f"{args.recipe}: {one['measure']} rises by {by}")
        fine = all(gain > 0 for gain in gains.values())
        made = stamp("cpu", "python -m bench.learning")
        made["learning"] = {name: learning[name] for name in PLANS if name in learning}
        made["method"] = __doc__.split("\n\n")[2].replace("\n", " ")
        args.json.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.picture:
        draw({"learning": learning}, args.picture)
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
