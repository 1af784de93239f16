"""Advantages of TRL, verl and torchrl on small inputs, for tests/golden_advantages.json: what presets must agree with.

pip install --no-deps --target SITE verl==0.9.1 torchrl==0.14.1 "tensordict>=0.14.3,<0.15" pyvers hoptorch cloudpickle
python tools/golden_advantages.py SITE

The two cannot be installed beside each other and transformers 5.23: verl wants tensordict ≤ 0.10 and transformers
< 5.11, torchrl tensordict ≥ 0.14.3. So what they compute is written down once, with their versions; the functions that
are called need neither ray nor the rest, for which empty modules stand in. TRL is the installed one.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import inspect
import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy
import torch

MISSING = ("ray", "omegaconf", "hydra", "codetiming", "pylatexenc", "pyarrow", "peft", "wandb", "torchdata", "dill")
OUT = Path(__file__).resolve().parent.parent / "tests" / "golden_advantages.json"


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a mock for what the modules import and the functions do not use."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in MISSING:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        return module

    def exec_module(self, module):
        pass


def numbers(x):
    """A tensor, or several of them, as lists of float64."""
    return [numbers(y) for y in x] if isinstance(x, tuple | list) else x.double().tolist()


def inputs() -> dict:
    """Rows with holes, padding and a row of one token; groups of three sizes."""
    draw = torch.Generator().manual_seed(7)
    mask = torch.ones(7, 9)
    mask[0, 5:], mask[1, 2:4], mask[2, 8:], mask[3, 1:], mask[5, 3:6] = 0, 0, 0, 0, 0
    x = {name: torch.randn(7, 9, generator=draw) for name in ("rewards", "values", "log_pi", "log_mu")}
    x["scores"] = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 0.5, 2.0])
    done = torch.rand(7, 9, generator=draw) < 0.2
    terminated = done & (torch.rand(7, 9, generator=draw) < 0.5)
    next_values = torch.cat((x["values"][:, 1:], torch.randn(7, 1, generator=draw)), 1)
    x["next_values"] = torch.where(done, torch.randn(7, 9, generator=draw), next_values)
    x |= {"mask": mask, "done": done.float(), "terminated": terminated.float()}
    x["sum_sq"] = torch.rand(7, 9, generator=draw) * 0.5 + 0.3
    x["logp"] = torch.rand(7, 9, generator=draw).clamp(min=0.1).log()
    x["ids"] = torch.tensor([4, 9, 4, 9, 4, 1, 9])
    # several rewards an answer, on a scale on which what is added to a deviation shows
    x["columns"] = torch.randn(8, 3, generator=draw) * 1e-3
    return x


WEIGHTS = (1.0, 0.5, -2.0)


def of_verl(x: dict) -> dict:
    """verl's estimators; those of whole answers by their one number a row."""
    from verl.trainer.ppo import core_algos as verl

    def outcome(function, **more):
        scores = torch.zeros(7, 9, dtype=x["scores"].dtype)
        scores[:, 0] = x["scores"]  # the sum over the row is the score, wherever it stands
        return numbers(function(scores, response_mask=x["mask"], index=x["ids"].long().tolist(), **more)[0])

    def config(**named):
        return type("Config", (dict,), {"__getattr__": dict.__getitem__})(named)

    def several():
        """GDPO, whose rewards verl makes float32: here they keep their dtype."""
        kind = (torch, torch.float64), (numpy, numpy.float64)
        names = [f"reward {k}" for k in range(3)]
        columns = {name: x["columns"][:7, k].numpy() for k, name in enumerate(names)}
        batch = {"prompts": torch.zeros(7, 2), "attention_mask": torch.cat((torch.ones(7, 2), x["mask"]), 1).long()}
        chosen = config(gdpo_reward_keys=names, gdpo_reward_weights=WEIGHTS)
        with contextlib.ExitStack() as stack:
            if x["columns"].dtype == torch.float64:
                for module, wide in kind:
                    stack.enter_context(mock.patch.object(module, "float32", wide))
            return outcome(verl.compute_gdpo_outcome_advantage, config=chosen, non_tensor_batch=columns, batch=batch)

    pairs = {"ids": x["ids"].clone()}
    pairs["ids"][5] = 4  # pass@k refuses a group of one
    return {
        "gae": numbers(verl.compute_gae_advantage_return(x["rewards"], x["values"], x["mask"], 0.97, 0.9)),
        "grpo": outcome(verl.compute_grpo_outcome_advantage),
        "dr_grpo": outcome(verl.compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False),
        "rloo": outcome(verl.compute_rloo_outcome_advantage),
        "opo": outcome(verl.compute_opo_outcome_advantage),
        "gpg": outcome(verl.compute_gpg_outcome_advantage),
        "gdpo": several(),
        "reinforce++_baseline": outcome(verl.compute_reinforce_plus_plus_baseline_outcome_advantage),
        "reinforce++": numbers(
            verl.compute_reinforce_plus_plus_outcome_advantage(x["rewards"], x["mask"], config=config(gamma=0.97))
        ),
        "remax": numbers(verl.compute_remax_outcome_advantage(x["rewards"], x["scores"], x["mask"])),
        "otb": numbers(
            verl.compute_optimal_token_baseline_advantage(
                x["rewards"], (x["mask"].cumprod(1)), x["ids"].long().tolist(), x["logp"], x["sum_sq"]
            )
        ),
        "pass@k": numbers(
            verl.compute_grpo_passk_outcome_advantage(
                x["scores"].unsqueeze(1), x["mask"][:, :1], pairs["ids"].long().tolist(), config=config()
            )[0]
        ),
    }


