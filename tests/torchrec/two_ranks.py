"""What two processes with gloo train, and the same in one process."""

from __future__ import annotations

import dataclasses
import datetime
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchrec
from torch import Tensor
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import DataType, PoolingType

from recsys_ops.optim import Adam, RowOptimizer, RowWiseAdagrad
from recsys_ops.torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
    gather,
    optimizer_of,
    sharding_planner,
)

RANKS, STEPS = 2, 4
KEYS = ("viewed", "bought", "query")
TABLES = ("products", "brands", "words")
CUSTOMIZED = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value


@dataclass(frozen=True)
class Case:
    """How a collection is sharded and trained.

    ``sharding`` is of each of TABLES; ``batches`` are the samples of each rank.
    """

    sharding: tuple[str, str, str]
    optimizer: Any  # one of recsys_ops.optim, or fused_params
    is_weighted: bool = False
    data_type: DataType = DataType.FP32
    planned: bool = False
    ours: bool = False
    batches: tuple[int, int] = (5, 5)
    deduplicated: bool = False
    meta: bool = False
    name: str = field(default="", compare=False)

    @property
    def fused_params(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer} if isinstance(self.optimizer, RowOptimizer) else self.optimizer

    @property
    def row_optimizer(self) -> RowOptimizer:
        return optimizer_of(self.fused_params)


def configs(case: Case) -> list[EmbeddingBagConfig]:
    """Three tables, pooled by sum and mean; a table with two features, a feature of two tables."""
    tables = (
        ("products", 13, 16, ["viewed", "bought"], PoolingType.SUM),
        ("brands", 11, 16, ["viewed"], PoolingType.SUM if case.is_weighted else PoolingType.MEAN),
        ("words", 12, 16, ["query"], PoolingType.SUM),
    )
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=dim,
            feature_names=features,
            pooling=pooling,
            data_type=case.data_type,
        )
        for name, rows, dim, features, pooling in tables
    ]


def initial_weights(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        config.name: torch.randn(config.num_embeddings, config.embedding_dim, generator=generator)
        for config in configs(case)
    }


def batch(case: Case, step: int, rank: int | None) -> KeyedJaggedTensor:
    """Of a rank, or of all; bags of 0 to 4 ids, of which many are the same.

    With ``deduplicated``, a rank has the bags of its first samples, fewer of each feature than of the one
    before, and the other samples have them again.
    """
    generator = torch.Generator().manual_seed(step)
    columns: list[list[tuple[Tensor, Tensor]]] = []  # for each feature its bags, each ids and weights
    for _ in KEYS:
        lengths = torch.randint(0, 5, (sum(case.batches),), generator=generator).tolist()
        columns.append(
            [
                (torch.randint(0, 11, (n,), generator=generator), torch.rand(n, generator=generator))
                for n in lengths
            ]
        )
    if case.deduplicated:
        for f, bags in enumerate(columns):
            for r in range(RANKS):
                start = sum(case.batches[:r])
                for sample in range(case.batches[r]):
                    bags[start + sample] = bags[start + sample % (case.batches[r] - f)]
    options: dict[str, Any] = {}
    if rank is not None:
        start, count = sum(case.batches[:rank]), case.batches[rank]
        columns = [bags[start : start + count] for bags in columns]
        if case.deduplicated:
            columns = [bags[: count - f] for f, bags in enumerate(columns)]
            inverse = torch.stack([torch.arange(count) % (count - f) for f in range(len(KEYS))])
            options = {
                "stride_per_key_per_rank": [[len(bags)] for bags in columns],
                "inverse_indices": (list(KEYS), inverse),
            }
    bags = [bag for of_feature in columns for bag in of_feature]
    return KeyedJaggedTensor(
        list(KEYS),
        torch.cat([ids for ids, _ in bags]),
        torch.cat([weights for _, weights in bags]) if case.is_weighted else None,
        torch.tensor([len(ids) for ids, _ in bags]),
        **options,
    )


