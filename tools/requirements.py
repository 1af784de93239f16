"""Print what extras of the installed rlfast ask for, one requirement a line: they are installed without building again.

.venv/bin/python tools/requirements.py demo trl
"""

import importlib.metadata
import re
import sys

EXTRA = re.compile(r"""\s*(?:and\s+)?extra\s*==\s*['"]([^'"]+)['"]""")


def of(extras):
    """Requirement strings of these extras, those that name rlfast's own extras resolved."""
    found = []
    for line in importlib.metadata.requires("rlfast") or ():
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        extra = EXTRA.search(marker)
        if extra is None or extra[1] not in extras:
            continue
        name, _, inner = requirement.partition("[")
        rest = EXTRA.sub("", marker).strip(" ()")
        if name == "rlfast":
            found += of(inner.rstrip("]").replace(" ", "").split(","))
        else:
            found.append(requirement + ("; " + rest if rest else ""))
    return sorted(set(found))


if __name__ == "__main__":
    print("\n".join(of(sys.argv[1:])))
