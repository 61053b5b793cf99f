"""FBGEMM's table-batched embeddings, with one table, as a peer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recsys_ops.benchmarks.registry import Unsupported


def missing(device: str) -> str | None:
    """Why FBGEMM cannot be measured here on a device, "cpu" or "cuda", or None."""
    if importlib.util.find_spec("fbgemm_gpu") is None:
        return "fbgemm_gpu is not installed: pip install 'recsys-ops[peers]'"
    try:
        _module("split_table_batched_embeddings_ops_training")
    except Exception as error:
        return f"fbgemm_gpu does not import: {error}".splitlines()[0]
    if device == "cuda" and getattr(importlib.import_module("fbgemm_gpu"), "__variant__", None) == "cpu":
        return "the fbgemm_gpu that is installed has no kernels for GPUs"
    return None


def pooled_lookup(table: Tensor, mode: str) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """(ids, offsets, weights) -> pooled rows, without a check of the ids; copies the table."""
    tbe = _module("split_table_batched_embeddings_ops_training")
    common = _module("split_table_batched_embeddings_ops_common")
    precision = _precision(table.dtype)
    on_cpu = table.device.type == "cpu"
    location = common.EmbeddingLocation.HOST if on_cpu else common.EmbeddingLocation.DEVICE
    compute = tbe.ComputeDevice.CPU if on_cpu else tbe.ComputeDevice.CUDA
    module = tbe.SplitTableBatchedEmbeddingBagsCodegen(
        [(*table.shape, location, compute)],
        pooling_mode=_pooling(mode),
        weights_precision=precision,
        output_dtype=precision,
        bounds_check_mode=common.BoundsCheckMode.NONE,
        device=table.device,
    )
    module.split_embedding_weights()[0].copy_(table)
    return module


def pooled_step(table: Tensor, mode: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(ids, offsets, gradient of the output) -> pooled rows and dense gradient; copies the table.

    The fused optimizers of the other class update the table in the backward, which is
    other work than a gradient; this class gives one.
    """
    tbe = _module("split_table_batched_embeddings_ops_training")
    module = tbe.DenseTableBatchedEmbeddingBagsCodegen(
        [tuple(table.shape)],
        weights_precision=_precision(table.dtype),
        pooling_mode=_pooling(mode),
        use_cpu=table.device.type == "cpu",
    )
    weights = module.weights
    weights.data.copy_(table.flatten())

    def step(ids: Tensor, offsets: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        output = module(ids, offsets)
        output.backward(grad)
        gradient, weights.grad = weights.grad, None
        return output, gradient.view(table.shape)

    return step


def _pooling(mode: str) -> Any:
    pooling = _module("split_table_batched_embeddings_ops_common").PoolingMode
    if mode not in ("sum", "mean"):
        raise Unsupported(f"no {mode} pooling")
    return pooling.SUM if mode == "sum" else pooling.MEAN


def _precision(dtype: torch.dtype) -> Any:
    types = _module("split_embedding_configs").SparseType
    if dtype not in (torch.float32, torch.float16):
        raise Unsupported("fp32 and fp16 tables only")
    return types.FP32 if dtype == torch.float32 else types.FP16


def _module(name: str) -> Any:
    return importlib.import_module(f"fbgemm_gpu.{name}")
