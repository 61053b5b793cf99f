"""Modules: drop-in classes of ``torch.nn`` with the same parameters, collections of tables, layers."""

from recsys_ops.embedding_bag.modules import EmbeddingBag
from recsys_ops.embedding_bag_collection.modules import EmbeddingBagCollection, TableConfig
from recsys_ops.embedding_bag_collection.quantization import QuantizedEmbeddingBagCollection
from recsys_ops.hstu_attention.modules import HSTU, HSTULayer

__all__ = [
    "HSTU",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "HSTULayer",
    "QuantizedEmbeddingBagCollection",
    "TableConfig",
]
