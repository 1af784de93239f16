"""affine_scan and group_advantage: estimators over the tokens of a row, and over the answers to a prompt."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import rlfast
from bench import arms
from bench.baselines import advantages as baselines
from bench.case import Case, Target
from bench.draws import even, generator, normal
from rlfast import backends
from rlfast.reference import affine_scan as reference
from rlfast.reference.group_advantage import group_advantage as group_reference

GAMMA, LAM = 0.99, 0.95
OUTPUTS = ("advantages", "returns")


@dataclass(frozen=True, kw_only=True)
class Scan(Case):
    """GAE or V-trace of [rows, steps], no token masked; or GAE of as many packed rows of 8 … steps tokens."""

    op: str = "affine_scan"
    rows: int
    steps: int
    kind: str = "gae"  # "vtrace", "packed"

    BANDWIDTHS: ClassVar = ("move",)
    NAMES: ClassVar = {
        "eager": "the masked Python loop",
        "plain chunked": "a chunked matmul scan",
        "move": "the time to read and write its 17 bytes a token",
        "rlfast padded": "the time of as many padded tokens",
        "torchrl": "torchrl's vectorised GAE",
    }

    def small(self) -> Scan:
        return replace(self, rows=min(self.rows, 24), steps=min(self.steps, 300), budget_s=0.2)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        draw, shape = generator(device), (self.rows, self.steps)
        data = {}
        if self.kind == "packed":
            lengths = torch.randint(8, self.steps + 1, (self.rows,), generator=draw, device=device)
            data["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
            shape = (int(data["cu_seqlens"][-1]),)
        for name in ("rewards", "values") + (("log_ratio",) if self.kind == "vtrace" else ()):
            data[name] = normal(draw, *shape, dtype=torch.float32, scale=0.1 if name == "log_ratio" else 1.0)
        data["mask"] = torch.ones(shape, dtype=torch.bool, device=device)
        return data

    def _arm(self, function, names, data: dict, outputs=OUTPUTS):
        return arms.arm(function, {}, tuple(data[name] for name in names), outputs)

    def ours(self, data: dict) -> dict:
        rates = {"gamma": GAMMA, "lam": LAM}
        if self.kind == "vtrace":
            run = lambda r, v, w, m: rlfast.vtrace(r, v, w, m, **rates)  # noqa: E731
            return {"rlfast": self._arm(run, ("rewards", "values", "log_ratio", "mask"), data)}
        if self.kind == "gae":
            return {
                "rlfast": self._arm(lambda r, v, m: rlfast.gae(r, v, m, **rates), ("rewards", "values", "mask"), data)
            }
        names, rows = ("rewards", "values", "mask", "cu_seqlens"), self._as_many_padded(data)
        return {
            "rlfast": self._arm(lambda r, v, m, cu: rlfast.gae(r, v, m, cu_seqlens=cu, **rates), names, data),
            "rlfast padded": arms.arm(
                lambda r, v, m: rlfast.gae(r, v, m, **rates),
                {},
                tuple(rows[name] for name in names[:3]),
                ("padded", ""),
            ),
        }

    def _as_many_padded(self, data: dict) -> dict:
        """The same numbers as rows of one length."""
        rows = max(1, data["rewards"].shape[0] // self.steps)
        steps = min(self.steps, data["rewards"].shape[0])
        return {name: data[name][: rows * steps].view(rows, steps) for name in ("rewards", "values", "mask")}

    def plain(self, data: dict) -> dict:
        if self.kind == "vtrace":
            run = lambda r, v, w, m: baselines.vtrace_loop(r, v, w, m, GAMMA, LAM)  # noqa: E731
            return {"eager": self._arm(run, ("rewards", "values", "log_ratio", "mask"), data)}
        loop = lambda r, v, m: baselines.gae_loop(r, v, m, GAMMA, LAM)  # noqa: E731
        if self.kind == "packed":
            run = lambda r, v, cu: baselines.unpacked(baselines.gae_loop, r, v, cu, GAMMA, LAM)  # noqa: E731
            return {"eager": self._arm(run, ("rewards", "values", "cu_seqlens"), data)}
        counted = data | {"mask": data["mask"].float()}
        return {
            "eager": self._arm(loop, ("rewards", "values", "mask"), counted),
            "plain chunked": self._arm(
                lambda r, v: baselines.gae_chunked(r, v, GAMMA, LAM), ("rewards", "values"), data
            ),
        }

    def peers(self, data: dict, device: str) -> dict:
        if not arms.has("torchrl") or self.kind != "gae":
            return {}
        torchrl = importlib.import_module("torchrl.objectives.value.functional")
        following = torch.nn.functional.pad(data["values"][:, 1:], (0, 1)).unsqueeze(-1)
        done = torch.zeros_like(following, dtype=torch.bool)

        def run(rewards, values):
            r, v = rewards.unsqueeze(-1), values.unsqueeze(-1)
            out = torchrl.vec_generalized_advantage_estimate(GAMMA, LAM, v, following, r, done)
            return tuple(x.squeeze(-1) for x in out)

        return {"torchrl": self._arm(run, ("rewards", "values"), data)}

    def truth(self, data: dict) -> dict:
        if self.kind == "packed":
            return self._packed_truth(data)
        rows = even(self.rows, 8).to(data["rewards"].device)
        some = {name: data[name][rows].double() for name in data if name != "mask"}
        function = reference.vtrace if self.kind == "vtrace" else reference.gae
        return dict(zip(OUTPUTS, ((rows, x) for x in function(**some, gamma=GAMMA, lam=LAM)), strict=True))

    def _packed_truth(self, data: dict) -> dict:
        """Some of the packed rows, and as many of the padded ones."""
        at, found = [], []
        for row in even(self.rows, 8).tolist():
            part = torch.arange(int(data["cu_seqlens"][row]), int(data["cu_seqlens"][row + 1]))
            at.append(part)
            found.append(reference.gae(data["rewards"][part].double(), data["values"][part].double(),
                                       gamma=GAMMA, lam=LAM))  # fmt: skip
        padded = self._as_many_padded(data)
        few = reference.gae(padded["rewards"][:2].double(), padded["values"][:2].double(), gamma=GAMMA, lam=LAM)
        index, rows = torch.cat(at), torch.arange(len(few[0]))
        both = {name: (index, torch.cat([x[i] for x in found])) for i, name in enumerate(OUTPUTS)}
        return both | {"padded": (rows, few[0]), "": (rows, few[1])}

    def ceilings(self, data: dict, device: str) -> dict:
        """Rewards and values to two outputs that are there, and a read of the mask."""
        out = [torch.empty_like(data["rewards"]) for _ in OUTPUTS]
        mask = data["mask"]
        cpu = device == "cpu" and not backends.why_not("cpu")

        def move():
            for to, x in zip(out, (data["rewards"], data["values"]), strict=True):
                to.copy_(x)
            if cpu:
                backends.extension("cpu").read_bandwidth(mask.data_ptr(), mask.numel(), torch.get_num_threads())

        return {"move": move}

    def traffic(self, arm: str) -> int:
        """r, V and a byte of mask read, A and G written."""
        tokens = self.rows * (self.steps + 8) // 2 if self.kind == "packed" else self.rows * self.steps
        return tokens * (21 if self.kind == "vtrace" and arm != "move" else 17)


@dataclass(frozen=True, kw_only=True)
class Group(Case):
    """Rewards of groups of one size: normalised in their group."""

    op: str = "group_advantage"
    samples: int
    size: int

    OURS: ClassVar = ("rlfast", "rlfast ids")
    BANDWIDTHS: ClassVar = ()
    NAMES: ClassVar = {"eager": "the loop over a dict of lists", "plain scatter": "torch scatter code"}

    def small(self) -> Group:
        return replace(self, samples=min(self.samples, 512), budget_s=0.2)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        rewards = normal(generator(device), self.samples, dtype=torch.float32)
        return {"rewards": rewards, "ids": torch.arange(self.samples, device=device) // self.size}

    def ours(self, data: dict) -> dict:
        def by_size(rewards, ids):
            return rlfast.group_advantage(rewards, group_size=self.size)

        def by_ids(rewards, ids):
            return rlfast.group_advantage(rewards, group_ids=ids)

        return self._arms({"rlfast": by_size, "rlfast ids": by_ids}, data)

    def _arms(self, functions: dict, data: dict) -> dict:
        rest = (data["rewards"], data["ids"])
        return {name: arms.arm(function, {}, rest, ("advantages",)) for name, function in functions.items()}

    def plain(self, data: dict) -> dict:
        return self._arms(
            {
                "eager": lambda r, ids: baselines.group_loop(r, ids, 1e-4),
                "plain scatter": lambda r, ids: baselines.group_scatter(r, ids, 1e-4),
                "plain view": lambda r, ids: baselines.group_view(r, self.size, 1e-4),
            },
            data,
        )

    def truth(self, data: dict) -> dict:
        few = 64 * self.size
        found, _ = group_reference(data["rewards"][:few].double(), group_size=self.size, scale="std", eps=1e-4)
        return {"advantages": (torch.arange(len(found), device=found.device), found)}


SPEED = (
    Target("rlfast", "eager", 100.0),
    Target("rlfast", "torchrl", 5.0),
    Target("rlfast", "plain chunked", 8.0),
)
BYTES = Target("rlfast", "move", 2.0, "cost")
ON_GPU = (BYTES,)


def _scan(kind: str, rows: int, steps: int, *targets: Target, isas: bool = False) -> Scan:
    name = f"{'V-trace' if kind == 'vtrace' else 'GAE'} {'packed ' if kind == 'packed' else ''}{rows}×{steps}"
    return Scan(name=name, kind=kind, rows=rows, steps=steps, targets=targets, gpu_targets=ON_GPU, isas=isas)


CASES = (
    _scan("gae", 256, 8192, *SPEED, BYTES, isas=True),
    _scan("gae", 64, 1024, *SPEED, Target("rlfast", "", 60.0, "us")),
    _scan("gae", 64, 32768, *SPEED, BYTES),
    _scan("vtrace", 256, 8192, Target("rlfast", "eager", 50.0), isas=True),
    _scan("vtrace", 64, 1024, Target("rlfast", "eager", 50.0)),
    _scan("vtrace", 64, 32768, Target("rlfast", "eager", 50.0)),
    _scan("packed", 4096, 4096, Target("rlfast", "rlfast padded", 1.2, "cost"), isas=True),
    Group(
        name="group_advantage 65536 rewards in groups of 8", samples=65536, size=8,
        targets=(Target("rlfast", "eager", 20.0), Target("rlfast ids", "eager", 20.0),
                 Target("rlfast ids", "plain scatter", 2.0), Target("rlfast", "plain", 2.0)),
    ),
)  # fmt: skip
