"""FBGEMM's table-batched embeddings as a peer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
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


def pooled_lookup(
    tables: Sequence[Tensor],
    mode: str,
    output_dtype: torch.dtype,
    table_of_lookup: Sequence[int] | None = None,
    optimizer: str | None = None,
    learning_rate: float = 0.01,
) -> Any:
    """(ids, offsets, weights) -> pooled rows of all lookups, without a check of the ids; copies the tables.

    Its backward updates the tables, which are its ``split_embedding_weights()``.

    Args:
        tables: of one dtype and device.
        mode: "sum" or "mean".
        output_dtype: of the pooled rows.
        table_of_lookup: the table of each lookup, by default one lookup of each.
        optimizer, learning_rate: of the update; by default there is none to speak of.
    """
    tbe = _module("split_table_batched_embeddings_ops_training")
    common = _module("split_table_batched_embeddings_ops_common")
    on_cpu = tables[0].device.type == "cpu"
    location = common.EmbeddingLocation.HOST if on_cpu else common.EmbeddingLocation.DEVICE
    compute = tbe.ComputeDevice.CPU if on_cpu else tbe.ComputeDevice.CUDA
    kinds = _module("split_embedding_configs").EmbOptimType
    if optimizer not in (None, "sgd", "rowwise_adagrad", "adagrad") and on_cpu:
        raise Unsupported(f"no {optimizer} on a CPU")
    kind = kinds.ADAM if optimizer == "adam" else kinds[f"EXACT_{(optimizer or 'sgd').upper()}"]
    module = tbe.SplitTableBatchedEmbeddingBagsCodegen(
        [(*table.shape, location, compute) for table in tables],
        feature_table_map=None if table_of_lookup is None else list(table_of_lookup),
        pooling_mode=_pooling(mode),
        weights_precision=_precision(tables[0].dtype),
        output_dtype=_precision(output_dtype),
        optimizer=kind,
        learning_rate=learning_rate,
        stochastic_rounding=False,
        bounds_check_mode=common.BoundsCheckMode.NONE,
        device=tables[0].device,
    )
    for weight, table in zip(module.split_embedding_weights(), tables, strict=True):
        weight.view(table.shape).copy_(table)
    return module


def quantised_lookup(
    codes: Sequence[Tensor], scales: Sequence[Tensor], format: str, dim: int, mode: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """(int32 ids, int32 offsets) -> pooled rows in fp32; copies the codes, and the scales in fp16."""
    if format not in ("int8", "int4"):
        raise Unsupported(f"its {format} is another format, without scales of rows")
    inference = _module("split_table_batched_embeddings_ops_inference")
    common = _module("split_table_batched_embeddings_ops_common")
    types = _module("split_embedding_configs").SparseType
    device = codes[0].device
    on_cpu = device.type == "cpu"
    location = common.EmbeddingLocation.HOST if on_cpu else common.EmbeddingLocation.DEVICE
    module = inference.IntNBitTableBatchedEmbeddingBagsCodegen(
        [(f"t{t}", len(table), dim, types[format.upper()], location) for t, table in enumerate(codes)],
        pooling_mode=_pooling(mode),
        device=device,
        output_dtype=types.FP32,
        bounds_check_mode=common.BoundsCheckMode.NONE,
    )
    module.initialize_weights()
    halves = [table.half().view(torch.uint8) for table in scales]
    module.assign_embedding_weights(list(zip(codes, halves, strict=True)))
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
