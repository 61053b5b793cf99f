"""TorchRec's collections of embedding bags as peers, and its keyed tensors."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recsys_ops.benchmarks import fbgemm
from recsys_ops.benchmarks.registry import Unsupported


def missing(device: str) -> str | None:
    """Why TorchRec cannot be measured here on a device, "cpu" or "cuda", or None."""
    if importlib.util.find_spec("torchrec") is None:
        return "torchrec is not installed: pip install torchrec"
    if (reason := fbgemm.missing(device)) is not None:
        return reason
    try:
        importlib.import_module("torchrec")
    except Exception as error:
        return f"torchrec does not import: {error}".splitlines()[0]
    return None


def keyed(features: Sequence[str], values: Tensor, offsets: Tensor) -> Any:
    """A ``KeyedJaggedTensor`` of all bags, feature after feature."""
    return importlib.import_module("torchrec").KeyedJaggedTensor(
        keys=list(features), values=values, offsets=offsets, lengths=offsets.diff()
    )


def collection(tables: Sequence[Tensor], features: Sequence[Sequence[str]], mode: str) -> Any:
    """An ``EmbeddingBagCollection`` of these tables, which it shares."""
    if tables[0].dtype != torch.float32:
        raise Unsupported("rounds sums to the precision of the tables")
    torchrec = importlib.import_module("torchrec")
    module = torchrec.EmbeddingBagCollection(
        tables=_configs(tables, features, mode), device=torch.device("meta")
    )
    for bag, table in zip(module.embedding_bags.values(), tables, strict=True):
        bag.weight = torch.nn.Parameter(table, requires_grad=False)
    return module


def fused_collection(
    tables: Sequence[Tensor], features: Sequence[Sequence[str]], mode: str, optimizer: str, lr: float
) -> tuple[Any, list[Tensor]]:
    """A ``FusedEmbeddingBagCollection`` of copies of these tables, and those, which it updates."""
    optimizers = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rowwise_adagrad": importlib.import_module("torchrec.optim").RowWiseAdagrad,
        "adam": torch.optim.Adam,
    }
    device = tables[0].device
    if tables[0].dtype != torch.float32:
        raise Unsupported("keeps all tables in fp32")
    if optimizer == "adam" and device.type == "cpu":
        raise Unsupported("no adam on a CPU")
    arguments = {"lr": lr} if optimizer == "sgd" else {"lr": lr, "eps": 1e-8}
    module = importlib.import_module("torchrec.modules.fused_embedding_modules").FusedEmbeddingBagCollection(
        _configs(tables, features, mode), optimizers[optimizer], arguments, device=device
    )
    copies = [module.state_dict()[f"embedding_bags.t{t}.weight"] for t in range(len(tables))]
    for copy, table in zip(copies, tables, strict=True):
        copy.copy_(table)
    return module, copies


def _configs(tables: Sequence[Tensor], features: Sequence[Sequence[str]], mode: str) -> list[Any]:
    configs = importlib.import_module("torchrec.modules.embedding_configs")
    return [
        configs.EmbeddingBagConfig(
            name=f"t{t}",
            num_embeddings=len(table),
            embedding_dim=table.shape[1],
            feature_names=list(names),
            pooling=configs.PoolingType.SUM if mode == "sum" else configs.PoolingType.MEAN,
        )
        for t, (table, names) in enumerate(zip(tables, features, strict=True))
    ]
