"""TorchRec's planner, told of our kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.constants import kernel_bw_lookup
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.estimator.config import EmbeddingPerfEstimatorConfig
from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimator
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ParameterConstraints


def sharding_planner(
    topology: Topology,
    batch_size: int = 512,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    **options: Any,
) -> EmbeddingShardingPlanner:
    """TorchRec's ``EmbeddingShardingPlanner``, which else refuses to estimate customised kernels.

    It reckons with the bandwidth that it assumes of FBGEMM's fused kernel: an assumption, no measurement.

    Args:
        topology: the devices.
        batch_size: of one rank.
        constraints: of tables, by name.
        options: of ``EmbeddingShardingPlanner``, but not ``enumerator``.

    Example:
        >>> from torchrec.distributed.planner import Topology
        >>> planner = sharding_planner(Topology(world_size=2, compute_device="cpu"), batch_size=64)
    """
    device, known = topology.compute_device, dict(constraints or {})
    config = EmbeddingPerfEstimatorConfig()
    bandwidth = kernel_bw_lookup(
        device,
        EmbeddingComputeKernel.FUSED.value,
        topology.hbm_mem_bw,
        topology.ddr_mem_bw,
        topology.hbm_to_ddr_mem_bw,
    )
    if bandwidth is None:
        raise ValueError(f"sharding_planner: TorchRec has no bandwidth for {device!r}")
    config.kernel_device_bandwidths = {(device, EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value): bandwidth}
    estimators = [
        EmbeddingPerfEstimator(topology, known, config=config),
        EmbeddingStorageEstimator(topology, known),
    ]
    enumerator = EmbeddingEnumerator(topology, batch_size, known, estimators)
    return EmbeddingShardingPlanner(topology, batch_size, enumerator, constraints=known, **options)
