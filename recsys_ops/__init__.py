"""Fused operators for PyTorch recommenders, each checked against a reference."""

from typing import Any

from recsys_ops._version import __version__

__all__ = [
    "__version__",
    "accelerate",
    "embedding_bag",
    "explain",
    "nn",
    "restore",
    "testing",
    "use_backend",
]

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as _error:
    if _error.name != "torch":
        raise

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(
                f"recsys_ops.{name} needs PyTorch 2.10 or newer, which is not installed: pip install torch"
            )
        raise AttributeError(f"module 'recsys_ops' has no attribute {name!r}")

else:
    from recsys_ops import nn, testing
    from recsys_ops.accelerate import accelerate, restore
    from recsys_ops.backends import explain, use_backend
    from recsys_ops.embedding_bag.api import embedding_bag
