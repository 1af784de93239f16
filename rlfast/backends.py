"""Which implementation of an op runs, and why another does not.

An op has up to five implementations, each in the module named after the op on that floor:

    reference   rlfast/reference/<op>.py   the oracle: plain PyTorch, autograd only
    torch       rlfast/fallback/<op>.py    plain PyTorch, chunked; runs wherever torch runs
    cpu         rlfast/native/<op>.py      C++ SIMD kernels (rlfast._cpu)
    triton      rlfast/kernels/<op>.py     Triton kernels; the interpreter runs them on CPU tensors
    cuda        rlfast/native/<op>.py      CUDA C++ kernels (rlfast._cuda)

``use_backend`` is the only switch. It is scoped, and fails with the reason for a backend that is not there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from contextvars import ContextVar

import torch

NAMES = ("reference", "torch", "cpu", "triton", "cuda")

# What each op has, and the order in which it is tried per device type. Triton before CUDA C++: it is the one that the
# interpreter tests on every machine; a measured ratio on a GPU is what would change the order.
IMPLEMENTED = {
    "token_logps": ("reference", "torch", "cpu", "triton", "cuda"),
    "linear_token_logps": ("reference", "torch", "cpu", "triton"),
    "divergence": ("reference", "torch", "cpu", "triton", "cuda"),
    "linear_divergence": ("reference", "torch", "cpu", "triton"),
    "token_loss": ("reference", "torch", "cpu", "triton", "cuda"),
    "pair_loss": ("reference", "torch", "cpu", "triton", "cuda"),
    "unpaired_loss": ("reference", "torch", "cpu", "triton", "cuda"),
    "ranked_loss": ("reference", "torch", "cpu", "triton"),
    "affine_scan": ("reference", "torch", "cpu", "triton", "cuda"),
    "group_advantage": ("reference", "torch", "cpu", "triton"),
    "linear": ("reference", "torch", "cpu"),  # on a GPU the torch backend's GEMM
    "paged_attention": ("reference", "torch", "cpu", "triton"),
    "sample": ("reference", "torch", "cpu", "triton"),
}
PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "neon")

_requested: ContextVar[str] = ContextVar("rlfast_backend", default="")
_isa: ContextVar[str] = ContextVar("rlfast_isa", default="")
# Dynamo cannot trace a ContextVar, but it guards on a module global: the innermost request, mirrored, so that a
# compiled function is compiled once per requested backend and its backward uses the backend of its forward.
_mirror = ""


def requested() -> str:
    """The backend that the innermost ``use_backend`` asks for; an empty string if none does."""
    if torch.compiler.is_compiling():
        return _mirror
    return _requested.get()


@contextlib.contextmanager
def use_backend(name: str):
    """Run every rlfast op inside the ``with`` block on one backend.

    Args:
        name: one of ``reference``, ``torch``, ``cpu``, ``triton``, ``cuda``.

    Note:
        Eager calls see the request of their own thread or task. A compiler cannot read that: compiled code sees the
        request that was made last in the process.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not available here; the message says why.

    Example:
        >>> with rlfast.use_backend("torch"):
        ...     out = rlfast.token_logps(logits, targets)
    """
    global _mirror
    reason = why_not(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    token, before = _requested.set(name), _mirror
    _mirror = name
    try:
        yield
    finally:
        _requested.reset(token)
        _mirror = before


@contextlib.contextmanager
def use_isa(name: str):
    """Run the C++ CPU kernels inside the ``with`` block at one instruction set, for tests and benchmarks.

    Args:
        name: one of ``rlfast.backends.isas()``, the instruction sets that were built and that this processor has.
    """
    if name not in isas():
        raise RuntimeError(f"isa {name!r} is not available here: expected one of {isas()}")
    token = _isa.set(name)
    try:
        yield
    finally:
        _isa.reset(token)


@functools.cache
def isas() -> tuple[str, ...]:
    """Instruction sets that the CPU kernels were built for and that this processor has, slowest first."""
    return () if why_not("cpu") else tuple(extension("cpu").isas())


def isa() -> str:
    """The instruction set that the CPU kernels use now."""
    return _isa.get() or (isas()[-1] if isas() else "none")


@functools.cache
def extension(name: str):
    """The compiled extension module of the ``cpu`` or ``cuda`` backend."""
    return importlib.import_module(f"rlfast._{name}")


@functools.cache
def implementation(op: str, name: str):
    """The module that implements ``op`` on backend ``name``."""
    if name not in IMPLEMENTED[op]:
        raise RuntimeError(f"{op} has no {name!r} backend: expected one of {IMPLEMENTED[op]}")
    if name == "reference":
        return getattr(importlib.import_module("rlfast.ops.oracle"), op)
    floor = {"torch": "fallback", "cpu": "native", "cuda": "native", "triton": "kernels"}[name]
    return importlib.import_module(f"rlfast.{floor}.{op}")


def available() -> tuple[str, ...]:
    """Backends that run on this machine."""
    return tuple(name for name in NAMES if why_not(name) is None)


def why_not(name: str) -> str | None:
    """Why a backend is not available; None if it is.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {NAMES}, got {name!r}")
    if name in ("reference", "torch"):
        return None
    return {"cpu": _why_not_cpu, "triton": _why_not_triton, "cuda": _why_not_cuda}[name]()


