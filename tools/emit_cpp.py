"""Print the formulas of ``kernels/formulas`` as C++: ``csrc/rlfast/formulas.gen.h``.

python tools/emit_cpp.py [--check]

Each ``@jit`` function becomes a template over V, a vector on the CPU and a float on a GPU; each NamedTuple of
hyper-parameters a struct of floats. A formula is assignments of expressions and one return: nothing else is printed.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "csrc" / "rlfast" / "formulas.gen.h"
# Modules in the order in which they are printed: the record of a formula's values, and the table that lists it.
MODULES = {
    "token": ("Surrogate", "SURROGATE"),
    "value": ("Surrogate", "SURROGATE"),
    "kl": ("Estimate", "KL"),
    "score": ("Score", "SCORE"),
    "choice": ("PairLoss", "PAIR"),
    "pair": ("PairLoss", "PAIR"),
    "anchored": ("PairLoss", "PAIR"),
    "reward": ("PairLoss", "PAIR"),
    "unpaired": ("SingleLoss", "SINGLE"),
}
GIVEN = ("Token", "Response", "Pair", "Single")  # records that csrc/rlfast/formulas.h writes by hand
WORDS = {"minimum": "minimum", "maximum": "maximum", "where": "select", "abs": "absolute_value", "log": "log"}
BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.BitAnd: "&", ast.BitOr: "|"}
COMPARE = {ast.Gt: ">", ast.GtE: ">=", ast.Lt: "<", ast.LtE: "<=", ast.Eq: "==", ast.NotEq: "!="}


class Formula:
    """One ``@jit`` function as a C++ template."""

    def __init__(self, node: ast.FunctionDef, record: str, constants: dict[str, float], templates: set[str]):
        self.node, self.record, self.constants, self.templates, self.known = node, record, constants, templates, set()

    def hyper(self) -> str | None:
        """The type of the hyper-parameters of a formula that a kernel calls; None for a helper."""
        named = {a.arg: a.annotation.id for a in self.node.args.args if a.annotation}
        return named.get("h") if self.node.args.args[-1].arg == "h" and len(self.node.args.args) == 2 else None

    def signature(self) -> str:
        types = {None: "V"} | {name: f"const {name}<V>&" for name in GIVEN}
        pairs = ((a.arg, a.annotation.id if a.annotation else None) for a in self.node.args.args)
        parts = ", ".join(f"{types.get(kind, f'const {kind}&')} {name}" for name, kind in pairs)
        return f"template <class V>\nRLFAST_FORMULA auto {self.node.name}({parts})"

    def text(self) -> str:
        self.known = {a.arg for a in self.node.args.args}
        doc, *body = self.node.body
        lines = [f"// {line.strip()}" for line in doc.value.value.splitlines() if line.strip()]
        lines.append(self.signature() + " {")
        # a formula without hyper-parameters still takes them, so that every one is called alike
        unused = [a.arg for a in self.node.args.args if not self.reads(body, a.arg)]
        lines += [f"  (void){name};" for name in unused]
        lines += [f"  {line}" for statement in body for line in self.statement(statement)]
        return "\n".join([*lines, "}"])

    def reads(self, body, name: str) -> bool:
        return any(isinstance(n, ast.Name) and n.id == name for statement in body for n in ast.walk(statement))

    def statement(self, node) -> list[str]:
        if isinstance(node, ast.Return):
            if isinstance(node.value, ast.Tuple):
                values = ", ".join(self.expression(x) for x in node.value.elts)
                return [f"return {self.record}<V>{{{values}}};"]
            return [f"return {self.expression(node.value)};"]
        if not isinstance(node, ast.Assign):
            raise SyntaxError(f"{self.node.name}: a formula has assignments and a return, got {ast.unparse(node)}")
        target, value = node.targets[0], node.value
        pairs = zip(target.elts, value.elts, strict=True) if isinstance(target, ast.Tuple) else [(target, value)]
        lines = [f"{'' if n.id in self.known else 'auto '}{n.id} = {self.expression(x)};" for n, x in pairs]
        self.known |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
        return lines

    def expression(self, node) -> str:
        if isinstance(node, ast.Constant):
            return f"{float(node.value)!r}f"
        if isinstance(node, ast.Name):
            return f"{self.constants[node.id]!r}f" if node.id in self.constants else node.id
        if isinstance(node, ast.Attribute):
            return f"{node.value.id}.{node.attr}"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return f"-{self.expression(node.operand)}"
        if isinstance(node, ast.BinOp):
            return f"({self.expression(node.left)} {BINARY[type(node.op)]} {self.expression(node.right)})"
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return f"({self.expression(node.left)} {COMPARE[type(node.ops[0])]} {self.expression(node.comparators[0])})"
        if isinstance(node, ast.Call):
            name = WORDS[node.func.attr] if isinstance(node.func, ast.Attribute) else node.func.id
            arguments = ", ".join(self.expression(x) for x in node.args)
            return f"{name}{'<V>' if name in self.templates else ''}({arguments})"
        raise SyntaxError(f"{self.node.name}: no C++ for {ast.unparse(node)}")


def struct(node: ast.ClassDef) -> str:
    """A NamedTuple of floats as a struct."""
    doc = node.body[0].value.value.splitlines()[0]
    fields = "\n".join(f"  float {x.target.id};" for x in node.body if isinstance(x, ast.AnnAssign))
    return f"// {doc}\nstruct {node.name} {{\n{fields}\n}};"


def emit() -> str:
    """The whole header."""
    parts, constants, templates = [], {}, {"select"}
    rows = {table: [] for _, table in MODULES.values()}
    for module, (record, table) in MODULES.items():
        tree = ast.parse((ROOT / "kernels" / "formulas" / f"{module}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("tl.constexpr("):
                constants[node.targets[0].id] = float(ast.literal_eval(node.value.args[0]))
            elif isinstance(node, ast.ClassDef) and node.name not in GIVEN:
                parts.append(struct(node))
            elif isinstance(node, ast.FunctionDef):
                formula = Formula(node, record, constants, templates)
                parts.append(formula.text())
                templates.add(node.name)
                if formula.hyper():
                    rows[table].append(f"X({node.name}, {formula.hyper()})")
    tables = [
        f"// X(formula, hyper-parameters)\n#define RLFAST_{kind}_FORMULAS(X) \\\n  " + " \\\n  ".join(found)
        for kind, found in rows.items()
    ]
    head = "// Printed by tools/emit_cpp.py from kernels/formulas: change those.\n// clang-format off\n#pragma once\n"
    open_, close = "RLFAST_FORMULAS_BEGIN", "RLFAST_FORMULAS_END"
    return "\n\n".join([head + '#include "formulas.h"', open_, *parts, close, *tables]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the header is fresh")
    if parser.parse_args().check:
        return 0 if TARGET.exists() and TARGET.read_text(encoding="utf-8") == emit() else 1
    TARGET.write_text(emit(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
