"""What FBGEMM, and TorchRec with it, calls an optimizer, and what we call it; this imports neither."""

from __future__ import annotations

import dataclasses
from typing import Any

from recsys_ops.embedding_bag_collection.optimizers import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    PartialRowWiseAdam,
    RowOptimizer,
    RowWiseAdagrad,
)

# By the names that ``EmbOptimType`` gives them.
OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    "sgd": SGD,
    "exact_sgd": SGD,
    "exact_adagrad": Adagrad,
    "exact_row_wise_adagrad": RowWiseAdagrad,
    "adam": Adam,
    "partial_row_wise_adam": PartialRowWiseAdam,
    "lamb": LAMB,
}

# What FBGEMM may do in an update that ours does not, and its value where it does not do that. Its clipping
# clamps the gradients of pooled rows before they are summed, our ``max_gradient`` those of a table's rows.
PLAIN_UPDATE = {
    "gradient_clipping": False,
    "max_norm": 0.0,
    "learning_rate_mode": -1,
    "counter_halflife": -1,
    "weight_norm_coefficient": 0.0,
    "use_rowwise_bias_correction": False,
}

_DECAYS = {1: "l2", 2: "decoupled"}  # by the numbers of ``WeightDecayMode``, where 0 says nothing


def optimizer_named(
    name: str, *, weight_decay: float = 0.0, weight_decay_mode: int = 0, **numbers: Any
) -> RowOptimizer:
    """FBGEMM's optimizer as ours.

    Args:
        name: one of ``OPTIMIZERS``.
        weight_decay, weight_decay_mode: as FBGEMM means them.
        numbers: fields of ``RowOptimizer``; what this optimizer does not have, FBGEMM ignores.

    Raises:
        ValueError: there is no such optimizer, or FBGEMM's ignores the weight decay.

    Example:
        >>> optimizer = optimizer_named("exact_sgd", lr=0.5, eps=1e-8, stochastic_rounding=False)
        >>> type(optimizer).__name__, optimizer.lr, optimizer.stochastic_rounding
        ('SGD', 0.5, False)
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"expected optimizer to be one of {list(OPTIMIZERS)}, got {name!r}")
    kind = OPTIMIZERS[name]
    known = {field.name for field in dataclasses.fields(kind)}
    arguments = {key: value for key, value in numbers.items() if key in known}
    if weight_decay:
        mode = _DECAYS.get(weight_decay_mode)
        if "betas" in known and weight_decay_mode in (0, 2):
            mode = "decoupled"
        elif kind is not RowWiseAdagrad or mode is None:
            raise ValueError(
                f"FBGEMM ignores weight_decay={weight_decay} for {kind.__name__} with weight_decay_mode "
                f"{weight_decay_mode}; give 0, or an optimizer of recsys_ops.optim, which says what is meant"
            )
        arguments |= {"weight_decay": weight_decay, "weight_decay_mode": mode}
    return kind(**arguments)
