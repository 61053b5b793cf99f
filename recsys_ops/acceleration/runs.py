"""Runs of a model that leave no trace: what it returns, and what reaches its lookups."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recsys_ops.acceleration.collected import Bags, CollectedEmbeddingBag
from recsys_ops.acceleration.pooling import PooledEmbedding, pool, pooled_lookup
from recsys_ops.acceleration.swap import put_back, swap
from recsys_ops.embedding_bag_collection.torchrec_modules import (
    changed_in_backward,
    is_fused,
    leaves_of_fused,
    torchrec_class,
)

Batch = tuple[tuple[Any, ...], dict[str, Any]]
Results = dict[str, Tensor]
Lookup = nn.EmbeddingBag | nn.Embedding

_FORWARD = inspect.signature(nn.EmbeddingBag.forward)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an ``EmbeddingBag``, or of an ``Embedding`` whose rows are then pooled."""

    input: Tensor
    offsets: Tensor | None = None
    per_sample_weights: Tensor | None = None
    pooling: tuple[str, int] | None = None  # mode and dim

    def run(self, module: nn.Module) -> Tensor:
        if self.pooling is not None:
            return pooled_lookup(*self.pooling, module, self.input)
        return module(self.input, self.offsets, self.per_sample_weights)


def bags_of(module: nn.Module, call: Call) -> Bags:
    """A call of an ``EmbeddingBag`` that may be made together with others."""
    return Bags(module, call.input, call.offsets, call.per_sample_weights)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undo what the model does to its buffers, attributes and the random state when it runs inside."""
    modules = list(model.modules())
    attributes = [
        (current, dict(current))
        for m in modules
        for current in (m.__dict__, m._buffers, m._parameters, m._modules)
        if isinstance(current, dict)  # a scripted module's are not, and stay
    ]
    tensors = [b for m in modules for b in m._buffers.values() if b is not None]
    # A lookup with max_norm rescales rows of its table.
    tensors += [p for m in modules if getattr(m, "max_norm", None) is not None for p in m.parameters(False)]
    tensors += [t for _, fused in fused_collections(model) for t in changed_in_backward(fused).values()]
    saved_tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    device_states = {device: torch.cuda.get_rng_state(device) for device in devices}
    try:
        yield
    finally:
        for current, saved in attributes:
            current.clear()
            current.update(saved)
        with torch.no_grad():
            for tensor, value in saved_tensors:
                if not torch.equal(tensor, value):  # an expanded tensor cannot be written to
                    tensor.copy_(value)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        for device, state in device_states.items():
            torch.cuda.set_rng_state(state, device)


def fused_collections(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """TorchRec's fused collections, which train in the backward and have no gradients."""
    return [(n, m) for n, m in model.named_modules() if torchrec_class(m) is not None and is_fused(m)]


