"""Drop-in modules: the classes of ``torch.nn`` with the same parameters and a faster forward."""

from recsys_ops.embedding_bag.modules import EmbeddingBag
from recsys_ops.embedding_bag_collection.modules import EmbeddingBagCollection, TableConfig

__all__ = ["EmbeddingBag", "EmbeddingBagCollection", "TableConfig"]
