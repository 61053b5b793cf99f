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
from recsys_ops.embedding_bag_collection.optimizers import (
    SGD,
    Adagrad,
    Adam,
    FusedOptimizer,
    RowOptimizer,
    RowWiseAdagrad,
)
from recsys_ops.embedding_bag_collection.row_optimizers import STATES

_MODULES = {
    "EmbeddingBagCollection": "torchrec.modules.embedding_modules",
    "FusedEmbeddingBagCollection": "torchrec.modules.fused_embedding_modules",
}
# What FBGEMM may do in an update that ours does not, and its value where it does not do that.
_PLAIN_UPDATE = {
    "gradient_clipping": False,
    "max_norm": 0.0,
    "learning_rate_mode": -1,
    "counter_halflife": -1,
    "weight_norm_coefficient": 0.0,
    "use_rowwise_bias_correction": False,
}


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


def why_not_ours(theirs: Any) -> str | None:
    """What a collection of TorchRec's does that ours does not, as a clause, or None."""
    kind = torchrec_class(theirs)
    assert kind is not None
    definer = next(c for c in type(theirs).__mro__ if "forward" in vars(c) and not issubclass(c, Accelerated))
    if definer.forward is not kind.forward or "forward" in vars(theirs):  # type: ignore[attr-defined]
        return f"{type(theirs).__name__} has a forward of its own"
    names = [config.name for config in theirs.embedding_bag_configs()]
    if sorted(names) != sorted(theirs.embedding_bags.keys()):
        return "its tables are not those of its configuration"
    weights = [bag.weight for bag in theirs.embedding_bags.values()]
    if len({id(weight) for weight in weights}) < len(weights):
        return "two of its tables share a weight"
    for name, weight in zip(theirs.embedding_bags, weights, strict=True):
        if type(weight) is not nn.Parameter or weight.dtype not in (
            torch.float32,
            torch.float16,
            torch.bfloat16,
        ):
            dtype = str(weight.dtype).removeprefix("torch.")
            return f"the weight of {name!r} is a {type(weight).__name__} of {dtype}"
    return _why_not_fused(theirs) if is_fused(theirs) else _why_not_bags(theirs.embedding_bags.items())


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
    for (pooling, _), module in zip(theirs._key_to_tables, theirs._emb_modules, strict=True):
        ours = _on_tables_of(theirs, module._embedding_tables, pooling.value.lower())
        ours.fused_optimizer = _OptimizerOfFbgemm(module._emb_module, ours.weights)
        result.append(ours)
    return result


class Accelerated:
    """Marks subclasses of TorchRec's collections whose forward is that of ``forward_at_once``."""

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
        of_tables = tables.split_optimizer_states() or [()] * len(module._embedding_tables)
        for config, weight, states in zip(
            module._embedding_tables, tables.split_embedding_weights(), of_tables, strict=True
        ):
            found[f"{config.name}.weight"] = weight.detach()
            found |= {f"{config.name}.state{i}": state.detach() for i, state in enumerate(states)}
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


def _on_tables_of(theirs: Any, configs: Sequence[Any], pooling: str | None = None) -> EmbeddingBagCollection:
    bags = {config.name: theirs.embedding_bags[config.name] for config in configs}
    tables = []
    for config in configs:
        bag = bags[config.name]
        rows, columns = bag.weight.shape
        mode = pooling or bag.mode
        tables.append(TableConfig(config.name, rows, columns, config.feature_names, mode, bag.weight.dtype))
    ours = EmbeddingBagCollection(
        tables, device="meta", is_weighted=theirs.is_weighted(), output_dtype=torch.float32
    )
    ours.embedding_bags = nn.ModuleDict(bags)
    return ours.train(theirs.training)


def _why_not_bags(bags: Any) -> str | None:
    options: set[bool] = set()
    for name, bag in bags:
        if not isinstance(bag, nn.EmbeddingBag):
            return f"{name!r} is a {type(bag).__name__}"
        for option, plain in (("padding_idx", None), ("max_norm", None), ("scale_grad_by_freq", False)):
            if getattr(bag, option) != plain:
                return f"{name!r} has {option}={getattr(bag, option)}"
        if has_hooks(bag) or "forward" in vars(bag):
            return f"{name!r} has hooks"
        if not bag.include_last_offset or bag.mode not in ("sum", "mean"):
            return f"{name!r} is not as TorchRec makes it"
        options.add(bag.sparse)
    return "only some of its tables are sparse" if len(options) > 1 else None


def _why_not_fused(theirs: Any) -> str | None:
    for module in theirs._emb_modules:
        tables = module._emb_module
        name, arguments = str(tables.optimizer), tables.optimizer_args
        if _optimizer(tables) is None:
            return f"its optimizer is {name}"
        for option, plain in _PLAIN_UPDATE.items():
            if getattr(arguments, option, plain) != plain:
                return f"its optimizer has {option}={getattr(arguments, option)}"
        if arguments.weight_decay and name != "adam":
            return f"its optimizer has weight_decay={arguments.weight_decay}, which FBGEMM may ignore"
        if tables.lxu_cache_weights.numel():
            return "its tables are behind a cache"
        for table, memory in zip(module._embedding_tables, tables.split_embedding_weights(), strict=True):
            if theirs.embedding_bags[table.name].weight.data_ptr() != memory.data_ptr():
                return f"the weight of {table.name!r} is not what it trains"
    return None


def _optimizer(tables: Any) -> RowOptimizer | None:
    """The optimizer of FBGEMM's module as ours."""
    arguments, lr = tables.optimizer_args, tables.get_learning_rate()
    made: dict[str, Any] = {
        "exact_sgd": lambda: SGD(lr=lr),
        "exact_adagrad": lambda: Adagrad(lr=lr, eps=arguments.eps),
        "exact_row_wise_adagrad": lambda: RowWiseAdagrad(lr=lr, eps=arguments.eps),
        "adam": lambda: Adam(
            lr=lr,
            eps=arguments.eps,
            betas=(arguments.beta1, arguments.beta2),
            weight_decay=arguments.weight_decay,
            weight_decay_mode="decoupled",
        ),
    }
    return made[str(tables.optimizer)]() if str(tables.optimizer) in made else None


class _OptimizerOfFbgemm(FusedOptimizer):
    """FBGEMM's state, learning rate and count of steps, used where they are."""

    def __init__(self, tables: Any, weights: Sequence[nn.Parameter]) -> None:
        self._tables = tables
        config = _optimizer(tables)
        assert config is not None
        super().__init__(config, weights)

    def reset_state(self) -> None:
        """Use FBGEMM's."""
        of_tables = self._tables.split_optimizer_states() or [()] * len(self.weights)
        for weight, states in zip(self.weights, of_tables, strict=True):
            named = zip(STATES[self.config.kind], states, strict=True)
            self.state[weight] = {"step": self.count} | {name: state.detach() for name, state in named}

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