def loss_of(case: Case, output: Tensor, rank: int | None) -> Tensor:
    """Of a rank's samples; of all, the mean of those of the ranks, as TorchRec averages gradients."""
    scale = torch.linspace(0.5, 1.5, sum(case.batches) * output.shape[1]).view(-1, output.shape[1])
    if rank is not None:
        scale = scale[sum(case.batches[:rank]) : sum(case.batches[: rank + 1])]
    return ((output - 0.3) * scale).square().sum() / (RANKS if rank is None else 1)


class Model(torch.nn.Module):
    def __init__(self, ebc: Any) -> None:
        super().__init__()
        self.ebc = ebc

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        output = self.ebc(features)
        return torch.cat([output[name] for name in names()], 1)


def names() -> list[str]:
    return ["viewed@products", "bought", "viewed@brands", "query"]


def unsharded(case: Case) -> Model:
    device = torch.device("meta" if case.meta else "cpu")
    if case.ours:
        ebc: Any = EmbeddingBagCollection(configs(case), case.is_weighted, device, case.row_optimizer)
    else:
        ebc = torchrec.EmbeddingBagCollection(configs(case), case.is_weighted, device)
    if not case.meta:
        for name, weight in initial_weights(case).items():
            ebc.embedding_bags[name].weight.data.copy_(weight)
    return Model(ebc)


def shard(case: Case, model: Model) -> DistributedModelParallel:
    params = None if case.ours else case.fused_params
    sharder = EmbeddingBagCollectionSharder(params, type(model.ebc))
    if case.planned:
        constraints = {
            name: ParameterConstraints(sharding_types=[kind], compute_kernels=[CUSTOMIZED], min_partition=4)
            for name, kind in zip(TABLES, case.sharding, strict=True)
        }
        topology = Topology(world_size=RANKS, local_world_size=RANKS, compute_device="cpu")
        planner = sharding_planner(topology, max(case.batches), constraints, debug=False)
        plan = planner.collective_plan(model, [sharder], dist.GroupMember.WORLD)
    else:
        kinds = {
            "table_wise": lambda number: table_wise(number % RANKS, compute_kernel=CUSTOMIZED),
            "row_wise": lambda number: row_wise(compute_kernel=CUSTOMIZED),
            # Two shards of each rank.
            "column_wise": lambda number: column_wise([0, 1, 0, 1], compute_kernel=CUSTOMIZED),
        }
        of_tables = {
            name: kinds[kind](number)
            for number, (name, kind) in enumerate(zip(TABLES, case.sharding, strict=True))
        }
        of_module = construct_module_sharding_plan(model.ebc, of_tables, sharder, RANKS, RANKS, "cpu")
        plan = ShardingPlan({"ebc": of_module})
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])
    if case.meta:
        whole = {f"ebc.embedding_bags.{name}.weight": w for name, w in initial_weights(case).items()}
        sharded.load_state_dict(whole)
    return sharded


def set_rate(case: Case, optimizer: torch.optim.Optimizer, step: int) -> None:
    """As a scheduler does; ``step`` tells TorchRec's optimizers to look."""
    for group in optimizer.param_groups:
        group["lr"] = case.row_optimizer.lr * (1 - 0.1 * step)
    optimizer.step()


def train(case: Case, model: DistributedModelParallel, rank: int, steps: range) -> None:
    for step in steps:
        set_rate(case, model.fused_optimizer, step)
        loss_of(case, model(batch(case, step, rank)), rank).backward()


def train_in_one(case: Case) -> dict[str, Tensor]:
    """The weights that our unsharded collection ends with.

    A column-wise shard is a table of its own where the optimizer reduces rows.
    """
    parts = {}
    for config, kind in zip(configs(case), case.sharding, strict=True):
        apart = kind == "column_wise" and isinstance(case.row_optimizer, RowWiseAdagrad)
        count = (RANKS if case.planned else 2 * RANKS) if apart else 1
        dim = config.embedding_dim // count
        parts[config.name] = [
            dataclasses.replace(config, name=f"{config.name}_{number}", embedding_dim=dim)
            for number in range(count)
        ]
    tables = [part for of_table in parts.values() for part in of_table]
    ebc = EmbeddingBagCollection(tables, case.is_weighted, optimizer=case.row_optimizer)
    for name, weight in initial_weights(case).items():
        pieces = weight.split(parts[name][0].embedding_dim, 1)
        for part, piece in zip(parts[name], pieces, strict=True):
            ebc.embedding_bags[part.name].weight.data.copy_(piece)
    shared = {f for f in KEYS if sum(f in part.feature_names for part in tables) > 1}
    columns = []
    for name in names():
        feature, _, table = name.partition("@")
        table = table or {"bought": "products", "query": "words"}[feature]
        columns += [f"{feature}@{part.name}" if feature in shared else feature for part in parts[table]]

    for step in range(STEPS):
        set_rate(case, ebc.fused_optimizer, step)
        output = ebc(batch(case, step, None))
        loss_of(case, torch.cat([output[column] for column in columns], 1), None).backward()
    return {
        name: torch.cat([ebc.embedding_bags[part.name].weight.data for part in of_table], 1)
        for name, of_table in parts.items()
    }


