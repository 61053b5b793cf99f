"""Optimizers that an ``EmbeddingBagCollection`` applies within its backward: each touched row once.

The formulas are in ``recsys_ops/embedding_bag_collection/row_optimizers.py``.
"""

from recsys_ops.embedding_bag_collection.optimizers import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    FusedOptimizer,
    PartialRowWiseAdam,
    RowOptimizer,
    RowWiseAdagrad,
)

__all__ = [
    "LAMB",
    "SGD",
    "Adagrad",
    "Adam",
    "FusedOptimizer",
    "PartialRowWiseAdam",
    "RowOptimizer",
    "RowWiseAdagrad",
]
