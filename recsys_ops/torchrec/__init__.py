"""Our embedding bag collections in TorchRec: in place of its module, and under its sharding.

Needs TorchRec, so ``import recsys_ops`` leaves this package alone.
"""

try:
    import torchrec.modules  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"recsys_ops.torchrec needs TorchRec and FBGEMM ({error}), on a machine without a GPU: "
        "pip install 'recsys-ops[torchrec]'; pip install --no-deps torchrec==1.8.0"
    ) from error

from recsys_ops.torchrec.collection import EmbeddingBagCollection, from_torchrec, to_torchrec
from recsys_ops.torchrec.optimizers import optimizer_of
from recsys_ops.torchrec.planner import sharding_planner
from recsys_ops.torchrec.sharding import (
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
    gather,
    sharders,
)

__all__ = [
    "EmbeddingBagCollection",
    "EmbeddingBagCollectionSharder",
    "ShardedEmbeddingBagCollection",
    "from_torchrec",
    "gather",
    "optimizer_of",
    "sharders",
    "sharding_planner",
    "to_torchrec",
]
