"""Plant mistakes in the formulas and kernels, one at a time: the tests must notice every one.

    python tools/mutate.py            all (three quarters of an hour on 2 cores)
    python tools/mutate.py --quick    every third
    python tools/mutate.py --only triton
    python tools/mutate.py --match scan_whiten    those whose file or text has these characters; that the tests pass
                                                  without a mistake is taken for granted

Everything happens in temporary copies of the tree. The C++ mutants are compiled once, all together: each is an
expression that a variable of the process chooses; the CUDA ones too, in the C++ test program. What survives is
listed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutants import CPP, CUDA, PYTHON
from mutants.mutant import Mutant

LIMIT_S = 1200  # a mutant that loops for ever is killed
ROOT = Path(__file__).resolve().parent.parent
SWITCH = "RLFAST_MUTANT"
OPS = ("tests/test_token_logps.py", "tests/test_linear_token_logps.py", "tests/test_token_loss.py")
# The tests of a mutant whose file is of another family: the first word that its path holds.
FAMILIES = {
    "trl_divergence": ("tests/test_integrations_trl_divergence.py", "tests/test_integrations_trl_zero3.py"),
    "ops/linear_loss": ("tests/test_linear_preference_loss.py",),
    "policy_linear": tuple(f"tests/test_{x}.py" for x in ("linear_policy_loss", "full_kl", "lora_head")),
    "full_kl": ("tests/test_full_kl.py",),
    "lora": ("tests/test_lora_head.py",),
    "known_gradients": ("tests/test_accumulated_grad.py",),
    "rlfast/preference.py": ("tests/test_linear_preference_loss.py", "tests/test_preference.py"),
    "rlfast/preference": ("tests/test_linear_preference_loss.py",),
    "unpaired": ("tests/test_unpaired_loss.py",),
    **dict.fromkeys(
        (
            "pair_loss",
            "formulas/pair",
            "formulas/choice",
            "formulas/anchored",
            "formulas/reward",
            "formulas/score",
            "preferences.py",
        ),
        ("tests/test_pair_loss.py",),
    ),
    **dict.fromkeys(
        ("sequence_sums", "preference_tile", "fallback/sequences"),
        ("tests/test_pair_loss.py", "tests/test_unpaired_loss.py"),
    ),
    **dict.fromkeys(("pair_", "divergence"), ("tests/test_divergence.py", "tests/test_linear_divergence.py")),
    **dict.fromkeys(
        ("formulas/token", "formulas/value", "formulas/kl", "token_loss.py", "loss_rows", "loss_sums"),
        ("tests/test_token_loss.py",),
    ),
    "group": ("tests/test_group_advantage.py",),
    **dict.fromkeys(("cpu/linear.cpp", "/linear.py"), ("tests/test_linear.py",)),
    "response_sums": ("tests/test_ranked_rows.py",),
    "ranked": ("tests/test_ranked_loss.py", "tests/test_ranked_rows.py"),
    "formula_vec": ("tests/test_token_loss.py", "tests/test_ranked_loss.py"),
    "scan": ("tests/test_affine_scan.py",),
    **dict.fromkeys(("sampl", "rlfast/noise.h", "formulas/noise"), ("tests/test_sample.py",)),
    **dict.fromkeys(("kernels/rows", "kernels/whiten"), ("tests/test_affine_scan.py",)),
    "attention": ("tests/test_paged_attention.py",),
    "trl_grpo": ("tests/test_integrations_trl_grpo.py",),
    "trl_head": tuple(f"tests/test_integrations_trl{x}.py" for x in ("_zero3", "", "_grpo", "_dpo")),
    "trl_mixins": ("tests/test_integrations_trl_mixins.py",),
    **dict.fromkeys(
        ("trl_preference", "trl_outputs", "trl_dpo"),
        tuple(f"tests/test_integrations_trl_{x}.py" for x in ("preference", "dpo", "zero3")),
    ),
}
SLOW = "not (isa or 2_31 or seventy or 151669 or 50257 or 32003 or 256k or twenty or tile or many_rows"
SLOW += " or million or hundred_thousand or segments or compiled or opcheck)"

# How each kind is tested: pytest's arguments, and the environment.
RUNS = {
    "torch": ((*OPS, "--backend", "torch", "-k", SLOW), {}),
    "ops": ((*OPS, "--backend", "torch", "-k", SLOW), {}),
    "validate": (("tests/test_validate.py",), {}),  # not with --backend, which leaves out what does not depend on it
    "cpp": ((*OPS, "--backend", "cpu", "-k", SLOW), {}),
    "cuda": ((), {}),  # the C++ test program
    "triton": ((*OPS, "--backend", "triton", "-k", SLOW), {"TRITON_INTERPRET": "1"}),
    "ranks": ((*(f"tests/test_vocab_{x}.py" for x in ("parallel", "layouts", "losses")), "-k", SLOW), {}),
    "sampling": (("tests/test_sample.py", "-k", "penalties or named"), {}),
    "trl": (("tests/test_integrations_trl.py", "tests/test_integrations_trl_preference.py"), {}),
    "rollout": (
        (
            *(f"tests/test_rollout{x}.py" for x in ("_pages", "", "_faults", "_training", "_families", "_parallel")),
            "-x",
        ),
        {},
    ),
    "preference": (("tests/test_preference.py", "tests/test_reward_losses.py", "tests/test_weights.py"), {}),
    "data_parallel": (tuple(f"tests/test_distributed_{x}.py" for x in ("losses", "data", "faults")), {}),
    "context_parallel": (("tests/test_distributed_context.py",), {}),
    "advantages": (("tests/test_advantages.py", "tests/test_affine_scan.py::test_n_step_returns"), {}),
}


def files_of(mutant: Mutant, arguments: tuple) -> tuple:
    """pytest's arguments with the test files of the mutant's family."""
    files = next((files for word, files in FAMILIES.items() if word in mutant.file), None)
    if files is None or (arguments[: len(OPS)] != OPS and mutant.kind != "trl"):
        return arguments
    return (*files, *(x for x in arguments if not x.startswith("tests/")))


def copy_of_tree(target: Path) -> Path:
    """What a commit of this tree would hold, and the built extensions."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    built = [
        str(path.relative_to(ROOT)) for path in (*(ROOT / "rlfast").glob("*.so"), ROOT / "rlfast" / "_build_record.py")
    ]
    for name in (*listed, *built):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def replaced(text: str, mutant: Mutant, new: str) -> str:
    """The text with the mutant's one occurrence of ``old`` replaced; the table is wrong if there is not exactly one."""
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.file}: {text.count(mutant.old)} occurrences of {mutant.old!r}, expected 1: mend tools/mutants/"
        )
    return text.replace(mutant.old, new)


