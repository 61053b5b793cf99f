"""Our collection as the kernel of TorchRec's sharded one: ``DistributedModelParallel`` with our lookups.

TorchRec distributes features and pooled rows as ever; what each rank looks up and updates of its shards
is ours. TorchRec leaves ``"customized_kernel"`` to others: so ours goes by that name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    BoundsCheckMode,
    EmbeddingLocation,
    PoolingMode,
)
from torch import Tensor
from torchrec.distributed import embeddingbag
from torchrec.distributed.batched_embedding_kernel import (
    BaseBatchedEmbeddingBag,
    BatchedFusedEmbeddingBag,
    EmbeddingFusedOptimizer,
)
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig
from torchrec.distributed.sharding.cw_sharding import CwPooledEmbeddingSharding
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.types import ParameterSharding, ShardedTensor, ShardingEnv, ShardingType
from torchrec.modules.embedding_configs import data_type_to_dtype, data_type_to_sparse_type
from torchrec.modules.embedding_modules import EmbeddingBagCollection as TorchRecCollection
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_ops.embedding_bag_collection import modules
from recsys_ops.embedding_bag_collection.row_optimizers import STATES
from recsys_ops.embedding_bag_collection.torchrec_modules import table_config
from recsys_ops.torchrec.collection import EmbeddingBagCollection
from recsys_ops.torchrec.optimizers import optimizer_of

CUSTOMIZED = EmbeddingComputeKernel.CUSTOMIZED_KERNEL
_SHARDING_TYPES = (
    ShardingType.DATA_PARALLEL,
    ShardingType.TABLE_WISE,
    ShardingType.COLUMN_WISE,
    ShardingType.ROW_WISE,
)


class _Shards(modules.EmbeddingBagCollection):
    """The shards of one group on this rank, with the methods of FBGEMM's module that TorchRec calls."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pooling: PoolingMode,
        rows: list[int],
        columns: list[int],
        device: torch.device | None,
    ) -> None:
        params = config.fused_params or {}
        dtype = data_type_to_dtype(config.data_type)
        # A rank may have several shards of one table, and groups name a feature once for each.
        tables = [
            dataclasses.replace(
                table_config(table),
                name=f"{number}_{table.name}",
                num_embeddings=rows[number],
                embedding_dim=columns[number],
                features=[f"{number}_{feature}" for feature in table.feature_names],
                # Not the table's: shards of rows are summed, and TorchRec makes means of them later.
                pooling=pooling.name.lower(),
            )
            for number, table in enumerate(config.embedding_tables)
        ]
        super().__init__(
            tables,
            optimizer_of(params),
            "meta",
            output_dtype=params.get("output_dtype", SparseType.FP32).as_dtype(),
            bounds=_bounds(params),
        )
        sizes = [r * c for r, c in zip(rows, columns, strict=True)]
        # One tensor for all: TorchRec's parameter of a table is a slice that holds all its shards.
        self.weights_host = torch.empty(sum(sizes), dtype=dtype, device=device)
        self.weights_physical_offsets = [sum(sizes[:number]) for number in range(len(sizes))]
        self.weights_precision = data_type_to_sparse_type(config.data_type)
        self.embedding_specs = [
            (r, c, EmbeddingLocation.HOST.value, None) for r, c in zip(rows, columns, strict=True)
        ]
        parts = self.weights_host.split(sizes)
        self.adopt([part.view(r, c) for part, r, c in zip(parts, rows, columns, strict=True)])

    def forward(  # type: ignore[override]
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        batch_sizes: list[int] | None = None,
    ) -> Any:
        """FBGEMM's names of the arguments."""
        return super().forward(indices, offsets, per_sample_weights, batch_sizes=batch_sizes)

    def split_embedding_weights(self) -> list[Tensor]:
        """The shards' weights."""
        return [weight.detach() for weight in self.weights]

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """The shards' states, and the step that a bias correction or a random rounding goes on from."""
        fused = self._fused
        names = list(STATES[fused.config.kind])
        return [
            {name: fused.state[weight][name] for name in names}
            | ({"step": fused.count.view(1)} if names else {})
            for weight in self.weights
        ]

    def get_learning_rate(self) -> float:
        """That of the next update."""
        return float(self._fused.param_groups[0]["lr"])

    def set_learning_rate(self, lr: float) -> None:
        """Set that of the next update."""
        self._fused.param_groups[0]["lr"] = lr

    def set_optimizer_step(self, step: int) -> None:
        """Set how many updates there have been."""
        self._fused.count.fill_(step)

    def update_hyper_parameters(self, params_dict: Mapping[str, Any]) -> None:
        """Set numbers of the optimizer, by FBGEMM's names."""
        group = self._fused.param_groups[0]
        for name, value in params_dict.items():
            if name in ("beta1", "beta2"):
                betas = list(group["betas"])
                betas[name == "beta2"] = value
                group["betas"] = tuple(betas)
            elif name in ("lr", "eps"):
                group[name] = value
            else:
                raise ValueError(f"update_hyper_parameters: expected lr, eps, beta1 or beta2, got {name!r}")

    def flush(self) -> None:
        """Nothing: there is no cache."""

    def reset_cache_states(self) -> None:
        """Nothing: there is no cache."""

    @property
    def _fused(self) -> Any:
        assert self.fused_optimizer is not None
        return self.fused_optimizer


