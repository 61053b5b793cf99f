"""Collections of quantised tables, for inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recsys_ops.embedding_bag_collection.api import check_options, check_output_dtype, quantized_collection
from recsys_ops.embedding_bag_collection.layout import Placement
from recsys_ops.embedding_bag_collection.modules import EmbeddingBagCollection, PooledCollection, TableConfig
from recsys_ops.embedding_bag_collection.row_quantization import FORMATS, FP8, quantize_rows
from recsys_ops.embedding_bag_collection.torchrec_modules import as_ours, torchrec_class


def quantize(
    ebc: Any, format: str, *, output_dtype: torch.dtype | None = None, backend: str | None = None
) -> QuantizedEmbeddingBagCollection:
    """Quantise the tables of an embedding bag collection row by row, for inference.

    Each row w becomes codes and two fp32 numbers, scale and offset, from which the kernel forms
    w' = code * scale + offset in fp32 as it pools. What that changes, beyond the rounding of fp32:

    ========  ==============  =====================  =========================================
    format    bytes of a row  scale                  error of an element, |w' - w|
    ========  ==============  =====================  =========================================
    ``int8``  D + 8           (max w - min w) / 255  at most scale / 2
    ``int4``  D / 2 + 8       (max w - min w) / 15   at most scale / 2
    ``fp8``   D + 8           max abs(w) / 448       at most abs(w) / 16, or 2**-10 * scale
    ========  ==============  =====================  =========================================

    The larger of the two for ``fp8`` (e4m3: three bits of mantissa; the second is that of numbers below
    its normal range). So an element of a sum is off by at most the sum of abs(weight) * scale / 2
    over the rows of its bag, a mean by the mean of scale / 2, a maximum by the largest scale / 2.

    Args:
        ebc: a ``recsys_ops.nn.EmbeddingBagCollection``, or TorchRec's, fused or not; it stays as it is.
            Tables of fp64, fp16 and bf16 are quantised from their values in fp32.
        format: ``"int8"``, ``"int4"`` or ``"fp8"``.
        output_dtype: fp32, fp16 or bf16; by default that of ``ebc``, with fp64 fp32.
        backend: a backend's name; by default that of ``ebc``.

    Raises:
        TypeError: ``ebc`` is something else, or ``output_dtype`` is.
        ValueError: an unknown format, or ``"int4"`` of a table whose embedding_dim is odd.

    Example:
        >>> import torch, recsys_ops
        >>> table = recsys_ops.nn.TableConfig("item", num_embeddings=1000, embedding_dim=64)
        >>> small = recsys_ops.quantize(recsys_ops.nn.EmbeddingBagCollection([table]), "int4")
        >>> sum(buffer.nbytes for buffer in small.buffers())  # 256,000 before
        40000
        >>> small(torch.tensor([3, 7, 3]), torch.tensor([0, 2, 3])).shape
        torch.Size([2, 64])
    """
    if format not in FORMATS:
        raise ValueError(f"quantize: expected format to be one of {FORMATS}, got {format!r}")
    if torchrec_class(ebc) is not None:
        groups = as_ours(ebc)
        if len(groups) > 1:
            raise ValueError(
                "quantize: expected tables of one kind of pooling, got several in a fused collection"
            )
        ebc = groups[0]
    if not isinstance(ebc, EmbeddingBagCollection):
        raise TypeError(f"quantize: expected an EmbeddingBagCollection, got {type(ebc).__name__}")
    if output_dtype is None:
        output_dtype = torch.float32 if ebc.output_dtype == torch.float64 else ebc.output_dtype
    quantized = QuantizedEmbeddingBagCollection(
        ebc.tables,
        format,
        "meta",
        is_weighted=ebc.is_weighted_input,
        output_dtype=output_dtype,
        bounds=ebc.bounds,
        backend=ebc.backend if backend is None else backend,
    )
    for table, weight in zip(quantized.embedding_bags.children(), ebc.weights, strict=True):
        table.weight, table.scales = quantize_rows(weight.detach(), format)
    return quantized.train(ebc.training)


class _QuantizedTable(torch.nn.Module):
    """Holds codes and scales under the keys of the state dict."""

    weight: Tensor
    scales: Tensor

    def __init__(self, config: TableConfig, format: str, device: torch.device | str | None) -> None:
        super().__init__()
        self.config, self.format = config, format
        columns = config.embedding_dim // 2 if format == "int4" else config.embedding_dim
        dtype = FP8 if format == "fp8" else torch.uint8
        weight = torch.zeros(config.num_embeddings, columns, dtype=dtype, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", torch.zeros(config.num_embeddings, 2, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _QuantizedTable:
        """Move, but keep the dtypes of the format whatever ``half`` asks for."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"{c.num_embeddings}, {c.embedding_dim}, {c.pooling}, {self.format}, features={list(c.features)}"
        )


