"""A planted mistake: a file, what stands there, what is put in its place, and perhaps which tests.

In ``old``, «…» marks the expression that changes, where it alone would occur more than once.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One planted mistake."""

    kind: str  # a key of mutate.RUNS
    file: str
    marked: str
    changed: str
    tests: str = ""  # a pytest -k expression; empty: all of the kind

    def parts(self) -> tuple[str, str, str]:
        """(before, the expression, after) of what stands in the file."""
        if "«" not in self.marked:
            return "", self.marked, ""
        before, rest = self.marked.split("«")
        old, after = rest.split("»")
        return before, old, after

    @property
    def old(self) -> str:
        return "".join(self.parts())

    @property
    def new(self) -> str:
        before, _, after = self.parts()
        return self.changed if self.kind in ("cpp", "cuda") else before + self.changed + after

    def __str__(self) -> str:
        return f"{self.file}: {self.parts()[1].strip()} → {self.changed.strip() or 'nothing'}"


def cpp(file: str, *rows) -> list[Mutant]:
    """Mutants of a C++ file of the CPU."""
    return [Mutant("cpp", file, *row) for row in rows]


def cuda(file: str, *rows) -> list[Mutant]:
    """Mutants of a CUDA file."""
    return [Mutant("cuda", file, *row) for row in rows]


def python(kind: str, file: str, *rows) -> list[Mutant]:
    """Mutants of a Python file."""
    return [Mutant(kind, file, *row) for row in rows]