def _bounds(params: Mapping[str, Any]) -> str:
    mode = params.get("bounds_check_mode")
    if mode is not None and mode != BoundsCheckMode.FATAL:
        raise ValueError(
            f"fused_params: expected bounds_check_mode FATAL, got {mode}: FBGEMM then changes ids; "
            "'bounds': 'drop' leaves them out"
        )
    return str(params.get("bounds", "error"))


class _Kernel(BatchedFusedEmbeddingBag):
    """What TorchRec calls a kernel: the tables of one group on this rank."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        sharding_type: ShardingType | None = None,
    ) -> None:
        # Not that of the parent, which allocates FBGEMM's tables.
        BaseBatchedEmbeddingBag.__init__(self, config, pg, device, sharding_type)
        self._emb_module: Any = _Shards(config, self._pooling, self._local_rows, self._local_cols, device)
        self._optim = EmbeddingFusedOptimizer(config, self._emb_module, pg)
        self.init_parameters()

    def forward(
        self, features: KeyedJaggedTensor, vbe_output: Tensor | None = None, vbe_output_offsets: Any = None
    ) -> Tensor:
        """[B, sum of D]; of features with different batch sizes a vector, rank after rank."""
        if not features.variable_stride_per_key():
            return super().forward(features)
        weights = features.weights_or_none()
        blocks = self._emb_module(
            features.values(), features.offsets(), weights, batch_sizes=features.stride_per_key()
        )
        of_ranks = [
            block.split(sizes)
            for block, sizes in zip(blocks, features.stride_per_key_per_rank(), strict=True)
        ]
        return torch.cat([part.flatten() for of_rank in zip(*of_ranks, strict=True) for part in of_rank])


class _Lookup(GroupedPooledEmbeddingsLookup):
    """All lookups of one sharding type on this rank."""

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: dist.ProcessGroup | None,
        sharding_type: ShardingType | None,
        env: ShardingEnv | None,
    ) -> Any:
        if config.compute_kernel == CUSTOMIZED:
            return _Kernel(config, pg, device, sharding_type)
        return super()._create_embedding_kernel(config, device, pg, sharding_type, env)

    def _forward_with_vbe_merging(
        self, features_by_group: list[KeyedJaggedTensor], device: torch.device
    ) -> Tensor:
        return self._merge_variable_batch_embeddings(
            self._forward(features_by_group), self._vbe_splits(features_by_group)
        )


class ShardedEmbeddingBagCollection(embeddingbag.ShardedEmbeddingBagCollection):
    """TorchRec's sharded collection; tables with the kernel ``"customized_kernel"`` are looked up by ours."""

    module_sharding_plan: Any

    def __init__(self, module: EmbeddingBagCollectionInterface, *args: Any, **kwargs: Any) -> None:
        super().__init__(module, *args, **kwargs)
        # TorchRec does so for modules on a GPU alone, and forgets the weights of others.
        if module.device.type == "cpu":
            self.load_state_dict(module.state_dict(), strict=False)

    def _create_lookups(self) -> None:
        for sharding in self._embedding_shardings:
            if isinstance(sharding, DpPooledEmbeddingSharding):
                lookup = sharding.create_lookup()
            elif isinstance(
                sharding, (TwPooledEmbeddingSharding, CwPooledEmbeddingSharding, RwPooledEmbeddingSharding)
            ):
                rowwise = isinstance(sharding, RwPooledEmbeddingSharding)
                lookup = _Lookup(
                    grouped_configs=sharding._grouped_embedding_configs,
                    pg=sharding._pg,
                    device=self._device,
                    sharding_type=ShardingType.ROW_WISE if rowwise else None,
                    env=self._env,
                )
            else:
                raise ValueError(
                    f"EmbeddingBagCollectionSharder: expected one of {[t.value for t in _SHARDING_TYPES]}, "
                    f"got {type(sharding).__name__}"
                )
            self._lookups.append(lookup)

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        # TorchRec leaves the state dict of customised kernels out; that of fused ones is what ours need.
        plan = self.module_sharding_plan
        self.module_sharding_plan = type(plan)(
            {
                name: dataclasses.replace(sharding, compute_kernel=EmbeddingComputeKernel.FUSED.value)
                if sharding.compute_kernel == CUSTOMIZED.value
                else sharding
                for name, sharding in plan.items()
            }
        )
        super()._initialize_torch_state(skip_registering)
        self.module_sharding_plan = plan


