"""Registration with PyTorch of operators and of kernels that are written in Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from recsys_ops import _extension, backends
from recsys_ops.backends import Implementation

LIBRARY = torch.library.Library("recsys_ops", "FRAGMENT")
_ops = torch.ops.recsys_ops

# Both have the same operators, and the device of the tensors decides whose kernel runs.
COMPILED = ("native", "cuda")


def register_kernels(
    implementation: Implementation,
    contract: Iterable[Callable[..., Any]],
    fakes: dict[str, Callable[..., Any]],
    mutates: Mapping[str, tuple[str, ...]] | None = None,
) -> SimpleNamespace | None:
    """The registered kernels of one backend, under the names of ``contract``; None where they are absent.

    Compiled backends share theirs, defined in ``csrc/registration.cpp`` as ``<name>``. For a backend
    in Python, ``<name>_<backend>`` is defined here, with the schema that the annotations of
    the contract's function imply; ``mutates`` names the arguments that a kernel writes to.
    """
    compiled = implementation.backend in COMPILED
    if compiled and _extension.missing():
        return None
    kernels = SimpleNamespace()
    for function in contract:
        name = function.__name__ if compiled else f"{function.__name__}_{implementation.backend}"
        if not compiled:
            changed = (mutates or {}).get(function.__name__, ())
            LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=changed))
            LIBRARY.impl(name, _loading(implementation, function.__name__), "CompositeExplicitAutograd")
        kernel = getattr(_ops, name).default
        if implementation.backend != "cuda":
            torch.library.register_fake(kernel, fakes[function.__name__])
        setattr(kernels, function.__name__, kernel)
    return kernels


def eager_function(name: str) -> Callable[..., torch.Tensor | None]:
    """A compiled function past the dispatcher; it returns None for calls that it leaves to who calls it."""
    if _extension.missing():
        return lambda *args: None
    extension = _extension.module()
    extension.bind_eager(torch.Tensor, torch.nn.Parameter)
    function: Callable[..., torch.Tensor | None] = getattr(extension, name)
    return function


def names_of(dtypes: Iterable[torch.dtype]) -> str:
    """For messages: ``float32 or float16``."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def is_eager(backend: str | None) -> bool:
    """Whether a call that asks for ``backend`` may bypass PyTorch's dispatcher: nothing else looks on.

    Compilation, tracing, transforms, dispatch modes and the profiler look on, and so does
    whoever asks for a backend.
    """
    return not (
        backend is not None
        or backends.is_requested()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    )


def _loading(implementation: Implementation, name: str) -> Callable[..., Any]:
    """The kernel, imported at its first call; what it calls itself is not for autocast to change."""

    def kernel(*args: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return getattr(implementation.kernels, name)(*args)

    return kernel
