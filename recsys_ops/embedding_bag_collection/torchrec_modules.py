"""TorchRec's unsharded collections as ours, on the very same tables; this never imports TorchRec."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from recsys_ops.embedding_bag_collection import keyed
from recsys_ops.embedding_bag_collection.autograd import FusedUpdate
from recsys_ops.embedding_bag_collection.modules import EmbeddingBagCollection, TableConfig
from recsys_ops.embedding_bag_collection.optimizers import FusedOptimizer, RowOptimizer
from recsys_ops.embedding_bag_collection.row_optimizers import STATES
from recsys_ops.embedding_bag_collection.torchrec_optimizers import (
    OPTIMIZERS,
    PLAIN_UPDATE,
    optimizer_named,
)

_MODULES = {
    "EmbeddingBagCollection": "torchrec.modules.embedding_modules",
    "FusedEmbeddingBagCollection": "torchrec.modules.fused_embedding_modules",
}
# The dtypes of tables by the names that TorchRec's ``DataType`` gives them, and its poolings.
DTYPES = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}
_POOLINGS = ("SUM", "MEAN")


def torchrec_class(module: Any) -> type | None:
    """TorchRec's collection or its fused one, whichever a module or a class is one of, or None."""
    kind = module if isinstance(module, type) else type(module)
    for name, where in _MODULES.items():
        theirs = getattr(sys.modules.get(where), name, None)
        if theirs is not None and issubclass(kind, theirs):
            return theirs
    return None


def is_fused(theirs: nn.Module) -> bool:
    """Whether this is a ``FusedEmbeddingBagCollection``."""
    return hasattr(theirs, "_emb_modules")


def table_config(config: Any, weight: Tensor | None = None) -> TableConfig:
    """What TorchRec's configuration of a table says, as ours; a weight says its own dtype.

    Raises:
        ValueError: it says something that ours cannot.
    """
    pooling = config.pooling.value
    # TorchRec keeps BF16 tables in FP16, whatever their configurations say.
    data_type = config.data_type.value if weight is None else _data_type(weight)
    for name, got, known in (
        ("pooling", pooling, _POOLINGS),
        ("data_type", data_type, tuple(DTYPES)),
        ("use_virtual_table", config.use_virtual_table, (False,)),
    ):
        if got not in known:
            expected = " or ".join(map(str, known))
            raise ValueError(f"table {config.name!r}: expected {name} {expected}, got {got}")
    return TableConfig(
        config.name,
        config.num_embeddings,
        config.embedding_dim,
        tuple(config.feature_names),
        pooling.lower(),
        DTYPES[data_type],
        config.init_fn,
    )


def _data_type(weight: Tensor) -> str:
    return next((name for name, dtype in DTYPES.items() if dtype == weight.dtype), str(weight.dtype))


def states_of(tables: Any) -> list[list[Tensor]]:
    """What the optimizer of FBGEMM's module keeps of each table, in the order of ``STATES``."""
    of_tables = tables.split_optimizer_states() or [()] * len(tables.embedding_specs)
    return [[state.detach() for state in states] for states in of_tables]


def why_not_ours(theirs: Any, *, optimizer: bool = True) -> str | None:
    """What a collection of TorchRec's does that ours does not, as a clause, or None.

    Without ``optimizer`` that of a fused one does not matter.
    """
    kind = torchrec_class(theirs)
    assert kind is not None
    definer = next(c for c in type(theirs).__mro__ if "forward" in vars(c) and not issubclass(c, Accelerated))
    if definer.forward is not kind.forward or "forward" in vars(theirs):  # type: ignore[attr-defined]
        return f"{type(theirs).__name__} has a forward of its own"
    shapes = {c.name: (c.num_embeddings, c.embedding_dim) for c in theirs.embedding_bag_configs()}
    if shapes != {name: tuple(bag.weight.shape) for name, bag in theirs.embedding_bags.items()}:
        return "its tables are not those of its configuration"
    weights = [bag.weight for bag in theirs.embedding_bags.values()]
    if len({id(weight) for weight in weights}) < len(weights):
        return "two of its tables share a weight"
    for name, weight in zip(theirs.embedding_bags, weights, strict=True):
        if type(weight) is not nn.Parameter or weight.dtype not in DTYPES.values():
            dtype = str(weight.dtype).removeprefix("torch.")
            return f"the weight of {name!r} is a {type(weight).__name__} of {dtype}"
    if is_fused(theirs):
        return (_why_not_optimizer(theirs) if optimizer else None) or _why_not_memory(theirs)
    return _why_not_bags(theirs)