def observe(model: nn.Module, batch: Batch) -> Results:
    """The outputs of one run, and the gradients of its parameters and floating inputs, by name.

    Of collections that train in the backward, what they hold afterwards.

    The loss is the sum of the outputs, each times a fixed random tensor of its shape.
    """
    targets: dict[str, Tensor] = {
        f"gradient of {n}": p for n, p in model.named_parameters() if p.requires_grad
    }

    def fresh(path: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone()
        if not copy.is_floating_point():
            return copy
        targets[f"gradient of input{pytree.keystr(path)}"] = copy.requires_grad_()
        return copy.clone()  # may be changed in place, as a leaf may not

    args, kwargs = pytree.tree_map_with_path(fresh, batch)
    with untouched(model):
        results = {f"output{pytree.keystr(path)}": leaf for path, leaf in leaves_of(model(*args, **kwargs))}
        gradients = differentiate(model, list(results.values()), list(targets.values()))
        updated = {
            f"updated {name}.{what}": tensor.clone()
            for name, fused in fused_collections(model)
            for what, tensor in changed_in_backward(fused).items()
        }
    results = {name: output.detach() for name, output in results.items()}
    results.update({n: g for n, g in zip(targets, gradients, strict=True) if g is not None})
    return results | updated


class _Recorder(PooledEmbedding):
    """Notes the lookups that would be pooled directly, and computes them as the model does."""

    def pooled(self, mode: str, dim: int, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs and self._is_bags(args[0], mode):
            self.__dict__["_calls"].append(Call(args[0].clone(), pooling=(mode, dim)))
        return pool(self(*args, **kwargs), mode, dim)


def capture(
    model: nn.Module, batches: Sequence[Batch], lookups: Sequence[tuple[Lookup, Sequence[nn.Module]]]
) -> dict[int, list[Call]]:
    """The calls that reach each lookup when the model runs, by the id of the module.

    Beside each lookup, ``lookups`` names the modules that its swap changes; their swaps are undone here.
    """
    calls: dict[int, list[Call]] = {id(module): [] for module, _ in lookups}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = _FORWARD.bind(module, *args, **kwargs).arguments
        tensors = {
            n: t.detach().clone().requires_grad_(t.requires_grad)
            for n, t in arguments.items()
            if t is not None and n != "self"
        }
        calls[id(module)].append(Call(**tensors))

    with contextlib.ExitStack() as undo:
        for module, parts in lookups:
            if isinstance(module, nn.EmbeddingBag):
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                continue
            for part in parts:
                undo.callback(put_back, part)
                swap(part)
            module.__dict__["_calls"] = calls[id(module)]
            undo.callback(module.__dict__.pop, "_calls")
            module.__class__ = _Recorder
        for batch in batches:
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, batch)
            model(*args, **kwargs)
    return calls


class _RecordedBag(CollectedEmbeddingBag):
    """Notes the calls that would be made together, and makes them one by one."""

    def look_up_together(self, bags: Sequence[Bags]) -> list[Tensor]:
        copies: Any = [(None if t is None else _detached(t) for t in b[1:]) for b in bags]
        recorded = [Bags(b.module, *copied) for b, copied in zip(bags, copies, strict=True)]
        self.__dict__["_calls"].append(recorded)
        return [b.module(*b[1:]) for b in bags]


def capture_together(
    model: nn.Module,
    batches: Sequence[Batch],
    collections: Sequence[tuple[nn.Module, Sequence[nn.Module], Sequence[nn.Module]]],
) -> dict[int, list[Any]]:
    """The calls that reach each collection, by the id of its module.

    Of TorchRec's the features; of bags in a loop, which have ``members``, the ``Bags`` of the loop.
    ``collections`` are module, parts and members of each.
    """
    calls: dict[int, list[Any]] = {id(module): [] for module, _, _ in collections}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[id(module)].append(pytree.tree_map_only(Tensor, _detached, (*args, *kwargs.values())[0]))

    with contextlib.ExitStack() as undo:
        for module, parts, members in collections:
            if not members:
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                continue
            for part in parts:
                undo.callback(put_back, part)
                swap(part)
            for bag in members:
                undo.callback(put_back, bag)
                swap(bag)
                bag.__dict__["_calls"] = calls[id(module)]
                undo.callback(bag.__dict__.pop, "_calls")
                bag.__class__ = _RecordedBag
        for batch in batches:
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, batch)
            model(*args, **kwargs)
    return calls


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def leaves_of(outputs: Any) -> list[tuple[Any, Tensor]]:
    leaves = []
    for path, leaf in pytree.tree_leaves_with_path(outputs, is_leaf=_is_keyed_tensor):
        if _is_keyed_tensor(leaf):
            leaf = leaf.values()
        if isinstance(leaf, (bool, int, float, complex)):
            leaf = torch.tensor(leaf)
        if isinstance(leaf, Tensor):
            leaves.append((path, leaf))
        elif leaf is not None and not isinstance(leaf, str):
            raise TypeError(
                "accelerate: expected a model that returns tensors, in tuples, lists and dicts, "
                f"got {type(leaf).__name__} in output{pytree.keystr(path)}"
            )
    return leaves


def _is_keyed_tensor(value: Any) -> bool:
    """Whether this is TorchRec's, whose tensors pytree does not name."""
    return type(value).__name__ == "KeyedTensor" and hasattr(value, "length_per_key")


def differentiate(
    model: nn.Module, outputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Gradients of the model's outputs; None where there is none. Fused collections train."""
    hidden = [leaf for _, fused in fused_collections(model) for leaf in leaves_of_fused(fused)]
    return _differentiate(model, outputs, [*targets, *hidden])[: len(targets)]


def _differentiate(
    model: nn.Module, outputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    outputs = [output for output in outputs if output.requires_grad]
    if outputs and targets:
        cotangents = [cotangent_of(output) for output in outputs]
        try:
            return torch.autograd.grad(outputs, targets, cotangents, allow_unused=True)
        except RuntimeError:  # cuDNN's recurrent layers have no backward in evaluation mode
            if model.training:
                raise
    return [None] * len(targets)


def cotangent_of(output: Tensor, rounded_to: torch.dtype | None = None) -> Tensor:
    values = torch.randn(output.shape, generator=torch.Generator().manual_seed(output.numel()))
    return values.to(rounded_to or output.dtype).to(output)