def build_record() -> dict:
    """What the build wrote down: for each extension, ``built`` or the reason why not."""
    return importlib.import_module("rlfast._build_record").RECORD


@functools.cache
def _why_not_cpu() -> str | None:
    try:
        extension("cpu")
    except ImportError as error:
        return f"the C++ extension was not built ({build_record().get('cpu', error)})"
    return None


@functools.cache
def _why_not_cuda() -> str | None:
    try:
        extension("cuda")
    except ImportError as error:
        return f"the CUDA extension was not built ({build_record().get('cuda', error)})"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


@functools.cache
def _why_not_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the triton package is not installed (pip install rlfast[triton])"
    if not torch.cuda.is_available() and not interpreting():
        return "torch sees no GPU, and the interpreter is off (TRITON_INTERPRET=1 turns it on)"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter; Triton reads it when a kernel is decorated."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def interpreter_environment() -> dict[str, str]:
    """The environment for a child process whose Triton kernels run in the interpreter."""
    return {**os.environ, "TRITON_INTERPRET": "1"}


def verl_requested() -> bool:
    """Whether verl's processes are asked to patch themselves (``rlfast.integrations.verl_plugin``)."""
    return os.environ.get("RLFAST_VERL", "0") == "1"


def active(op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The backend that ``op`` runs on for tensors of this device and dtype.

    Raises:
        ValueError: the op is unknown.
        RuntimeError: the requested backend cannot serve this op, device or dtype; the message says why.
    """
    if op not in IMPLEMENTED:
        raise ValueError(f"op: expected one of {tuple(IMPLEMENTED)}, got {op!r}")
    return select(op, torch.device(device).type, dtype, _requested.get())


@functools.cache
def select(op: str, device_type: str, dtype: torch.dtype, name: str) -> str:
    """The backend for one call: ``name`` if it is given, else the first that is available in the device's order.

    float64 is served by torch alone: the kernels compute in float32.
    """
    if name:
        reason = why_not(name) or _cannot_serve(op, device_type, dtype, name)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run {op}: {reason}")
        return name
    for name in PREFERENCE.get(device_type, ()):
        if name in IMPLEMENTED[op] and why_not(name) is None and not _cannot_serve(op, device_type, dtype, name):
            return name
    return "torch"


def _cannot_serve(op: str, device_type: str, dtype: torch.dtype, name: str) -> str | None:
    if name not in IMPLEMENTED[op]:
        return f"not implemented, expected one of {IMPLEMENTED[op]}"
    if name in ("reference", "torch"):
        return None
    if dtype not in KERNEL_DTYPES:
        return f"dtype {dtype}, expected one of {KERNEL_DTYPES}"
    wanted = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cpu",) if interpreting() else ("cuda",)}[name]
    return None if device_type in wanted else f"tensors are on {device_type}, expected {' or '.join(wanted)}"