def train_in_two(case: Case, rank: int, folder: Path) -> dict[str, Any]:
    """The weights that two ranks end with, and whether a restored checkpoint trains on to the same."""
    model = shard(case, unsharded(case))
    assert type(model.module.ebc) is ShardedEmbeddingBagCollection
    train(case, model, rank, range(STEPS // 2))
    checkpoint = folder / f"{case.name}_{rank}.pt"
    torch.save([model.state_dict(), model.fused_optimizer.state_dict()], checkpoint)
    kinds = {type(value).__name__ for value in model.state_dict().values()}
    train(case, model, rank, range(STEPS // 2, STEPS))

    restored = shard(case, unsharded(case))
    weights, state = torch.load(checkpoint, weights_only=False)
    restored.load_state_dict(weights)
    restored.fused_optimizer.load_state_dict(state)
    train(case, restored, rank, range(STEPS // 2, STEPS))

    results = [gather(each.state_dict()) for each in (model, restored)]
    if rank != 0:
        return {}
    weights, again = ({name: w[f"ebc.embedding_bags.{name}.weight"] for name in TABLES} for w in results)
    plain = torchrec.EmbeddingBagCollection(configs(case), case.is_weighted)
    plain.load_state_dict({f"embedding_bags.{name}.weight": weights[name] for name in TABLES}, strict=True)
    state = {
        f"{key} {name}": tuple(value.size())
        for key, of_table in state["state"].items()
        for name, value in of_table.items()
    }
    return {"weights": weights, "restored": again, "state": state, "kinds": kinds}


def reload(case: Case, rank: int, folder: Path) -> dict[str, Any]:
    """Whether what torch.distributed.checkpoint saves loads into the same and other shardings."""
    model = shard(case, unsharded(case))
    train(case, model, rank, range(2))
    saved = {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}
    dcp.save(saved, checkpoint_id=folder / "dcp")
    trained = gather(model.state_dict())
    train(case, model, rank, range(2, STEPS))

    same = shard(case, unsharded(case))
    state = {"model": same.state_dict(), "optimizer": same.fused_optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp")
    same.load_state_dict(state["model"])
    same.fused_optimizer.load_state_dict(state["optimizer"])
    train(case, same, rank, range(2, STEPS))

    other = shard(dataclasses.replace(case, sharding=case.sharding[1:] + case.sharding[:1]), unsharded(case))
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp")
    other.load_state_dict(state["model"])

    plain = {"model": unsharded(case).state_dict()}
    dcp.load(plain, checkpoint_id=folder / "dcp")
    pairs = {
        "same sharding, trained on": (gather(same.state_dict()), gather(model.state_dict())),
        "other sharding": (gather(other.state_dict()), trained),
        "unsharded": (plain["model"], trained),
    }
    return {
        name: bool(there) and all(torch.equal(here[key], there[key]) for key in there)
        for name, (here, there) in pairs.items()
    }


def work(rank: int, cases: dict[str, Case], folder: Path) -> None:
    """One of two processes; leaves the results of all cases in ``results.pt``."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {
        name: train_in_two(dataclasses.replace(c, name=name), rank, folder) for name, c in cases.items()
    }
    results["reload"] = reload(Case(("row_wise", "column_wise", "table_wise"), Adam(lr=0.1)), rank, folder)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()
