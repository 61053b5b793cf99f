"""Loads the compiled extension, and keeps the reason where it cannot be loaded."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

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


def module() -> ModuleType:
    """The extension; raises ImportError with the reason where it is absent."""
    if _module is None:
        raise ImportError(f"recsys_ops: {_reason}")
    return _module


def simd_levels() -> list[str]:
    """SIMD levels of the compiled kernels that this machine can run, best first."""
    return list(_module.simd_levels()) if _module else []


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
