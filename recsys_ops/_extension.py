"""Loads the compiled extensions, and keeps the reason where they cannot be loaded."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch

_module: ModuleType | None = None
_reason: str | None = None

try:
    _module = importlib.import_module("recsys_ops._C")
except ImportError as error:
    if isinstance(error, ModuleNotFoundError):
        _reason = (
            "the compiled extension is not in this installation; with a C++17 compiler present: "
            "pip install --force-reinstall --no-deps --no-build-isolation recsys-ops"
        )
    else:
        _reason = f"the compiled extension does not load: {error}"


def missing() -> str | None:
    """Why the compiled kernels are absent, or None where they are loaded."""
    return _reason


@functools.cache
def cuda_missing() -> str | None:
    """Why the compiled CUDA kernels are absent, or None where they are loaded; loads them."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if _reason is not None:
        return _reason
    try:
        importlib.import_module("recsys_ops._C_cuda")
    except ModuleNotFoundError:
        return (
            "the CUDA kernels are not in this installation; with nvcc present: RECSYS_OPS_BUILD=cuda "
            "pip install --force-reinstall --no-deps --no-build-isolation recsys-ops"
        )
    except ImportError as error:
        return f"the CUDA kernels do not load: {error}"
    return None


def module() -> ModuleType:
    """The extension; raises ImportError with the reason where it is absent."""
    if _module is None:
        raise ImportError(f"recsys_ops: {_reason}")
    return _module


def simd_levels() -> list[str]:
    """SIMD levels of the compiled kernels that this machine can run, best first."""
    return list(_module.simd_levels()) if _module else []


def empty_table(*shape: int, dtype: torch.dtype, device: torch.device | str | None = None) -> torch.Tensor:
    """``torch.empty``, on the CPU in large pages where the system gives them to who asks."""
    table = torch.empty(*shape, dtype=dtype, device=device)
    if table.is_cpu and type(table) is torch.Tensor and _module is not None:
        _module.ask_for_huge_pages(table.data_ptr(), table.nbytes)
    return table


@contextlib.contextmanager
def use_simd_level(name: str) -> Iterator[None]:
    """Run the compiled kernels at another SIMD level; for the whole process, so for tests.

    Raises:
        RuntimeError: this machine cannot run that level.
    """
    before = module().simd_level()
    module().set_simd_level(name)
    try:
        yield
    finally:
        module().set_simd_level(before)
