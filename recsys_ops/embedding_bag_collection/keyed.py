"""TorchRec's keyed tensors as input and output of a collection; TorchRec is imported when one comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recsys_ops.embedding_bag_collection.api import check_input, place_bags
from recsys_ops.embedding_bag_collection.layout import Placement

if TYPE_CHECKING:
    from recsys_ops.embedding_bag_collection.modules import PooledCollection


def is_keyed(features: Any) -> bool:
    """Whether this is a ``KeyedJaggedTensor``, or looks like one."""
    return all(hasattr(features, name) for name in ("keys", "values", "offsets", "stride_per_key"))


def forward(module: PooledCollection, features: Any, out: Tensor | None) -> Any:
    """``EmbeddingBagCollection.forward`` of a ``KeyedJaggedTensor``."""
    from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

    values, offsets = features.values(), features.offsets()
    weights = features.weights() if module.is_weighted_input else None
    offsets, placement, apart = _place(module, features, offsets)
    result = module.lookup(values, offsets, weights, placement, out)
    names = module.embedding_names
    if apart:
        pooled = _reindexed(module, features, result, placement)
    elif out is not None:
        pooled = out
    else:
        pooled = module.side_by_side(result, placement)
    keyed = KeyedTensor(keys=names, values=pooled, length_per_key=module.embedding_dims)
    if not module.layout.sequences:
        return keyed
    lengths, sequences = features.to_dict(), {}
    for (name, table), block in zip(module.named_lookups, placement.blocks, strict=True):
        if table.pooling == "none":
            jagged = lengths[name.removesuffix(f"@{table.name}")]
            sequences[name] = JaggedTensor(block.of(result), lengths=jagged.lengths())
    return keyed, sequences


def _place(module: PooledCollection, features: Any, offsets: Tensor) -> tuple[Tensor, Placement, bool]:
    """Offsets and placement of the features, and whether their batch sizes differ."""
    keys = features.keys()
    apart = features.variable_stride_per_key()
    if not apart and not module.layout.sequences:
        known = (features.stride(), *keys)
        placement = module._placements.get(known)
        if placement is not None:
            return offsets, placement, False
    strides = features.stride_per_key()
    first = {key: (sum(strides[:i]), strides[i]) for i, key in enumerate(keys)}
    missing = [f for f in module.features if f not in first]
    if missing:
        raise KeyError(f"EmbeddingBagCollection: expected features {list(module.features)}, got {list(keys)}")
    check_input(features.values(), offsets, module.weights[0])
    bags = [first[f] for f in module.features]
    offsets, placement = place_bags(module.layout, offsets, bags, apart=apart)
    if not apart and not module.layout.sequences and not torch.compiler.is_compiling():
        module.keep_placement(known, placement)
    return offsets, placement, apart


def _reindexed(module: PooledCollection, features: Any, result: Tensor, placement: Placement) -> Tensor:
    """The pooled rows of different batch sizes, brought to the batch that the inverse indices give."""
    inverse = features.inverse_indices_or_none()
    if inverse is None:
        raise ValueError(
            "EmbeddingBagCollection: expected inverse_indices with features of different batch sizes, "
            "got none"
        )
    row_of = {key: i for i, key in enumerate(inverse[0])}
    lookups = [(f, t) for t in module.tables for f in t.features]
    return torch.cat(
        [
            block.of(result).index_select(0, inverse[1][row_of[f]])
            for (f, table), block in zip(lookups, placement.blocks, strict=True)
            if table.pooling != "none"
        ],
        1,
    )
