"""Drop-in modules: the classes of ``torch.nn`` with the same parameters and a faster forward."""

from recsys_ops.embedding_bag.modules import EmbeddingBag
from recsys_ops.embedding_bag_collection.modules import EmbeddingBagCollection, TableConfig
from recsys_ops.embedding_bag_collection.quantization import QuantizedEmbeddingBagCollection

__all__ = ["EmbeddingBag", "EmbeddingBagCollection", "QuantizedEmbeddingBagCollection", "TableConfig"]
