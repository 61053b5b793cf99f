"""What TorchRec and FBGEMM call an optimizer, and what we call it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type

from recsys_ops.embedding_bag_collection.optimizers import RowOptimizer
from recsys_ops.embedding_bag_collection.torchrec_optimizers import PLAIN_UPDATE, optimizer_named

# Of FBGEMM's memory and caches, or of the lookup; no optimizer knows them.
NOT_OF_OPTIMIZERS = frozenset(
    {
        "bounds",
        "bounds_check_mode",
        "cache_algorithm",
        "cache_load_factor",
        "cache_precision",
        "cache_reserved_memory",
        "embedding_table_index_type",
        "embedding_table_offset_type",
        "enforce_hbm",
        "multipass_prefetch_config",
        "output_dtype",
        "prefetch_pipeline",
    }
)


def optimizer_of(fused_params: Mapping[str, Any]) -> RowOptimizer:
    """The optimizer that TorchRec's ``fused_params`` ask for, or an optimizer's class and arguments.

    Args:
        fused_params: ``"optimizer"``: one of ``recsys_ops.optim`` and nothing else; or FBGEMM's
            ``EmbOptimType`` or the class of an optimizer of PyTorch or TorchRec (by default SGD, as in
            FBGEMM), with ``learning_rate`` or ``lr``, ``eps``, ``beta1`` and ``beta2`` or ``betas``,
            ``weight_decay``, ``weight_decay_mode`` and ``stochastic_rounding``, which have FBGEMM's
            meanings and defaults. What says how FBGEMM stores tables is ignored.

    Raises:
        ValueError: we have no such optimizer, or FBGEMM's would ignore what is asked for.

    Example:
        >>> from fbgemm_gpu.split_embedding_configs import EmbOptimType
        >>> optimizer = optimizer_of({"optimizer": EmbOptimType.ADAM, "learning_rate": 0.1, "beta1": 0.8})
        >>> type(optimizer).__name__, optimizer.lr, optimizer.betas
        ('Adam', 0.1, (0.8, 0.999))
    """
    given = {name: value for name, value in fused_params.items() if name not in NOT_OF_OPTIMIZERS}
    named = given.pop("optimizer", EmbOptimType.EXACT_SGD)
    if isinstance(named, RowOptimizer):
        if given:
            raise ValueError(f"optimizer_of: expected nothing beside {named}, got {sorted(given)}")
        return named
    if isinstance(named, type):
        named = optimizer_type_to_emb_opt_type(named)
    betas = given.pop("beta1", 0.9), given.pop("beta2", 0.999)
    mode = given.pop("weight_decay_mode", WeightDecayMode.NONE)
    numbers = {
        "lr": given.pop("lr", given.pop("learning_rate", 0.01)),
        "eps": given.pop("eps", 1e-8),
        "betas": tuple(given.pop("betas", betas)),
        "weight_decay": given.pop("weight_decay", 0.0),
        "weight_decay_mode": WeightDecayMode(mode).value,
        "stochastic_rounding": given.pop("stochastic_rounding", True),
    }
    given.pop("max_gradient", None)  # of the clipping, which ours does not do
    if asked := sorted(name for name, value in given.items() if value and value != PLAIN_UPDATE.get(name)):
        raise ValueError(f"optimizer_of: {named} knows no {', '.join(asked)} here")
    try:
        return optimizer_named(str(named), **numbers)
    except ValueError as error:
        raise ValueError(f"optimizer_of: {error}") from None
