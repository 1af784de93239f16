"""A small room with a goal, and how it reads: the environment of the recipes in which an LLM helps an agent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from rlfast import validate

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # row, column
ACTIONS = (" up", " down", " left", " right")


class Play(NamedTuple):
    """Episodes of T steps at most; what comes after the goal does not count."""

    cells: torch.Tensor  # int64 [B, T + 1]: where the agent was
    goal: torch.Tensor  # int64 [B]
    actions: torch.Tensor  # int64 [B, T]
    logp: torch.Tensor  # [B, T]: of the actions, when they were drawn
    rewards: torch.Tensor  # [B, T]: 1 at the goal
    mask: torch.Tensor  # bool [B, T]: steps that were taken
    reached: torch.Tensor  # bool [B]


@dataclass(frozen=True)
class GridWorld:
    """A room of size × size cells, numbered row by row, in which an agent moves to a goal.

    Args:
        size: cells of a side, ≥ 2.
        horizon: steps of an episode at most.

    Raises:
        ValueError, TypeError: one of them is no such int.
    """

    size: int = 3
    horizon: int = 5

    def __post_init__(self):
        for name, x, least in (("size", self.size, 2), ("horizon", self.horizon, 1)):
            if isinstance(x, bool) or not isinstance(x, int) or x < least:
                kind = ValueError if isinstance(x, int) else TypeError
                validate.fail(name, f"an int ≥ {least}", repr(x), kind)

    @property
    def count(self) -> int:
        """Cells."""
        return self.size**2

    def move(self, cells: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """The cells after some actions; who walks into a wall stays."""
        steps = torch.tensor(MOVES)[actions]
        rows = (cells // self.size + steps[..., 0]).clamp(0, self.size - 1)
        return rows * self.size + (cells % self.size + steps[..., 1]).clamp(0, self.size - 1)

    def starts(self, count: int, rng: torch.Generator, corner: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(cells, goals) [count]: anywhere, but apart. ``corner``: all goals are in the last cell, so that to go for
        the goal and to go for the corner is the same, which is how an agent comes to learn the wrong one."""
        cells = torch.randint(self.count, (count,), generator=rng)
        goal = torch.full_like(cells, self.count - 1) if corner else torch.randint(self.count, (count,), generator=rng)
        return torch.where(cells == goal, (cells + 1) % self.count, cells), goal

    def features(self, cells: torch.Tensor, goal: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[*, 2·cells]: one 1 where the agent is, another where the goal is."""
        both = torch.stack((cells, goal.expand_as(cells)), -1)
        return torch.nn.functional.one_hot(both, self.count).flatten(-2).to(dtype)

    def play(self, policy, cells: torch.Tensor, goal: torch.Tensor, rng: torch.Generator) -> Play:
        """One episode from each start. ``policy`` gives log π [B, actions] of cells and goals."""
        found, alive = [], torch.ones_like(cells, dtype=torch.bool)
        places = [cells]
        for _ in range(self.horizon):
            with torch.no_grad():
                logp = policy(cells, goal)
            actions = torch.multinomial(logp.exp(), 1, generator=rng)
            cells = torch.where(alive, self.move(cells, actions[:, 0]), cells)
            there = alive & (cells == goal)
            found.append((actions[:, 0], logp.gather(1, actions)[:, 0], there.to(logp.dtype), alive))
            places.append(cells)
            alive = alive & ~there
        return Play(torch.stack(places, 1), goal, *(torch.stack(x, 1) for x in zip(*found, strict=True)), ~alive)

    def state_text(self, cell: int, goal: int) -> str:
        """A state as an LLM reads it; ``ACTIONS`` are the answers."""
        return f"You are at {self._at(cell)}. The goal is at {self._at(goal)}. Go"

    def play_text(self, play: Play, row: int) -> str:
        """An episode as an LLM reads it."""
        steps = int(play.mask[row].sum())
        return " ".join(self._at(int(c)) for c in play.cells[row, : steps + 1])

    def goal_text(self, goal: int) -> str:
        """What an episode was for."""
        return f"Reach {self._at(goal)}."

    def _at(self, cell: int) -> str:
        return f"{cell // self.size},{cell % self.size}"
