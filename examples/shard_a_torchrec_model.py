"""Shards a TorchRec model over two processes, with our lookups and fused optimizer on each.

Needs TorchRec, see accelerate_a_torchrec_model.py. Here both processes are on this machine's CPU and talk
by gloo; on GPUs, start one process for each with torchrun, say "nccl", and give each its device.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings

import torch
import torch.distributed as dist
import torchrec
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

import recsys_ops
from recsys_ops.torchrec import gather, sharders, sharding_planner

RANKS, STEPS, BATCH, DIM = 2, 40, 128, 16  # BATCH samples of all ranks together
TABLES = {"user": 3_000, "product": 200, "word": 500}
SHARDING = {"user": "row_wise", "product": "column_wise", "word": "table_wise"}
OPTIMIZER = recsys_ops.optim.Adam(lr=0.03)


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = torchrec.EmbeddingBagCollection(
            [
                EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[name])
                for name, rows in TABLES.items()
            ]
        )
        self.tower = nn.Sequential(nn.Linear(len(TABLES) * DIM, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        pooled = self.tables(features)
        return self.tower(torch.cat([pooled[name] for name in TABLES], dim=1)).squeeze(1)


def make_batch(step: int, samples: slice) -> tuple[KeyedJaggedTensor, Tensor]:
    """Some samples of a step: a user, what they viewed, and a query; and whether they clicked."""
    generator = torch.Generator().manual_seed(step)
    lengths = {
        name: torch.randint(1, 2 if name == "user" else 4, (BATCH,), generator=generator) for name in TABLES
    }
    bags = {
        name: [(torch.rand(n, generator=generator) ** 2 * rows).long() for n in lengths[name].tolist()]
        for name, rows in TABLES.items()
    }
    clicked = torch.stack([bag[0] % 2 for bag in bags["product"]]).float()
    features = KeyedJaggedTensor(
        list(TABLES),
        torch.cat([bag for of_feature in bags.values() for bag in of_feature[samples]]),
        lengths=torch.cat([of_feature[samples] for of_feature in lengths.values()]),
    )
    return features, clicked[samples]


def train(model: nn.Module, tower: torch.optim.Optimizer, samples: slice) -> list[float]:
    """The tables are updated within the backward, the tower by an optimizer."""
    losses = []
    for step in range(STEPS):
        features, clicked = make_batch(step, samples)
        loss = nn.functional.binary_cross_entropy_with_logits(model(features), clicked)
        tower.zero_grad()
        loss.backward()
        tower.step()
        losses.append(loss.item())
    return losses


def shard(model: nn.Module) -> DistributedModelParallel:
    """What TorchRec does of itself, but for ``sharders`` and ``sharding_planner``, which are ours."""
    ours = sharders({"optimizer": OPTIMIZER})
    constraints = {
        name: ParameterConstraints(sharding_types=[kind], min_partition=DIM // RANKS)
        for name, kind in SHARDING.items()
    }
    topology = Topology(world_size=RANKS, local_world_size=RANKS, compute_device="cpu")
    planner = sharding_planner(topology, BATCH // RANKS, constraints, debug=False)
    plan = planner.collective_plan(model, ours, dist.GroupMember.WORLD)
    if dist.get_rank() == 0:
        print(plan)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=ours)


def work(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)

    torch.manual_seed(0)
    model = shard(Recommender())
    tower = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    )
    samples = BATCH // RANKS
    losses = train(model, tower, slice(rank * samples, (rank + 1) * samples))
    print(f"rank {rank}: loss {losses[0]:.4f}, after {STEPS} steps {losses[-1]:.4f}")
    weights = gather(model.state_dict())
    if rank == 0:
        check(weights)
    dist.destroy_process_group()


def check(weights: dict[str, Tensor]) -> None:
    """Compare with one process, which trains all samples of each step."""
    gathered = Recommender()
    gathered.load_state_dict(weights)
    torch.manual_seed(0)
    alone = Recommender()
    alone.tables = recsys_ops.torchrec.from_torchrec(alone.tables, OPTIMIZER)
    train(alone, torch.optim.SGD(alone.tower.parameters(), lr=0.5), slice(None))
    # Two ranks add up in another order. Adam's steps are of the size of lr however small a gradient is, so
    # last bits of gradients that nearly cancel show.
    torch.testing.assert_close(gathered.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-4)
    for name, weight in alone.state_dict().items():
        difference = (gathered.state_dict()[name] - weight).abs().max().item()
        print(f"{name}: differs from one process by at most {difference:.1e}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)


if __name__ == "__main__":
    main()
