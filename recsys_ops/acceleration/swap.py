"""Swaps a module in place by changing the class of the instance, so that every reference to it stays good."""

from __future__ import annotations

import abc
import types
from typing import Any, Generic

from torch import nn

from recsys_ops.acceleration import collected, pooling
from recsys_ops.acceleration.collected import CollectedEmbeddingBag
from recsys_ops.acceleration.methods import rewritten_methods
from recsys_ops.acceleration.pooling import PooledEmbedding
from recsys_ops.embedding_bag.modules import EmbeddingBag
from recsys_ops.embedding_bag_collection.torchrec_modules import (
    Accelerated,
    forward_at_once,
    torchrec_class,
)
from recsys_ops.hstu_attention import meta_modules

_ORIGINAL = "_recsys_ops_original"  # on a swapped instance, and on a subclass made for one: the class before
_ACCELERATED: dict[type, type] = {nn.EmbeddingBag: EmbeddingBag, nn.Embedding: PooledEmbedding}


def swap(module: nn.Module) -> None:
    """Give the module its accelerated class, if it does not have it."""
    if _ORIGINAL not in module.__dict__:
        original = type(module)
        module.__class__ = accelerated_class(original)
        module.__dict__[_ORIGINAL] = original


def collect(bag: nn.EmbeddingBag) -> None:
    """Let a bag be looked up together with others, whether or not it is swapped by itself."""
    original = original_class(bag)
    bag.__class__ = CollectedEmbeddingBag
    bag.__dict__[_ORIGINAL] = original


def put_back(module: nn.Module) -> None:
    """Give the module the class back that it had before ``swap``."""
    original = module.__dict__.get(_ORIGINAL)
    if original is not None:
        module.__class__ = original
        del module.__dict__[_ORIGINAL]


def is_swapped(module: nn.Module) -> bool:
    return _ORIGINAL in module.__dict__


def original_class(module: nn.Module) -> type:
    """The class that the module has without acceleration."""
    return module.__dict__.get(_ORIGINAL, type(module))


def changed_since(module: nn.Module) -> bool:
    """Whether something else has changed the class of a swapped module, so that it cannot be put back."""
    original: Any = module.__dict__.get(_ORIGINAL)
    now = type(module)
    ours = (
        now in (original, _ACCELERATED.get(original), CollectedEmbeddingBag)
        or vars(now).get(_ORIGINAL) is original
    )
    return original is not None and not ours


def why_not_subclassed(original: type) -> str | None:
    """Why a subclass of ``original`` might not be what the model expects, or None."""
    if type(original) not in (type, abc.ABCMeta):
        return f"{original.__name__} has a metaclass of its own"
    for name in ("__init_subclass__", "__reduce__", "__reduce_ex__", "__deepcopy__", "__call__"):
        definer = next(c for c in (*original.__mro__, object) if name in c.__dict__ or c is object)
        if definer not in (object, nn.Module, Generic):
            return f"{definer.__name__} defines {name}"
    return None


def accelerated_class(original: type) -> Any:
    """The class that an instance of ``original`` gets: ours, or a subclass of both."""
    known = _ACCELERATED.get(original)
    if known is None or (_ORIGINAL in vars(known) and not _is_current(known, original)):
        known = _ACCELERATED[original] = _subclass(original)
    return known


def _is_current(known: type, original: type) -> bool:
    """Whether the methods rewritten for ``known`` are still those of ``original``."""
    functions = {name: f for name, f in vars(known).items() if isinstance(f, types.FunctionType)}
    del functions["__reduce_ex__"]
    own_forward = issubclass(known, (EmbeddingBag, Accelerated))
    return own_forward or functions == rewritten_methods(original).functions


def _subclass(original: Any) -> type:
    namespace: dict[str, Any] = {
        _ORIGINAL: original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    bases: tuple[type, ...] = (original,)
    if issubclass(original, nn.EmbeddingBag):
        bases = (original, EmbeddingBag)
    elif torchrec_class(original) is not None:
        bases = (original, Accelerated)
        namespace["forward"] = forward_at_once(original)
    elif meta_modules.kind_of(original) is not None:
        bases = (original, Accelerated)
        namespace["forward"] = meta_modules.forward_as_one(original)
    else:
        namespace.update(rewritten_methods(original).functions)
        namespace[pooling.HELPER] = staticmethod(pooling.pooled_lookup)
        namespace[collected.HELPER] = collected.Lookups

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = object.__reduce_ex__(self, protocol)
        return (_instance, (original,), *reduced[2:])

    # The class itself has no importable name: pickle and copy make it anew.
    namespace["__reduce_ex__"] = reduce
    return types.new_class(original.__name__, bases, exec_body=lambda body: body.update(namespace))


def _instance(original: type) -> nn.Module:
    accelerated = accelerated_class(original)
    return accelerated.__new__(accelerated)
