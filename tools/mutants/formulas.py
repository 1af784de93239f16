"""Mistakes in every formula: its last sum with the other sign, its last product without a factor.

A new formula is covered as soon as it is written.
"""

from __future__ import annotations

import ast
from pathlib import Path

from mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
# The module, and the tests of its formulas; where a test's id has the formula's name, those with that name.
MODULES = {
    "choice": "every_link",
    "pair": "every_link",
    "anchored": "every_link",
    "reward": "every_link",
    "score": "every_score",
    "unpaired": "every_link",
    "token": "every_surrogate",
    "value": "every_surrogate",
    "kl": "every_estimator",
}
SWAPPED = {ast.Add: "-", ast.Sub: "+"}


def formulas(tree: ast.Module) -> list[ast.FunctionDef]:
    """The functions under ``@jit``."""
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "jit" for d in node.decorator_list)
    ]


def last(function: ast.FunctionDef, kinds: tuple) -> ast.BinOp | None:
    """The binary operation of these kinds that begins last in the text."""
    found = [n for n in ast.walk(function) if isinstance(n, ast.BinOp) and isinstance(n.op, kinds)]
    return max(found, key=lambda n: (n.lineno, n.col_offset), default=None)


def changed(text: str, node: ast.BinOp) -> str:
    """The operation with a mistake in it."""
    left, right = (ast.get_source_segment(text, x) for x in (node.left, node.right))
    if type(node.op) in SWAPPED:
        right = f"({right})" if isinstance(node.right, ast.BinOp) and type(node.right.op) in SWAPPED else right
        return f"({left} {SWAPPED[type(node.op)]} {right})"
    return f"({left})"


def of_module(name: str, tests: str) -> list[Mutant]:
    """The mutants of one module of formulas."""
    file = f"kernels/formulas/{name}.py"
    text = (ROOT / file).read_text()
    found = []
    for function in formulas(ast.parse(text)):
        whole = ast.get_source_segment(text, function)
        for kinds in (tuple(SWAPPED), (ast.Mult,)):
            node = last(function, kinds)
            if node is None:
                continue
            old = ast.get_source_segment(text, node)
            at = offset(text, node) - offset(text, function)
            marked = f"{whole[:at]}«{old}»{whole[at + len(old) :]}"
            named = name == "kl" or any(argument.arg == "h" for argument in function.args.args)
            which = f"{tests} and {function.name}" if named else tests  # a helper has tests of its callers
            found.append(Mutant("torch", file, marked, changed(text, node), which))
    return found


def offset(text: str, node: ast.AST) -> int:
    """Where a node begins, in characters."""
    lines = text.splitlines(keepends=True)
    line = lines[node.lineno - 1].encode()[: node.col_offset].decode()
    return sum(map(len, lines[: node.lineno - 1])) + len(line)


FORMULAS = [mutant for name, tests in MODULES.items() for mutant in of_module(name, tests)]
