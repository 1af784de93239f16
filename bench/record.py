"""Write down that a backend passed its tests somewhere that ``bench.run`` does not reach, for the support matrix.

python -m bench.record bench/results/arm.json --device "aarch64 under qemu-user" --backend cpu --command "make test-arm"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.run import stamp
from rlfast import backends


def main() -> None:
    """Stamp and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--backend", required=True, choices=backends.NAMES)
    parser.add_argument("--command", required=True)
    args = parser.parse_args()
    ops = [op for op, names in backends.IMPLEMENTED.items() if args.backend in names]
    head = {**stamp("cpu", args.command), "device": args.device}
    head["machine"] = {"system": args.device}
    passed = [{"op": op, "backend": args.backend, "status": "ok", "device": "cpu"} for op in ops]
    args.path.write_text(json.dumps({**head, "verify": passed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