def as_ours(theirs: Any) -> list[EmbeddingBagCollection]:
    """Collections of ours that hold the tables of TorchRec's: one, or one for each group of a fused one.

    Its tables and, of a fused one, its optimizer's state are not copied: what trains one trains
    the other.

    Raises:
        ValueError: it does something that ours does not.
    """
    if reason := why_not_ours(theirs):
        raise ValueError(f"EmbeddingBagCollection: expected what TorchRec's and ours both do, got: {reason}")
    if not is_fused(theirs):
        ours = _on_tables_of(theirs, theirs.embedding_bag_configs())
        ours.sparse = next(iter(theirs.embedding_bags.values())).sparse
        return [ours]
    result = []
    for module in theirs._emb_modules:
        ours = _on_tables_of(theirs, module._embedding_tables)
        ours.fused_optimizer = _OptimizerOfFbgemm(module._emb_module, ours.weights)
        result.append(ours)
    return result


class Accelerated:
    """Marks subclasses of other packages' modules that compute by ours, with a forward made for that."""

    __slots__ = ()  # so that instances may change their class


def forward_at_once(original: type) -> Callable[[Any, Any], Any]:
    """The forward of a subclass of TorchRec's: ours where it does the same, else that of ``original``."""

    def forward(self: Any, features: Any) -> Any:
        ours = _OURS.get(self)
        if ours is None:
            ours = _OURS[self] = [] if why_not_ours(self) else as_ours(self)
        if not _serves(ours, features):
            return original.forward(self, features)  # type: ignore[attr-defined]
        if len(ours) == 1:
            return ours[0](features)
        results = [collection(features) for collection in ours]
        # In this order, as TorchRec has them, whatever the names say.
        values = torch.cat([result.values() for result in results], 1)
        return type(results[0])(self._embedding_names, self._length_per_key, values)

    return forward


# Not on the modules, so that copies and checkpoints of them make their own.
_OURS: WeakKeyDictionary[Any, list[EmbeddingBagCollection]] = WeakKeyDictionary()


def _serves(ours: Sequence[EmbeddingBagCollection], features: Any) -> bool:
    """Whether ours does what TorchRec's would, whatever has changed since the swap."""
    if not ours or not keyed.is_keyed(features) or _has_any_global_hook():
        return False
    if features.variable_stride_per_key() or features.inverse_indices_or_none() is not None:
        return False
    return all(
        bag.weight.dtype == table.dtype
        and not has_hooks(bag)
        and (
            not isinstance(bag, nn.EmbeddingBag)
            or (bag.padding_idx is None and bag.max_norm is None and bag.mode == table.pooling)
        )
        for collection in ours
        for bag, table in zip(collection.embedding_bags.children(), collection.tables, strict=True)
    )


def changed_in_backward(theirs: Any) -> dict[str, Tensor]:
    """What a fused collection changes when it runs and trains, by name."""
    found: dict[str, Tensor] = {}
    for number, module in enumerate(theirs._emb_modules):
        tables = module._emb_module
        for config, weight, states in zip(
            module._embedding_tables, tables.split_embedding_weights(), states_of(tables), strict=True
        ):
            found[f"{config.name}.weight"] = weight.detach()
            found |= {f"{config.name}.state{i}": state for i, state in enumerate(states)}
        for name in ("iter", "iter_cpu", "learning_rate_tensor"):
            found[f"{name}{number}"] = getattr(tables, name)
    return found


def leaves_of_fused(theirs: Any) -> list[Tensor]:
    """What autograd must be asked for to make a fused collection train, TorchRec's or as ours."""
    return [p for module in theirs._emb_modules for p in module._emb_module.parameters() if p.requires_grad]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _on_tables_of(theirs: Any, configs: Sequence[Any]) -> EmbeddingBagCollection:
    bags = {config.name: theirs.embedding_bags[config.name] for config in configs}
    tables = [table_config(config, bags[config.name].weight) for config in configs]
    ours = EmbeddingBagCollection(
        tables, device="meta", is_weighted=theirs.is_weighted(), output_dtype=torch.float32
    )
    ours.embedding_bags = nn.ModuleDict(bags)
    return ours.train(theirs.training)


