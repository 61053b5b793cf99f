"""Tables and batches for our collection and TorchRec's."""

from __future__ import annotations

from typing import Any

import torch
import torchrec
from torch import Tensor
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import PoolingType

from recsys_ops.torchrec import EmbeddingBagCollection

KEYS = ("viewed", "bought", "query")
BATCH = 5


def configs(**changes: Any) -> list[EmbeddingBagConfig]:
    """Three tables; two share a feature, and one has two."""
    tables = (
        ("products", 13, 8, ["viewed", "bought"], PoolingType.SUM),
        ("words", 29, 4, ["query"], PoolingType.MEAN),
        ("brands", 13, 4, ["viewed"], PoolingType.SUM),
    )
    return [
        EmbeddingBagConfig(
            **{
                "name": name,
                "num_embeddings": rows,
                "embedding_dim": dim,
                "feature_names": features,
                "pooling": pooling,
                **changes,
            }
        )
        for name, rows, dim, features, pooling in tables
    ]


def batch(seed: int = 0, keys: tuple[str, ...] = KEYS, weighted: bool = False) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids that every table has."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(keys) * BATCH,), generator=generator)
    total = int(lengths.sum())
    ids = torch.randint(0, 13, (total,), generator=generator)
    weights = torch.rand(total, generator=generator) if weighted else None
    return KeyedJaggedTensor(list(keys), ids, weights, lengths)


def both(is_weighted: bool = False, **changes: Any) -> tuple[EmbeddingBagCollection, Any]:
    """Ours and TorchRec's, of equal weights."""
    torch.manual_seed(0)
    ours = EmbeddingBagCollection(configs(**changes), is_weighted)
    theirs = torchrec.EmbeddingBagCollection(configs(**changes), is_weighted)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    assert ours.length_per_key() == theirs.length_per_key()
    torch.testing.assert_close(ours.values(), theirs.values())


def loss_of(output: Any) -> Tensor:
    """Depends on every element, not linearly."""
    values = output.values()
    scale = torch.linspace(0.5, 1.5, values.numel()).view_as(values)
    return ((values - 0.3) * scale).square().sum()


def train(ebc: Any, steps: range) -> None:
    for step in steps:
        loss_of(ebc(batch(step))).backward()
