"""What every op shares: the library that they are defined in, and the ways past torch's dispatcher."""

from __future__ import annotations

import functools

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

LIB = torch.library.Library("rlfast", "FRAGMENT")


def _key_sets() -> tuple:
    """(what the dispatcher includes in plain eager mode, the keys of a plain tensor per device): private to torch.

    Without them nothing goes past the dispatcher.
    """
    try:
        key = torch._C.DispatchKey
        eager = torch._C.DispatchKeySet(key.BackendSelect).add(key.ADInplaceOrView).raw_repr()
        plain = [
            torch._C.DispatchKeySet(a).add(b).add(c).add(key.ADInplaceOrView).raw_repr()
            for a, b, c in (
                (key.CPU, key.AutogradCPU, key.AutocastCPU),
                (key.CUDA, key.AutogradCUDA, key.AutocastCUDA),
            )
        ]
    except (AttributeError, TypeError):
        return None, ()
    return eager, tuple(plain)


_EAGER, _PLAIN = _key_sets()


def unobserved(*tensors) -> bool:
    """Whether nobody is there to see the op: no mode, transform, tracer or profiler, and plain tensors alone."""
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() == _EAGER
        and all([x is None or torch._C._dispatch_keys(x).raw_repr() in _PLAIN for x in tensors])
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.autograd._profiler_enabled()
    )


def first_derivatives_only(backward):
    """A backward whose gradients raise when they are differentiated again.

    torch's ``once_differentiable`` alone leaves that derivative out, without a word, where the upstream gradient is a
    constant.
    """
    refused = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx, *upstream):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            upstream = [g if g is None or g.requires_grad else g.detach().requires_grad_() for g in upstream]
        return refused(ctx, *upstream)

    return run


def refuse_forward_mode(name: str, *tensors) -> None:
    """A tangent would be lost without a word."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"{name}: forward-mode derivatives are not implemented, expected reverse mode")