def of_trl(x: dict) -> dict:
    """TRL's advantages, which it makes amid the scoring of completions: the lines from the rewards to them."""
    from trl import GRPOTrainer
    from trl.trainer.utils import nanstd

    whole = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    begin, end = whole.index("    unscorable_mask ="), whole.index("    # Slice to keep only the local part")
    code = compile(textwrap.dedent(whole[begin:end]), "trl", "exec")

    def made(rewards, group=4, scale="group", weights=WEIGHTS, how="normalize_then_sum"):
        weights = torch.tensor(weights[: rewards.shape[1]], dtype=rewards.dtype)
        trainer = SimpleNamespace(
            multi_objective_aggregation=how, scale_rewards=scale, reward_weights=weights, reward_funcs=weights
        )
        scope = {"torch": torch, "nanstd": nanstd, "self": trainer, "rewards_per_func": rewards.clone(),
                 "num_generations": group, "device": "cpu"}  # fmt: skip
        exec(code, scope)
        return numbers(scope["advantages"])

    one, plain = x["columns"][:, :1], {"weights": (1.0,), "how": "sum_then_normalize"}
    missing = x["columns"].clone()
    missing[2] = torch.nan
    return {
        "grpo": made(one, **plain),
        "dr_grpo": made(one, scale="none", **plain),
        "batch_std": made(one, scale="batch", **plain),
        "batch_std of one": made(one[:1], group=1, scale="batch", **plain),
        "gdpo": made(x["columns"]),
        "gdpo without the third": made(missing),
        "gdpo of one": made(x["columns"][:1], group=1),
    }


def of_torchrl(x: dict) -> dict:
    """torchrl's functions, which take [*, T, 1]."""
    from torchrl.objectives.value import functional as torchrl

    def wide(name):
        return x[name].unsqueeze(-1)

    done, terminated = wide("done").bool(), wide("terminated").bool()
    state = wide("values"), wide("next_values"), wide("rewards"), done, terminated
    found = {
        "gae": torchrl.generalized_advantage_estimate(0.97, 0.9, *state),
        "td_lambda": torchrl.td_lambda_return_estimate(0.97, 0.9, *state[1:]),
        "vtrace": torchrl.vtrace_advantage_estimate(0.97, wide("log_pi"), wide("log_mu"), *state),
        "reward2go": torchrl.reward2go(wide("rewards"), done, 0.97),
    }
    return {name: numbers([y.squeeze(-1) for y in (z if isinstance(z, tuple) else (z,))]) for name, z in found.items()}


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    sys.meta_path.append(Absent())
    x = inputs()
    found = {"inputs": {name: y.tolist() for name, y in x.items()}}
    for dtype in (torch.float32, torch.float64):
        cast = {name: y.to(dtype) for name, y in x.items()}
        trainers = (("trl", of_trl), ("verl", of_verl), ("torchrl", of_torchrl))
        found |= {f"{name} {dtype}": f(cast) for name, f in trainers}
    versions = {m: v for d in importlib.metadata.distributions(path=[sys.argv[1]]) for m, v in [(d.name, d.version)]}
    found["versions"] = {name: versions[name] for name in ("verl", "torchrl")}
    found["versions"]["trl"] = importlib.metadata.version("trl")
    OUT.write_text(json.dumps(found, indent=None, separators=(",", ":")).replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main()