def plant_cpp(tree: Path) -> None:
    """Every C++ mutant, as ``(mutant(i) ? wrong : right)``, and one instruction set, to compile once and quickly."""
    declared = tree / "csrc" / "rlfast" / "token_logps.h"
    function = (
        "#include <cstdlib>\nnamespace rlfast {\ninline bool mutant(int i) {\n"
        f'  static const int chosen = std::atoi(std::getenv("{SWITCH}") ? std::getenv("{SWITCH}") : "0");\n'
        "  return chosen == i;\n}\n}  // namespace rlfast\n"
    )
    declared.write_text(declared.read_text().replace("#pragma once\n", "#pragma once\n" + function, 1))
    for number, mutant in enumerate((*CPP, *CUDA), 1):
        path = tree / mutant.file
        text = path.read_text()
        before, old, after = mutant.parts()
        new = f"{before}(mutant({number}) ? ({mutant.new}) : ({old})){after}"
        path.write_text(replaced(text, mutant, new))
    setup = tree / "setup.py"
    text = setup.read_text()
    setup.write_text(re.sub(r'^        "(avx512|avx512_bf16)": .*\n', "", text, flags=re.MULTILINE))


def build(tree: Path) -> None:
    environment = os.environ | {"RLFAST_BUILD_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode or "_cpu: built" not in done.stdout + done.stderr:
        raise SystemExit(f"the C++ mutants do not compile:\n{done.stderr[-4000:]}")


def build_program(tree: Path) -> None:
    """The C++ test program with every CUDA mutant in it."""
    code = (
        "import native_test, pathlib, platform\n"
        "native_test.build(['g++'], platform.machine(), pathlib.Path('program'), ('-O1',), ('-O1',))"
    )
    environment = os.environ | {"PYTHONPATH": str(tree / "tools")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the CUDA mutants do not compile:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def run(command: list, **options) -> subprocess.CompletedProcess | None:
    """The process; None if it had to be ended."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, **options)
    except subprocess.TimeoutExpired:
        return None


def test_program(tree: Path, number: int) -> tuple[bool, str]:
    """(whether the CUDA kernels pass under simt.h, the first line that says why not)."""
    command = [str(tree / "program" / "test_kernels"), "simt", "first"]
    done = run(command, env=os.environ | {SWITCH: str(number)})
    if done is None:
        return False, "does not end"
    why = next((line for line in (done.stdout + done.stderr).splitlines() if "checks" not in line), "")
    return done.returncode == 0, why[:110]


def test(tree: Path, mutant: Mutant | None, kind: str, number: int = 0) -> tuple[bool, str]:
    """(whether the tests of this kind pass, the first line that says why not)."""
    if kind == "cuda":
        return test_program(tree, number)
    arguments, extra = RUNS[kind]
    if mutant is not None:
        arguments = files_of(mutant, arguments)
    if mutant is not None and mutant.tests:
        arguments = (*arguments[: arguments.index("-k")], "-k", f"({mutant.tests}) and {SLOW}")
    environment = os.environ | extra | {SWITCH: str(number), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *arguments, "-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    done = run(command, cwd=tree, env=environment)
    if done is None:
        return False, "does not end"
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest itself failed on {mutant}:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    why = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    return done.returncode == 0, why.removeprefix("FAILED ")[:110]


def try_compiled(tree: Path, number: int) -> tuple[Mutant, bool, str]:
    mutant = (*CPP, *CUDA)[number - 1]
    survived, why = test(tree, mutant, mutant.kind, number)
    return mutant, survived, why


def try_python(mutant: Mutant) -> tuple[Mutant, bool, str]:
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = copy_of_tree(Path(folder))
        path = tree / mutant.file
        path.write_text(replaced(path.read_text(), mutant, mutant.new))
        survived, why = test(tree, mutant, mutant.kind)
        return mutant, survived, why


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every third mutant")
    parser.add_argument("--only", choices=tuple(RUNS), help="one kind")
    parser.add_argument("--match", action="append", help="those whose file or text has these characters (repeatable)")
    options = parser.parse_args()
    step = 3 if options.quick else 1

    def chosen(mutant: Mutant) -> bool:
        found = not options.match or any(text in str(mutant) for text in options.match)
        return found and options.only in (None, mutant.kind)

    python = [m for m in PYTHON if chosen(m)][::step]
    compiled = [i for i, m in enumerate((*CPP, *CUDA), 1) if chosen(m)][::step]
    start, survivors = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        tree = copy_of_tree(Path(folder))
        kinds = {m.kind for m in python} | {(*CPP, *CUDA)[i - 1].kind for i in compiled}
        if compiled:
            plant_cpp(tree)
        if "cuda" in kinds:
            build_program(tree)
        if "cpp" in kinds:
            build(tree)
        unplanted = {kind: pool.submit(test, tree, None, kind) for kind in sorted(kinds) if not options.match}
        for kind, future in unplanted.items():
            passed, why = future.result()
            if not passed:
                raise SystemExit(f"{kind}: the tests fail with no mutant planted: {why}")
        tried = [pool.submit(try_compiled, tree, number) for number in compiled]
        tried += [pool.submit(try_python, mutant) for mutant in python]
        for done, future in enumerate(tried, 1):
            mutant, survived, why = future.result()
            print(f"[{done}/{len(tried)}] {'SURVIVED' if survived else 'killed  '} {mutant}  {why}", flush=True)
            survivors += [mutant] * survived
    print(f"{len(tried) - len(survivors)} of {len(tried)} mutants killed in {time.monotonic() - start:.0f} s")
    for mutant in survivors:
        print(f"survived: {mutant}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
