"""Fused operators for PyTorch recommenders, each checked against a reference."""

from typing import Any

from recsys_ops._version import __version__

__all__ = [
    "HSTUMask",
    "RelativeBias",
    "TimeBucketing",
    "__version__",
    "accelerate",
    "embedding_bag",
    "embedding_bag_collection",
    "explain",
    "hstu_attention",
    "hstu_attention_cached",
    "jagged_concat",
    "jagged_dense_bmm",
    "jagged_last_rows",
    "jagged_split",
    "nn",
    "optim",
    "quantize",
    "quantize_cache",
    "restore",
    "testing",
    "use_backend",
]

try:
    import torch as _torch

    if tuple(int(part) for part in _torch.__version__.split(".")[:2]) < (2, 10):
        raise ImportError(f"this is PyTorch {_torch.__version__}")
except (ImportError, OSError) as _error:
    # The doctor runs all the same, and says what to mend.
    _reason = str(_error)

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(f"recsys_ops.{name} needs PyTorch 2.10 or newer ({_reason}): pip install torch")
        raise AttributeError(f"module 'recsys_ops' has no attribute {name!r}")

else:
    from recsys_ops import nn, optim, testing
    from recsys_ops.accelerate import accelerate, restore
    from recsys_ops.backends import explain, use_backend
    from recsys_ops.embedding_bag.api import embedding_bag
    from recsys_ops.embedding_bag_collection.api import embedding_bag_collection
    from recsys_ops.embedding_bag_collection.quantization import quantize
    from recsys_ops.hstu_attention.api import hstu_attention
    from recsys_ops.hstu_attention.bias import RelativeBias, TimeBucketing
    from recsys_ops.hstu_attention.cached import hstu_attention_cached, quantize_cache
    from recsys_ops.hstu_attention.masks import HSTUMask
    from recsys_ops.jagged import jagged_concat, jagged_dense_bmm, jagged_last_rows, jagged_split
