"""make sanitize: the C++ kernels under ASan and UBSan, and the CUDA kernels where there is a GPU.

The stand-alone test csrc/tests runs every instruction set of this processor over the adversarial shapes, in buffers of
exact size, and the source of the CUDA kernels through csrc/tests/simt.h. Where nvidia-smi sees a GPU and
compute-sanitizer is installed, a short call of the real CUDA kernels runs under its memcheck, racecheck and synccheck.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time

from native_test import ROOT, build, load_setup, run

# -O1 keeps the time under three minutes; frame pointers name the line in a report.
SANITIZE = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
COMPUTE_SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")

CUDA_CALL = """
import torch, rlfast
with rlfast.use_backend("cuda"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, vocab in ((3, 50257), (2000, 1031)):
            x = torch.randn(rows, vocab, device="cuda", dtype=dtype, requires_grad=True)
            t = torch.randint(vocab, (rows, 2), device="cuda")
            out = rlfast.token_logps(x, t, outputs=("logp", "entropy", "is_top1"), top_k=5 if rows == 3 else None)
            (out.logp.sum() + out.entropy.sum()).backward()
            assert x.grad.isfinite().all()
        for name, rows, length in (("dapo", 3, 5003), ("gspo", 300, 1031)):
            x = (-torch.rand(rows, length, device="cuda")).to(dtype).requires_grad_()
            mask = torch.rand(rows, length, device="cuda") < 0.7
            out = rlfast.loss(name)(x, adv=torch.randn(rows, device="cuda"), old_logp=x.detach() + 0.1, mask=mask)
            out.loss.backward()
            assert x.grad.isfinite().all()
        for name, rows, length in (("ld_dpo", 3, 5003), ("simpo", 300, 31)):
            x = (-torch.rand(rows, length, device="cuda")).to(dtype).requires_grad_()
            y, mask = x.detach().flip(0), torch.rand(rows, length, device="cuda") < 0.7
            loss = rlfast.preference_loss(name)
            ref = {} if name == "simpo" else {"ref_chosen_logps": y, "ref_rejected_logps": x.detach()}
            loss(x, y, chosen_mask=mask, rejected_mask=mask.flip(0), **ref).loss.backward()
            single = rlfast.unpaired_loss("kto")
            single(x, mask[:, 0], ref_logps=y, mask=mask, shared=torch.zeros((), device="cuda")).loss.backward()
            assert x.grad.isfinite().all()
print("cuda kernels: done")
"""


def sanitize_cpu(plain: bool) -> None:
    """Builds and runs the stand-alone test; ``plain`` leaves the sanitizers out."""
    flags = ("-O2",) if plain else SANITIZE
    folder = ROOT / "build" / ("native_test" if plain else "sanitize")
    start = time.time()
    program = build(load_setup().find_compiler(), platform.machine().lower(), folder, flags, flags, flags)
    print(f"built in {time.time() - start:.0f} s", flush=True)
    # libgomp keeps its threads' memory to the end, which is no leak of ours
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    run([program, *(("large",) if plain else ())], env={**os.environ, **options})


def why_no_gpu() -> str | None:
    """Why compute-sanitizer cannot run here; None if it can."""
    if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode:
        return "nvidia-smi sees no GPU"
    if not shutil.which("compute-sanitizer"):
        return "compute-sanitizer is not on PATH (it comes with the CUDA toolkit)"
    return None


def sanitize_gpu() -> None:
    """A short call of the CUDA kernels under each tool of compute-sanitizer."""
    reason = why_no_gpu()
    if reason:
        print(f"CUDA kernels on a GPU: not run, {reason}")
        return
    for tool in COMPUTE_SANITIZER_TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", CUDA_CALL]
        run(command, cwd=ROOT, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="optimised, without sanitizers, a real vocabulary too")
    plain = parser.parse_args().plain
    sanitize_cpu(plain)
    if not plain:
        sanitize_gpu()


if __name__ == "__main__":
    main()
