"""Module form of pooled lookups in many tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recsys_ops._extension import empty_table
from recsys_ops.embedding_bag_collection import keyed
from recsys_ops.embedding_bag_collection.api import (
    FLOATS,
    check_input,
    check_options,
    check_output_dtype,
    check_tables,
    collection,
    default_output_dtype,
    place,
)
from recsys_ops.embedding_bag_collection.layout import POOLINGS, Layout, Placement
from recsys_ops.embedding_bag_collection.optimizers import FusedOptimizer, RowOptimizer

_OP = "EmbeddingBagCollection"


@dataclass(frozen=True)
class TableConfig:
    """One table of an ``EmbeddingBagCollection``.

    Args:
        name: of the table, unique in its collection.
        num_embeddings: rows, R.
        embedding_dim: columns, D.
        features: the features that look it up; by default one of the table's name.
        pooling: ``"sum"``, ``"mean"``, ``"max"``, or ``"none"`` for the row of every id.
        dtype: of the weight: fp32, fp16, bf16 or fp64.
        init: fills the weight in place; by default uniform in [-1, 1] / sqrt(R), as in TorchRec.

    Raises:
        ValueError, TypeError: a field is not as above.

    Example:
        >>> TableConfig("user", num_embeddings=100, embedding_dim=16).features
        ('user',)
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    features: Sequence[str] = ()
    pooling: str = "sum"
    dtype: torch.dtype = torch.float32
    init: Callable[[Tensor], Any] | None = None

    def __post_init__(self) -> None:
        if not self.name or "." in self.name:
            raise ValueError(f"TableConfig: expected a name without dots, got {self.name!r}")
        for field, least in (("num_embeddings", 0), ("embedding_dim", 1)):
            if getattr(self, field) < least:
                got = getattr(self, field)
                raise ValueError(
                    f"TableConfig {self.name!r}: expected {field} of at least {least}, got {got}"
                )
        if isinstance(self.features, str):
            raise TypeError(f"TableConfig {self.name!r}: expected a list of features, got {self.features!r}")
        if self.pooling not in POOLINGS:
            raise ValueError(
                f"TableConfig {self.name!r}: expected pooling to be one of {POOLINGS}, got {self.pooling!r}"
            )
        if self.dtype not in FLOATS:
            raise TypeError(
                f"TableConfig {self.name!r}: expected dtype to be one of {FLOATS}, got {self.dtype}"
            )
        object.__setattr__(self, "features", tuple(self.features) or (self.name,))

    def initialize(self, weight: Tensor) -> None:
        """Fill a weight in place."""
        with torch.no_grad():
            if self.init is not None:
                self.init(weight)
            elif weight.numel():
                bound = math.sqrt(1 / self.num_embeddings)
                weight.uniform_(-bound, bound)


class _Table(torch.nn.Module):
    """Holds a weight under TorchRec's key."""

    weight: torch.nn.Parameter

    def __init__(self, config: TableConfig, device: torch.device | str | None, trained: bool) -> None:
        super().__init__()
        weight = empty_table(config.num_embeddings, config.embedding_dim, dtype=config.dtype, device=device)
        self.weight = torch.nn.Parameter(weight, requires_grad=trained)
        self.config = config

    def extra_repr(self) -> str:
        c = self.config
        dtype = str(c.dtype).removeprefix("torch.")
        return f"{c.num_embeddings}, {c.embedding_dim}, {c.pooling}, {dtype}, features={list(c.features)}"


