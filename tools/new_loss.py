"""The outline of a new loss, in its three places: a formula, a row, an oracle.

python tools/new_loss.py NAME        (or: rlfast new-loss NAME)

What it writes is red until it is right: the oracle raises, and the formula is that of REINFORCE.
"""

from __future__ import annotations

import keyword
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORMULA = '''

class {Hyper}(NamedTuple):
    """What its numbers are."""

    eps: float = 0.2


@jit
def {name}(t: Token, h: {Hyper}):
    """ℓ = −A·log p.

    ∂ℓ/∂log p = −A. arXiv ????.?????.
    """
    return -t.adv * t.logp, 0.0, -t.adv, 0.0
'''
ROW = '    _row("{name}", "{name}", "????.?????"),\n'
ORACLE = '''

def {name}(t, eps=0.2):
    """arXiv ????.?????: as the paper writes it, with ``.detach()`` for a stop-gradient; bounds go into ``BOUNDS``."""
    raise NotImplementedError("{name}: the oracle")
'''


def planned(name: str, root: Path = ROOT) -> dict[Path, str]:
    """{file: its new text}.

    Raises:
        ValueError: the name is not one, or there is such a loss.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"name: expected lower-case letters, digits and _, got {name!r}")
    token, table = root / "kernels" / "formulas" / "token.py", root / "rlfast" / "loss_table.py"
    oracle = root / "rlfast" / "reference" / "surrogates.py"
    texts = {path: path.read_text(encoding="utf-8") for path in (token, table, oracle)}
    if re.search(rf"^def {name}\(", texts[token], re.MULTILINE) or f'_row("{name}"' in texts[table]:
        raise ValueError(f"name: expected a new one, got {name!r}, which is in the table or among the formulas")
    words = {"name": name, "Hyper": "".join(part.capitalize() for part in name.split("_"))}
    before, end, after = texts[table].partition(")  # fmt: skip\n\n\ndef loss(")
    first, mark, rest = texts[oracle].partition("\n\n\ndef kl_estimate(")
    return {
        token: texts[token].rstrip("\n") + "\n" + FORMULA.format(**words),
        table: before + ROW.format(**words) + end + after,
        oracle: first + "\n" + ORACLE.format(**words).rstrip("\n") + mark + rest,
    }


def main(name: str) -> int:
    """Write the outline, and print the formula as C++."""
    try:
        plan = planned(name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path, text in plan.items():
        path.write_text(text, encoding="utf-8")
        print(f"outlined in {path.relative_to(ROOT)}")
    subprocess.run([sys.executable, str(ROOT / "tools" / "emit_cpp.py")], check=True)
    print("then: pip install -e . --no-build-isolation, and docs/add_a_loss.md")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    sys.exit(main(sys.argv[1]))
