"""The law of the tree: an op has one name, which is its file on every floor; a file imports only downwards."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from bench import suite
from rlfast import backends, verify

ROOT = Path(__file__).resolve().parent.parent
OPS = tuple(backends.IMPLEMENTED)

# Where each backend keeps an op.
FILES = {
    "reference": ("rlfast/reference/{op}.py",),
    "torch": ("rlfast/fallback/{op}.py",),
    "cpu": ("rlfast/native/{op}.py", "csrc/cpu/{op}.cpp"),
    "triton": ("kernels/{op}.py",),
    "cuda": ("rlfast/native/{op}.py", "csrc/cuda/{op}.cu"),
}

# The floors; a module belongs to the longest prefix that it starts with, and imports only from its own floor or below.
FLOORS = {
    "rlfast": 3,  # the package: public names
    "rlfast.cli": 7,
    "rlfast.demo": 6,
    "rlfast.compare": 6,
    "rlfast.recipes": 5,
    "rlfast.recipes.command": 6,  # it trains on the demo's model and task
    "rlfast.recipes.tasks": 6,
    "rlfast.integrations": 5,
    "rlfast.rollout": 4,
    "rlfast.parity": 4,
    "rlfast.verify": 5,
    "rlfast.logps": 3,
    "rlfast.divergences": 3,
    "rlfast.advantages": 3,
    "rlfast.losses": 3,
    "rlfast.loss_outputs": 3,
    "rlfast.full_kl": 3,
    "rlfast.heads": 3,
    "rlfast.row_inputs": 3,
    "rlfast.distributed": 3,
    "rlfast.distributed.ranks": 1,
    "rlfast.distributed.gather": 2,
    "rlfast.distributed.groups": 2,
    "rlfast.distributed.merge": 2,
    "rlfast.distributed.pairs": 2,
    "rlfast.distributed.vocab": 2,
    "rlfast.policy_linear": 3,
    "rlfast.plans": 3,
    "rlfast.formulas": 3,
    "rlfast.loss_inputs": 3,
    "rlfast.loss_table": 3,
    "rlfast.corrections": 3,
    "rlfast.limits": 3,
    "rlfast.presets": 3,
    "rlfast.kl": 3,
    "rlfast.linear": 3,
    "rlfast.ranked": 3,
    "rlfast.attention": 3,
    "rlfast.values": 3,
    "rlfast.rewards": 3,
    "rlfast.judges": 3,
    "rlfast.embedding_rewards": 3,
    "rlfast.controllers": 3,
    "rlfast.sampling": 3,
    "rlfast.selections": 3,
    "rlfast.preference": 3,
    "rlfast.preference_inputs": 3,
    "rlfast.preference_linear": 3,
    "rlfast.preference_table": 3,
    "rlfast.preference_presets": 3,
    "rlfast.unpaired": 3,
    "rlfast.statistics": 3,
    "rlfast.weights": 3,
    "rlfast.reward_losses": 3,
    "rlfast.ops": 2,
    "rlfast.ops.records": 1,  # the arguments of a backend: what both sides of that seam speak
    "rlfast.ops.loss_records": 1,
    "rlfast.ops.preference_records": 1,
    "rlfast.ops.ranked_records": 1,
    "rlfast.ops.scan_records": 1,
    "rlfast.ops.divergence_records": 1,
    "rlfast.ops.group_records": 1,
    "rlfast.ops.attention_records": 1,
    "rlfast.ops.sample_records": 1,
    "rlfast.reductions": 1,
    "rlfast.fallback": 1,
    "rlfast.native": 1,
    "rlfast.kernels": 1,
    "rlfast.backends": 1,
    "rlfast.validate": 1,
    "rlfast._build_record": 0,
    "rlfast.reference": 0,
}
# Who reaches the oracle, apart from the tests.
READS_REFERENCE = ("rlfast.ops.oracle", "rlfast.verify", "rlfast.cli")


def modules() -> dict[str, Path]:
    """Every module of the package, the kernels among them, by its dotted name."""
    found = {}
    for folder, package in ((ROOT / "rlfast", "rlfast"), (ROOT / "kernels", "rlfast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> set[str]:
    """The modules of ours that a module imports anywhere in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*above, *filter(None, [node.module])))
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in MODULES else base)
    return {x for x in found if x == "rlfast" or x.startswith("rlfast.")}


