"""What TorchRec and FBGEMM call an optimizer, and what we call it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type

from recsys_ops.embedding_bag_collection.optimizers import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    PartialRowWiseAdam,
    RowOptimizer,
    RowWiseAdagrad,
)

OPTIMIZERS: dict[EmbOptimType, type[RowOptimizer]] = {
    EmbOptimType.SGD: SGD,
    EmbOptimType.EXACT_SGD: SGD,
    EmbOptimType.EXACT_ADAGRAD: Adagrad,
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: RowWiseAdagrad,
    EmbOptimType.ADAM: Adam,
    EmbOptimType.PARTIAL_ROWWISE_ADAM: PartialRowWiseAdam,
    EmbOptimType.LAMB: LAMB,
}

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
            ``weight_decay``, ``weight_decay_mode``, ``stochastic_rounding``, ``gradient_clipping`` and
            ``max_gradient``, which have FBGEMM's meanings and defaults. What says how FBGEMM stores
            tables is ignored.

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
    if named not in OPTIMIZERS:
        known = [str(kind) for kind in OPTIMIZERS]
        raise ValueError(f"optimizer_of: expected optimizer to be one of {known}, got {str(named)!r}")
    kind = OPTIMIZERS[named]
    arguments: dict[str, Any] = {
        "lr": given.pop("lr", given.pop("learning_rate", 0.01)),
        "stochastic_rounding": given.pop("stochastic_rounding", True),
    }
    eps = given.pop("eps", 1e-8)
    betas = given.pop("beta1", 0.9), given.pop("beta2", 0.999)
    betas = given.pop("betas", betas)
    if kind is not SGD:
        arguments["eps"] = eps
    if kind in (Adam, PartialRowWiseAdam, LAMB):
        arguments["betas"] = tuple(betas)
    max_gradient = given.pop("max_gradient", 1.0)
    if given.pop("gradient_clipping", False):
        arguments["max_gradient"] = max_gradient
    decay = given.pop("weight_decay", 0.0)
    mode = WeightDecayMode(given.pop("weight_decay_mode", WeightDecayMode.NONE))
    arguments |= _weight_decay(kind, decay, mode)
    if asked := sorted(name for name, value in given.items() if value):
        raise ValueError(f"optimizer_of: {kind.__name__} knows no {', '.join(asked)}")
    return kind(**arguments)


def _weight_decay(kind: type[RowOptimizer], decay: float, mode: WeightDecayMode) -> dict[str, Any]:
    """The arguments that decay weights as FBGEMM does."""
    if not decay:
        return {}
    if kind in (Adam, PartialRowWiseAdam, LAMB) and mode in (WeightDecayMode.NONE, WeightDecayMode.DECOUPLE):
        return {"weight_decay": decay, "weight_decay_mode": "decoupled"}
    if kind is RowWiseAdagrad and mode in (WeightDecayMode.L2, WeightDecayMode.DECOUPLE):
        return {
            "weight_decay": decay,
            "weight_decay_mode": "l2" if mode == WeightDecayMode.L2 else "decoupled",
        }
    raise ValueError(
        f"optimizer_of: FBGEMM ignores weight_decay={decay} for {kind.__name__} with mode {mode.name}; "
        "give 0, or an optimizer of recsys_ops.optim, which says what is meant"
    )
