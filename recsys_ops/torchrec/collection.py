"""TorchRec's ``EmbeddingBagCollection``, computed by ours; and the way from one to the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, dtype_to_data_type
from torchrec.modules.embedding_modules import EmbeddingBagCollection as TorchRecCollection
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from recsys_ops.embedding_bag_collection import modules
from recsys_ops.embedding_bag_collection.optimizers import RowOptimizer
from recsys_ops.embedding_bag_collection.row_optimizers import STATES
from recsys_ops.embedding_bag_collection.torchrec_modules import (
    DTYPES,
    optimizer_of_tables,
    states_of,
    table_config,
    why_not_ours,
)


class EmbeddingBagCollection(modules.EmbeddingBagCollection, EmbeddingBagCollectionInterface):
    """TorchRec's ``EmbeddingBagCollection`` on our kernels; with an optimizer, its fused one too.

    Same configurations, input, output, and state dict. Unlike TorchRec's, BF16 tables are BF16.

    Args:
        tables: TorchRec's configurations, pooled by SUM or MEAN, of FP32, FP16 or BF16.
        is_weighted: whether the weights of a ``KeyedJaggedTensor`` are used.
        device: of the tables; ``"meta"`` allocates nothing.
        optimizer: one of ``recsys_ops.optim``: the backward then updates the tables, as that of a
            ``FusedEmbeddingBagCollection`` does.
        options: ``sparse``, ``output_dtype``, ``bounds``, ``backend`` of
            ``recsys_ops.nn.EmbeddingBagCollection``.

    Raises:
        ValueError: a table has another pooling or data type, or is virtual.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
        >>> table = EmbeddingBagConfig(
        ...     name="products", num_embeddings=10, embedding_dim=4, feature_names=["clicked"]
        ... )
        >>> ebc = EmbeddingBagCollection([table])
        >>> lengths, ids = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 3])
        >>> features = KeyedJaggedTensor(["clicked"], ids, lengths=lengths)
        >>> ebc(features)["clicked"].shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | str | None = None,
        optimizer: RowOptimizer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            [table_config(config) for config in tables], optimizer, device, is_weighted=is_weighted, **options
        )
        self._embedding_bag_configs = [
            dataclasses.replace(config, feature_names=list(table.features))
            for config, table in zip(tables, self.tables, strict=True)
        ]

    def forward(
        self,
        features: Any,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As that of ``recsys_ops.nn.EmbeddingBagCollection``; also of a ``TensorDict`` of jagged tensors."""
        if isinstance(features, torch.fx.Proxy):
            # For whoever traces a model, the collection is one node.
            tracer: Any = features.tracer
            arguments = (features, offsets, per_sample_weights)
            return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, options)
        return super().forward(maybe_td_to_kjt(features), offsets, per_sample_weights, **options)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Of the tables, with the names of their features."""
        return self._embedding_bag_configs

    def is_weighted(self) -> bool:
        """Whether the weights of a ``KeyedJaggedTensor`` are used."""
        return self.is_weighted_input

    @property
    def device(self) -> torch.device:
        """Of the tables."""
        return self.weights[0].device


def from_torchrec(
    ebc: TorchRecCollection | FusedEmbeddingBagCollection,
    optimizer: RowOptimizer | None = None,
    **options: Any,
) -> EmbeddingBagCollection:
    """Our collection in place of an unsharded one of TorchRec, on the same memory.

    Without an optimizer it has the very parameters of ``ebc``, so whoever trains these goes on doing so.
    The optimizer of a ``FusedEmbeddingBagCollection`` is taken over, with its state.

    Args:
        ebc: either of TorchRec's collections.
        optimizer: one of ``recsys_ops.optim`` to fuse into the backward. Of a fused collection None
            takes over its own, with state; another one starts afresh.
        options: as in ``EmbeddingBagCollection``.

    Raises:
        TypeError: ``ebc`` is something else, a subclass or a sharded collection for two.
        ValueError: ``ebc`` does what ours does not, in its fused optimizer for one; a table to be updated
            is frozen; or a fused collection mixes poolings so that TorchRec gives its values in another
            order than their names.

    Example:
        >>> import torch, torchrec, recsys_ops
        >>> table = torchrec.EmbeddingBagConfig(name="t", num_embeddings=10, embedding_dim=4)
        >>> theirs = torchrec.EmbeddingBagCollection([table])
        >>> ours = from_torchrec(theirs, recsys_ops.optim.RowWiseAdagrad(lr=0.1))
        >>> ours.weights[0].data_ptr() == theirs.embedding_bags["t"].weight.data_ptr()
        True
    """
    # A subclass may compute something else.
    if type(ebc) not in (TorchRecCollection, FusedEmbeddingBagCollection):
        raise TypeError(f"from_torchrec: expected an unsharded collection of TorchRec, got {type(ebc)}")
    configs = ebc.embedding_bag_configs()
    weights = [_parameter(ebc.embedding_bags[config.name]) for config in configs]
    frozen = [c.name for c, w in zip(configs, weights, strict=True) if not w.requires_grad]
    fused = isinstance(ebc, FusedEmbeddingBagCollection)
    if frozen and (fused or optimizer is not None):
        raise ValueError(f"from_torchrec: a fused optimizer updates all tables, got frozen ones: {frozen}")
    if fused and (order := _order_of_values(configs)) != [config.name for config in configs]:
        # Its keys are in the order of tables, its values are not: whatever learnt from them would break.
        raise ValueError(f"from_torchrec: TorchRec fuses these tables in another order, {order}")
    if reason := why_not_ours(ebc, optimizer=optimizer is None):
        raise ValueError(f"from_torchrec: expected what TorchRec's and ours both do, got: {reason}")
    engines: list[Any] = []
    if fused and optimizer is None:
        engines = [lookups._emb_module for lookups in ebc._emb_modules]
        optimizer = optimizer_of_tables(engines[0])
    ours = EmbeddingBagCollection(
        _of_dtypes(configs, weights), ebc.is_weighted(), "meta", optimizer, **options
    )
    ours.adopt(weights)
    if engines:
        _take_over(ours, engines)
    return ours.train(ebc.training)


def to_torchrec(ebc: EmbeddingBagCollection) -> TorchRecCollection:
    """TorchRec's plain collection of the same weights, on the same memory.

    Tables keep their dtypes, BF16 too. Parameters that no fused optimizer updates are the very same.

    Raises:
        ValueError: a table has a dtype that TorchRec's configurations cannot name.

    Example:
        >>> import torchrec
        >>> table = torchrec.EmbeddingBagConfig(name="t", num_embeddings=10, embedding_dim=4)
        >>> to_torchrec(EmbeddingBagCollection([table])).embedding_bags["t"].weight.shape
        torch.Size([10, 4])
    """
    if unknown := [w.dtype for w in ebc.weights if w.dtype not in DTYPES.values()]:
        raise ValueError(f"to_torchrec: expected tables of fp32, fp16 or bf16, got {unknown[0]}")
    configs = _of_dtypes(ebc.embedding_bag_configs(), ebc.weights)
    theirs = TorchRecCollection(configs, ebc.is_weighted(), torch.device("meta"))
    theirs._device = ebc.device
    for table, weight in zip(theirs.embedding_bags.values(), ebc.weights, strict=True):
        table.weight = weight if ebc.fused_optimizer is None else torch.nn.Parameter(weight.detach())
    return theirs.train(ebc.training)


def _of_dtypes(configs: Sequence[EmbeddingBagConfig], weights: Sequence[Tensor]) -> list[EmbeddingBagConfig]:
    """Configurations that say the dtypes which their tables have: TorchRec keeps BF16 tables in FP16."""
    return [
        dataclasses.replace(config, data_type=dtype_to_data_type(weight.dtype))
        for config, weight in zip(configs, weights, strict=True)
    ]


def _parameter(table: torch.nn.Module) -> torch.nn.Parameter:
    weight = table.weight
    assert isinstance(weight, torch.nn.Parameter)
    return weight


def _order_of_values(configs: Sequence[EmbeddingBagConfig]) -> list[str]:
    """The tables of a ``FusedEmbeddingBagCollection`` in the order of its output: group after group."""
    groups = list(dict.fromkeys((config.pooling, config.data_type) for config in configs))
    ordered = sorted(configs, key=lambda config: groups.index((config.pooling, config.data_type)))
    return [config.name for config in ordered]


def _take_over(ours: EmbeddingBagCollection, engines: Sequence[Any]) -> None:
    """Share the state of FBGEMM's optimizers, and go on from their step."""
    fused = ours.fused_optimizer
    assert fused is not None
    of_tables = [states for engine in engines for states in states_of(engine)]
    for table, weight, states in zip(ours.tables, ours.weights, of_tables, strict=True):
        for name, theirs in zip(STATES[fused.config.kind], states, strict=True):
            own = fused.state[weight][name]
            if theirs.shape != own.shape or theirs.dtype != own.dtype:
                raise ValueError(
                    f"from_torchrec: expected {name} of {table.name!r} to be {own.dtype} {list(own.shape)}, "
                    f"got {theirs.dtype} {list(theirs.shape)}"
                )
            fused.state[weight][name] = theirs
    steps, rates = {int(e.iter.item()) for e in engines}, {e.get_learning_rate() for e in engines}
    if len(steps) != 1 or len(rates) != 1:
        raise ValueError(
            f"from_torchrec: expected tables trained alike, got steps {steps} and learning rates {rates}"
        )
    fused.count.fill_(steps.pop())
    fused.param_groups[0]["lr"] = rates.pop()