class QuantizedEmbeddingBagCollection(PooledCollection):
    """An ``EmbeddingBagCollection`` of quantised tables, for inference; made by ``recsys_ops.quantize``.

    Takes and gives what ``EmbeddingBagCollection`` does, but for gradients: nothing is trained, and
    per-sample weights get none. The state dict holds ``embedding_bags.<table>.weight``, the codes, and
    ``embedding_bags.<table>.scales``, fp32 [R, 2]: scale and offset of each row. All rows of a new
    one are zero: load a state dict.

    Args:
        tables, device, is_weighted, bounds, backend: see ``EmbeddingBagCollection``.
        format: of all tables, see ``recsys_ops.quantize``, which tells how large errors are.
        output_dtype: fp32, fp16 or bf16.

    Raises:
        ValueError, TypeError: an argument is not as above, or a table of ``"int4"`` has an odd
            embedding_dim.

    Example:
        >>> import torch, recsys_ops
        >>> table = recsys_ops.nn.TableConfig("item", num_embeddings=10, embedding_dim=4)
        >>> trained = recsys_ops.quantize(recsys_ops.nn.EmbeddingBagCollection([table]), "int8")
        >>> served = recsys_ops.nn.QuantizedEmbeddingBagCollection([table], "int8")
        >>> served.load_state_dict(trained.state_dict())
        <All keys matched successfully>
    """

    def __init__(
        self,
        tables: Sequence[TableConfig],
        format: str,
        device: torch.device | str | None = None,
        *,
        is_weighted: bool = False,
        output_dtype: torch.dtype = torch.float32,
        bounds: str = "error",
        backend: str | None = None,
    ) -> None:
        name = type(self).__name__
        if format not in FORMATS:
            raise ValueError(f"{name}: expected format to be one of {FORMATS}, got {format!r}")
        for table in tables:
            if format == "int4" and table.embedding_dim % 2:
                raise ValueError(
                    f"{name}: expected an even embedding_dim for int4, "
                    f"got {table.embedding_dim} of table {table.name!r}"
                )
        dtype = check_output_dtype(output_dtype, [torch.float32])
        super().__init__(tables, is_weighted, dtype, bounds, backend)
        check_options(self.layout, bounds, False, is_weighted)
        self.format, self.bits = format, 4 if format == "int4" else 8
        self.embedding_bags = torch.nn.ModuleDict(
            {table.name: _QuantizedTable(table, format, device) for table in tables}
        )

    @property
    def weights(self) -> list[Tensor]:
        """The tables' codes, in order."""
        return self._buffers_of_tables("weight")

    @property
    def scales(self) -> list[Tensor]:
        """Scale and offset of each row, [R, 2] of each table."""
        return self._buffers_of_tables("scales")

    def _buffers_of_tables(self, name: str) -> list[Tensor]:
        # Past torch.nn.Module.__getattr__, which takes most of a small call.
        return [table._buffers[name] for table in self.embedding_bags._modules.values()]  # type: ignore[misc]

    def lookup(
        self,
        values: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
        placement: Placement,
        out: Tensor | None = None,
    ) -> Tensor:
        """The cells of a placement, [placement.size]."""
        return quantized_collection(
            self.weights,
            self.scales,
            self.bits,
            values,
            offsets,
            per_sample_weights,
            placement,
            self.output_dtype,
            self.bounds == "drop",
            out=out,
            backend=self.backend,
        )