class PooledCollection(torch.nn.Module):
    """What collections have in common: how input becomes lookups, and those become output.

    Subclasses hold the tables and implement ``weights`` and ``lookup``.
    """

    sparse = False

    def __init__(
        self,
        tables: Sequence[TableConfig],
        is_weighted: bool,
        output_dtype: torch.dtype,
        bounds: str,
        backend: str | None,
    ) -> None:
        super().__init__()
        names = [table.name for table in tables]
        if len(names) == 0 or len(set(names)) != len(names):
            raise ValueError(f"{_OP}: expected tables of different names, got {names}")
        self.tables = tuple(tables)
        self.features = tuple(dict.fromkeys(f for table in tables for f in table.features))
        self.layout = Layout(
            tuple(tuple(self.features.index(f) for f in table.features) for table in tables),
            tuple(table.pooling for table in tables),
            tuple(table.embedding_dim for table in tables),
        )
        self.output_dtype = output_dtype
        self.is_weighted_input = is_weighted
        self.bounds, self.backend = bounds, backend
        shared = Counter(f for table in tables for f in table.features)
        # The name of each lookup and its table.
        self.named_lookups = tuple(
            (f"{f}@{table.name}" if shared[f] > 1 else f, table) for table in tables for f in table.features
        )
        self.embedding_names = [name for name, table in self.named_lookups if table.pooling != "none"]
        self.embedding_dims = [
            table.embedding_dim for _, table in self.named_lookups if table.pooling != "none"
        ]
        self._placements: dict[Any, Placement] = {}

    @property
    def weights(self) -> list[Tensor]:
        """What the tables hold, in order."""
        raise NotImplementedError

    def lookup(
        self,
        values: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
        placement: Placement,
        out: Tensor | None = None,
    ) -> Tensor:
        """The cells of a placement, [placement.size]."""
        raise NotImplementedError

    def forward(
        self,
        features: Any,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        batch_sizes: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Any:
        """Pool all bags.

        Args:
            features: the ids of all bags [N], feature after feature in the order of ``features``, with
                ``offsets``; or a ``KeyedJaggedTensor`` alone.
            offsets: int32 or int64 [F * B + 1], where each bag starts and where the last ends.
            per_sample_weights: a factor for each id, [N].
            batch_sizes: bags of each feature, where features have different numbers of them.
            out: where to write the result [B, sum of D]; for serving, without gradients.

        Returns:
            [B, sum of D]; with ``batch_sizes`` a list of [B_f, D]. Of a ``KeyedJaggedTensor`` a
            ``KeyedTensor``. Where a table has pooling ``"none"``, a pair of that (of the pooled tables)
            and a dict of name: [ids, D], or name: ``JaggedTensor``.

        Raises:
            ValueError, TypeError, RuntimeError: as in ``recsys_ops.embedding_bag_collection``.
        """
        if offsets is None:
            if not keyed.is_keyed(features):
                got = type(features).__name__
                raise TypeError(
                    f"{_OP}: expected values and offsets, or a KeyedJaggedTensor, got a {got} alone"
                )
            return keyed.forward(self, features, out)
        if per_sample_weights is not None:
            check_options(self.layout, self.bounds, False, True)
        offsets, placement = self._place(features, offsets, batch_sizes)
        result = self.lookup(features, offsets, per_sample_weights, placement, out)
        if batch_sizes is None and not self.layout.sequences:
            return result if out is not None else result.view(-1, self.layout.pooled_dim)
        blocks = {
            name: block.of(result)
            for (name, _), block in zip(self.named_lookups, placement.blocks, strict=True)
        }
        sequences = {name: blocks[name] for name, table in self.named_lookups if table.pooling == "none"}
        if batch_sizes is not None:
            pooled: Any = [block for name, block in blocks.items() if name not in sequences]
        else:
            pooled = self.side_by_side(result, placement)
        return (pooled, sequences) if sequences else pooled

    def _place(
        self, values: Tensor, offsets: Tensor, batch_sizes: Sequence[int] | None
    ) -> tuple[Tensor, Placement]:
        is_known = batch_sizes is None and not self.layout.sequences and not torch.compiler.is_compiling()
        placement = self._placements.get(offsets.shape) if is_known else None
        if placement is None:
            check_input(values, offsets, self.weights[0])
            offsets, placement = place(self.layout, offsets, batch_sizes)
            if is_known:
                self.keep_placement(offsets.shape, placement)
        return offsets, placement

    def keep_placement(self, key: Any, placement: Placement) -> None:
        """Remember the placement of a kind of input; the kinds are few, or not worth remembering."""
        if len(self._placements) >= 64:
            self._placements.clear()
        self._placements[key] = placement

    def side_by_side(self, result: Tensor, placement: Placement) -> Tensor:
        """The pooled columns of a result, [B, pooled_dim]."""
        rows = next(
            (
                b.rows
                for b, (_, t) in zip(placement.blocks, self.named_lookups, strict=True)
                if t.pooling != "none"
            ),
            0,
        )
        return result[: rows * self.layout.pooled_dim].view(rows, self.layout.pooled_dim)


class EmbeddingBagCollection(PooledCollection):
    """Embedding bags of many tables in one call, with the optimizer fused into the backward if one is given.

    Takes plain tensors, or a TorchRec ``KeyedJaggedTensor`` with its features in any order, among others.
    Names and order of outputs and the keys of the state dict are TorchRec's: table after table, in each
    its features in order; a feature of several tables is called ``feature@table``; weights are
    ``embedding_bags.<table>.weight``.

    Args:
        tables: the tables.
        optimizer: one of ``recsys_ops.optim``: the backward then updates the tables, which get no
            gradients, and around which ``torch.compile`` breaks the graph. None: they get dense
            gradients, or sparse and coalesced ones.
        device: of the tables.
        is_weighted: whether the weights of a ``KeyedJaggedTensor`` are used, as in TorchRec.
        sparse: see ``optimizer``.
        output_dtype: by default fp32, with fp64 tables fp64.
        bounds: what an id outside its table does: ``"error"`` raises, ``"drop"`` contributes nothing and
            trains nothing. Ids are never changed.
        backend: a backend's name, or None to choose.

    Attributes:
        features: in the order of plain input: as the tables first name them.
        embedding_names: of the pooled outputs, in order.
        fused_optimizer: the ``recsys_ops.optim.FusedOptimizer``, or None.

    Example:
        >>> import torch, recsys_ops
        >>> tables = [
        ...     recsys_ops.nn.TableConfig("user", 10, 4),
        ...     recsys_ops.nn.TableConfig("item", 20, 8, features=["clicked", "bought"], pooling="mean"),
        ... ]
        >>> ebc = recsys_ops.nn.EmbeddingBagCollection(tables, recsys_ops.optim.RowWiseAdagrad(lr=0.1))
        >>> values, offsets = torch.tensor([3, 7, 11, 12, 1, 19]), torch.tensor([0, 1, 2, 4, 4, 5, 6])
        >>> output = ebc(values, offsets)  # features user, clicked, bought, two samples each
        >>> output.shape
        torch.Size([2, 20])
        >>> output.sum().backward()  # updates both tables
    """

    def __init__(
        self,
        tables: Sequence[TableConfig],
        optimizer: RowOptimizer | None = None,
        device: torch.device | str | None = None,
        *,
        is_weighted: bool = False,
        sparse: bool = False,
        output_dtype: torch.dtype | None = None,
        bounds: str = "error",
        backend: str | None = None,
    ) -> None:
        if optimizer is not None and sparse:
            raise ValueError(
                f"{_OP}: expected sparse=False with an optimizer, which leaves no gradients, got True"
            )
        dtypes = [table.dtype for table in tables]
        dtype = check_output_dtype(output_dtype or default_output_dtype(dtypes), dtypes)
        super().__init__(tables, is_weighted, dtype, bounds, backend)
        check_options(self.layout, bounds, sparse, is_weighted)
        self.sparse = sparse
        self.embedding_bags = torch.nn.ModuleDict(
            {table.name: _Table(table, device, trained=optimizer is None) for table in tables}
        )
        check_tables(self.weights)
        self.fused_optimizer = FusedOptimizer(optimizer, self.weights) if optimizer is not None else None
        self.reset_parameters()

    @property
    def weights(self) -> list[torch.nn.Parameter]:  # type: ignore[override]
        """The tables' weights, in order."""
        # Past torch.nn.Module.__getattr__, which takes a third of a small call.
        return [table._parameters["weight"] for table in self.embedding_bags._modules.values()]  # type: ignore[misc]

    def reset_parameters(self) -> None:
        """Initialise weights, and zero the optimizer's state."""
        for config, weight in zip(self.tables, self.weights, strict=True):
            if not weight.is_meta:
                config.initialize(weight)
        if self.fused_optimizer is not None:
            self.fused_optimizer.reset_state()

    def adopt(self, weights: Sequence[Tensor]) -> None:
        """Take tensors as the tables, without copying them; the optimizer's state is zeros.

        Without an optimizer, parameters stay the parameters they are.
        """
        for table, weight in zip(self.embedding_bags.children(), weights, strict=True):
            if self.fused_optimizer is not None:
                weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
            elif not isinstance(weight, torch.nn.Parameter):
                weight = torch.nn.Parameter(weight)
            table.weight = weight
        if self.fused_optimizer is not None:
            device = self.weights[0].device
            self.fused_optimizer.rebind(self.weights, lambda state: torch.zeros_like(state, device=device))

    def lookup(
        self,
        values: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
        placement: Placement,
        out: Tensor | None = None,
    ) -> Tensor:
        """The cells of a placement, [placement.size]."""
        fused = self.fused_optimizer
        return collection(
            self.weights,
            values,
            offsets,
            per_sample_weights,
            placement,
            self.output_dtype,
            self.bounds == "drop",
            self.layout.has_max,
            sparse=self.sparse,
            update=fused.update() if fused is not None and torch.is_grad_enabled() else None,
            out=out,
            backend=self.backend,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EmbeddingBagCollection:
        super()._apply(fn, recurse)
        dtypes = [weight.dtype for weight in self.weights]
        if (self.output_dtype == torch.float64) != (torch.float64 in dtypes):
            self.output_dtype = default_output_dtype(dtypes)
        if self.fused_optimizer is not None:
            self.fused_optimizer.rebind(self.weights, fn)
        return self