def floor(name: str) -> int:
    prefixes = [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)]
    known = next((p for p in prefixes if p in FLOORS), None)
    assert known is not None and (known != "rlfast" or name == "rlfast"), f"{name} has no floor: add it to FLOORS"
    return FLOORS[known]


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_file_on_every_floor(op):
    wanted = [f"rlfast/ops/{op}.py", f"tests/test_{op}.py"]
    wanted += [file.format(op=op) for name in backends.IMPLEMENTED[op] for file in FILES[name]]
    missing = [file for file in wanted if not (ROOT / file).is_file()]
    assert not missing, f"{op}: no {missing}"
    assert any(case.op == op for case in suite.CASES), f"bench/suite.py has no case for {op}"
    assert verify.SUBJECTS.get(op), f"rlfast/verify has no subject for {op}"


def test_no_file_of_an_op_that_is_not_declared():
    """A kernel file that no backend claims is dead, or missing from ``backends.IMPLEMENTED``."""
    helpers = {"__init__", "lang", "leaves", "rows", "topk", "loss_rows", "loss_sums", "loss_stages", "surrogates"}
    helpers |= {
        "whiten",
        "pair",
        "shared_prefix",
        "records",
        "loss_records",
        "oracle",
        "oracle_loss",
        "preferences",
        "sequences",
    }
    for name, patterns in FILES.items():
        for pattern in patterns:
            folder, suffix = (ROOT / pattern).parent, Path(pattern).suffix
            stems = {path.stem for path in folder.glob(f"*{suffix}")} - helpers - {"dispatch"}
            for op in stems:
                shared = pattern.startswith("rlfast/native")
                claimed = name in backends.IMPLEMENTED.get(op, ()) or (
                    shared and "cpu" in backends.IMPLEMENTED.get(op, ())
                )
                assert claimed, f"{pattern.format(op=op)}: {op} is not an op of the {name} backend"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    mine = floor(name)
    for other in imports(name, MODULES[name]):
        if other == "rlfast":
            assert mine >= FLOORS["rlfast"], f"{name} (floor {mine}) imports the package from below"
        elif name != "rlfast":
            assert floor(other) <= mine, f"{name} (floor {mine}) imports {other} (floor {floor(other)})"


def test_the_reference_stands_apart():
    """It imports nothing of ours, and nothing of ours but the oracle's backend and ``verify`` reaches it."""
    for name, path in MODULES.items():
        if name.startswith("rlfast.reference"):
            outside = {x for x in imports(name, path) if not x.startswith("rlfast.reference")}
            assert not outside, f"{name} imports {outside}"
        elif not name.startswith(READS_REFERENCE):
            assert not any(x.startswith("rlfast.reference") for x in imports(name, path)), (
                f"{name} imports the reference"
            )


def test_the_fallback_does_not_need_triton_or_an_extension():
    for name, path in MODULES.items():
        if name.startswith("rlfast.fallback"):
            wrong = {x for x in imports(name, path) if x.startswith(("rlfast.kernels", "rlfast.native"))}
            wrong = {x for x in wrong if not x.startswith(("rlfast.kernels.formulas", "rlfast.kernels.lang"))}
            assert not wrong, f"{name} imports {wrong}"


def test_no_torch_in_the_sources():
    """One build serves every torch, since csrc/ sees raw pointers only."""
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh", ".inc")]
    assert sources
    for path in sources:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.match(r"\s*#\s*include\s*[<\"](torch|ATen|c10)", line), f"{path.relative_to(ROOT)}: {line}"


def test_the_environment_is_read_in_one_place():
    for name, path in MODULES.items():
        if name == "rlfast.backends":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            read = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
            assert not read, (
                f"{path.relative_to(ROOT)}:{node.lineno} reads the environment: rlfast/backends.py does that"
            )


def test_no_broad_except():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or (
                    isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
                )
                shown = {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)} & {"exception"}
                shown = shown or any(isinstance(inner, ast.Raise) for inner in ast.walk(node))  # logged, or passed on
                assert shown or not broad, f"{name}:{node.lineno}: a broad except hides failures"


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_functions_are_short(name):
    """Modules under 400 lines; functions under 60, kernels under 120."""
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, f"{name}: {len(text.splitlines())} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            length = node.end_lineno - body[0].lineno + 1
            limit = 120 if name.startswith("rlfast.kernels") else 60
            assert length <= limit, f"{name}.{node.name}: {length} lines, at most {limit}"