class EmbeddingBagCollectionSharder(embeddingbag.EmbeddingBagCollectionSharder):
    """For ``DistributedModelParallel``: shards a collection, and looks its shards up with our kernels.

    Table-wise, column-wise, row-wise; data-parallel tables stay TorchRec's. The backward
    updates the tables. With column-wise sharding, optimizers that reduce a row (row-wise Adagrad, LAMB,
    ``max_gradient_norm``) reduce the columns of a shard, as with TorchRec's own kernel. The random bits of
    stochastic rounding are those of a shard: half-precision tables train alike on average, not to the bit.

    Args:
        fused_params: the optimizer, as in ``optimizer_of``; ``"bounds"`` (``"error"`` or ``"drop"``) and
            ``"output_dtype"``.
        module_type: what it shards: TorchRec's collection or ours, see ``sharders``.
        options: ``qcomm_codecs_registry``, ``sharded_module_order_overwrite``.

    Raises:
        ValueError: ``fused_params`` are not as above, or ask twice for an optimizer.

    Example:
        >>> import recsys_ops
        >>> optimizer = recsys_ops.optim.RowWiseAdagrad(lr=0.1)
        >>> sharder = EmbeddingBagCollectionSharder({"optimizer": optimizer})
        >>> sharder.compute_kernels("row_wise", "cpu")
        ['customized_kernel']
    """

    def __init__(
        self,
        fused_params: Mapping[str, Any] | None = None,
        module_type: type[torch.nn.Module] = TorchRecCollection,
        **options: Any,
    ) -> None:
        super().__init__(dict(fused_params or {}), **options)
        self._module_type = module_type
        optimizer_of(self.fused_params or {})
        _bounds(self.fused_params or {})

    @property
    def module_type(self) -> Any:
        return self._module_type

    @property
    def sharded_module_type(self) -> Any:
        return ShardedEmbeddingBagCollection

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [sharding_type.value for sharding_type in _SHARDING_TYPES]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return [EmbeddingComputeKernel.DENSE.value]
        return [CUSTOMIZED.value]

    def shard(
        self,
        module: EmbeddingBagCollectionInterface,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """Shard a collection by a plan. Of ours its optimizer is taken unless there is another, afresh."""
        fused_params = dict(self.fused_params or {})
        fused = getattr(module, "fused_optimizer", None)
        if fused is not None and "optimizer" not in fused_params:
            fused_params["optimizer"] = fused.config
        return ShardedEmbeddingBagCollection(
            module,
            params,
            env,
            fused_params=fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            sharded_module_order_overwrite=self._sharded_module_order_overwrite,
        )


def gather(state_dict: Mapping[str, Any], rank: int = 0) -> dict[str, Any]:
    """On one rank the whole tensors of a sharded model's state dict, on the others nothing.

    All ranks call it, with state dicts of the same keys, those of ``DistributedModelParallel`` for one; what
    they give loads into the model that was sharded.

    Args:
        state_dict: with ``ShardedTensor``; anything else is given back as it is.
        rank: that gets the tensors, on the CPU.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> gather({"over.bias": torch.zeros(2)})
        {'over.bias': tensor([0., 0.])}
        >>> dist.destroy_process_group()
    """
    result = {}
    here = dist.get_rank() == rank
    for name, value in state_dict.items():
        if isinstance(value, ShardedTensor):
            metadata = value.metadata()
            dtype = metadata.tensor_properties.dtype
            whole = torch.empty(metadata.size, dtype=dtype) if here else None
            value.gather(rank, whole, dtype=dtype)
            value = whole
        if here:
            result[name] = value
    return result


def sharders(fused_params: Mapping[str, Any] | None = None) -> list[Any]:
    """Our sharders of TorchRec's collections and of ours, as ``DistributedModelParallel`` takes them.

    Args:
        fused_params: as in ``EmbeddingBagCollectionSharder``.

    Example:
        >>> import recsys_ops
        >>> [sharder.module_type.__module__.split(".")[0] for sharder in sharders()]
        ['torchrec', 'recsys_ops']
    """
    return [
        EmbeddingBagCollectionSharder(fused_params, module_type)
        for module_type in (TorchRecCollection, EmbeddingBagCollection)
    ]