def _why_not_bags(theirs: Any) -> str | None:
    options: set[bool] = set()
    for config in theirs.embedding_bag_configs():
        name, bag = config.name, theirs.embedding_bags[config.name]
        if not isinstance(bag, nn.EmbeddingBag):
            return f"{name!r} is a {type(bag).__name__}"
        for option, plain in (("padding_idx", None), ("max_norm", None), ("scale_grad_by_freq", False)):
            if getattr(bag, option) != plain:
                return f"{name!r} has {option}={getattr(bag, option)}"
        if has_hooks(bag) or "forward" in vars(bag):
            return f"{name!r} has hooks"
        if not bag.include_last_offset or bag.mode != config.pooling.value.lower():
            return f"{name!r} is not as TorchRec makes it"
        options.add(bag.sparse)
    return "only some of its tables are sparse" if len(options) > 1 else None


def _why_not_optimizer(theirs: Any) -> str | None:
    for module in theirs._emb_modules:
        tables = module._emb_module
        name, arguments = str(tables.optimizer), tables.optimizer_args
        if name not in OPTIMIZERS:
            return f"its optimizer is {name}"
        if name == "lamb":
            return "its optimizer is lamb, and FBGEMM's leaves rows of zeros as they are"
        for option, plain in PLAIN_UPDATE.items():
            if getattr(arguments, option, plain) != plain:
                return f"its optimizer has {option}={getattr(arguments, option)}"
        decouples = name in ("adam", "partial_row_wise_adam") and arguments.weight_decay_mode in (0, 2)
        if arguments.weight_decay and not decouples:
            return f"its optimizer has weight_decay={arguments.weight_decay}, which FBGEMM may ignore"
    return None


def _why_not_memory(theirs: Any) -> str | None:
    for module in theirs._emb_modules:
        tables = module._emb_module
        if tables.lxu_cache_weights.numel():
            return "its tables are behind a cache"
        for table, memory in zip(module._embedding_tables, tables.split_embedding_weights(), strict=True):
            if theirs.embedding_bags[table.name].weight.data_ptr() != memory.data_ptr():
                return f"the weight of {table.name!r} is not what it trains"
    return None


def optimizer_of_tables(tables: Any) -> RowOptimizer:
    """The optimizer of FBGEMM's module as ours."""
    arguments = tables.optimizer_args
    return optimizer_named(
        str(tables.optimizer),
        lr=tables.get_learning_rate(),
        eps=arguments.eps,
        betas=(arguments.beta1, arguments.beta2),
        weight_decay=arguments.weight_decay,
        weight_decay_mode=arguments.weight_decay_mode,
        stochastic_rounding=arguments.stochastic_rounding,
    )


class _OptimizerOfFbgemm(FusedOptimizer):
    """FBGEMM's state, learning rate and count of steps, used where they are."""

    def __init__(self, tables: Any, weights: Sequence[nn.Parameter]) -> None:
        self._tables = tables
        super().__init__(optimizer_of_tables(tables), weights)

    def reset_state(self) -> None:
        """Use FBGEMM's."""
        for weight, states in zip(self.weights, states_of(self._tables), strict=True):
            named = zip(STATES[self.config.kind], states, strict=True)
            self.state[weight] = {"step": self.count} | dict(named)

    def update(self) -> FusedUpdate:
        """What the next backward is told; like FBGEMM, it counts a step in the forward."""
        tables = self._tables
        self.param_groups[0]["lr"] = tables.get_learning_rate()
        if str(tables.optimizer) not in ("exact_sgd", "exact_adagrad"):
            if int(tables.iter_cpu) == 0:  # as FBGEMM does after a checkpoint was loaded
                tables.iter_cpu.copy_(tables.iter)
            self.count = tables.iter_cpu.cpu().view(()).clone()
            tables.iter_cpu.add_(1)
            tables.iter.add_(1)
        return super().update()
