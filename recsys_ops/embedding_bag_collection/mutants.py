"""Kernels of the embedding bag collection that are wrong on purpose; the suite must reject every one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from recsys_ops.embedding_bag import reference as one_table
from recsys_ops.embedding_bag_collection import reference, row_optimizers, row_quantization
from recsys_ops.embedding_bag_collection.autograd import FAKES
from recsys_ops.testing import Mutant

Override = Callable[[Any], dict[str, Callable[..., Any]]]

FORWARD = "embedding_bag_collection_forward"
BACKWARD = "embedding_bag_collection_backward"
BACKWARD_SPARSE = "embedding_bag_collection_backward_sparse"
UPDATE = "embedding_bag_collection_update"


def _edited(old: str, new: str, module: ModuleType = reference, only: str | None = None) -> Override:
    """The reference with another text somewhere, in one of the modules that it is made of.

    Args:
        old: text of the module, there once.
        new: instead.
        module: of the reference.
        only: the kernel that is wrong; by default all that use the text are.
    """

    def override(kernels: Any) -> dict[str, Callable[..., Any]]:
        source = inspect.getsource(module)
        if source.count(old) != 1:
            raise ValueError(f"mutant: expected once in {module.__name__}: {old!r}")
        wrong = _executed(inspect.getsource(reference))
        edited = _executed(source.replace(old, new))
        wrong |= {
            name: edited[name]
            for name, value in vars(reference).items()
            if callable(value) and getattr(module, name, None) is value
        }
        return {name: wrong[name] for name in FAKES if only in (None, name)}

    return override


def _executed(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, __name__, "exec"), namespace)
    return namespace


def _called(kernel: str, body: Callable[[Callable[..., Any], SimpleNamespace], Any]) -> Override:
    """Replace a kernel by ``body(right, arguments)``; ``right`` takes them back as keywords."""
    signature = inspect.signature(getattr(reference, kernel))

    def override(kernels: Any) -> dict[str, Callable[..., Any]]:
        right = getattr(kernels, kernel)

        def wrong(*args: Any) -> Any:
            return body(right, SimpleNamespace(**signature.bind(*args).arguments))

        return {kernel: wrong}

    return override


def _given(kernel: str, **changes: Callable[[SimpleNamespace], Any]) -> Override:
    """Give the right kernel other arguments, computed from the right ones."""

    def body(right: Callable[..., Any], a: SimpleNamespace) -> Any:
        return right(**{**vars(a), **{name: change(a) for name, change in changes.items()}})

    return _called(kernel, body)


def _then(change: Callable[[SimpleNamespace], Any]) -> Override:
    """Do something to the arguments after the right forward, its output among them."""

    def body(right: Callable[..., Any], a: SimpleNamespace) -> None:
        right(**vars(a))
        change(a)

    return _called(FORWARD, body)


def _last_over_first(a: SimpleNamespace) -> Tensor:
    lookups = a.lookups.clone()
    lookups[-1:, 4] = lookups[:1, 4]
    return lookups


def _past_the_end(a: SimpleNamespace) -> None:
    if a.output.untyped_storage().nbytes() > a.output.nbytes:
        a.output.as_strided((1,), (1,), a.output.storage_offset() + a.output.numel()).zero_()


def _one_thread_differs(a: SimpleNamespace) -> None:
    if torch.get_num_threads() == 1:
        a.output.copy_(a.output.nextafter(a.output + 1))


def _unstrided(a: SimpleNamespace) -> list[Tensor]:
    return [w.as_strided(w.shape, (w.shape[1], 1)) for w in a.weights]


def _rows_times_zero(a: SimpleNamespace) -> None:
    for lookup in reference.each_lookup(a.lookups):
        weight = a.weights[lookup.table]
        cells = a.output.as_strided((lookup.num_bags, weight.shape[1]), (lookup.stride, 1), lookup.start)
        cells += 0 * weight.sum(0)


_ENTRIES_SUMMED = "sums = [_sum_by_row(*of_table) for of_table in terms]"
_WRITE = "_cells(output, lookup, weight.shape[1]).copy_(pooled)"

# Wrong values, or none at all.
_FORWARD = {
    "zeros": _then(lambda a: a.output.zero_()),
    "last entry dropped": _edited(
        "int(offsets[0]), int(offsets[-1])",
        "int(offsets[0]), int(offsets[-1]) - (0 < len(values) == int(offsets[-1]))",
    ),
    "last column missed": _edited(
        _WRITE, "_cells(output, lookup, weight.shape[1])[:, :-1].copy_(pooled[:, :-1])"
    ),
    "empty bags unwritten": _edited(
        _WRITE,
        "cells, full = _cells(output, lookup, weight.shape[1]), bags.offsets.diff()[:, None] > 0\n"
        "        cells.copy_(torch.where(full, pooled, cells))",
    ),
    "last columns written to the first": _given(FORWARD, lookups=_last_over_first),
    "mean over the batch": _edited(
        "bags.live, factors, lookup.mode == MEAN)",
        "bags.live, factors, False) / (lookup.num_bags if lookup.mode == MEAN else 1)",
    ),
    "mean over one too many": _edited(
        "output / live.bag_sizes(rows.dtype)[:, None]",
        "output / (live.bag_sizes(rows.dtype)[:, None] + 1)",
        one_table,
    ),
    "mean over dropped ids": _edited(
        "bags.live, factors, lookup.mode == MEAN)",
        "bags.live, factors, False)\n"
        "            if lookup.mode == MEAN:\n"
        "                pooled = pooled / bags.offsets.diff().clamp(min=1)[:, None]",
    ),
    "weights ignored": _edited("pool(weight, bags.live, factors,", "pool(weight, bags.live, None,"),
    "weights from the first entry on": _edited(
        "None if per_sample_weights is None else per_sample_weights[self.first :]", "per_sample_weights"
    ),
    "ties to the last": _edited(
        "    occupied = winner < len(rows)\n",
        "    occupied = winner < len(rows)\n"
        "    last = torch.where(ranks == highest[live.bags], entries, -1)\n"
        "    winner = winner.scatter_reduce_(0, bag_of, last, 'amax', include_self=False)\n",
        one_table,
    ),
    "sums in half precision": _edited(
        "rows = weight[live.rows].to(accumulate_type(weight.dtype))", "rows = weight[live.rows]", one_table
    ),
    "fp64 through fp32": _edited(
        "return torch.float64 if dtype == torch.float64 else torch.float32", "return torch.float32", one_table
    ),
    "halves of a byte swapped": _edited("codes & 15, codes >> 4", "codes >> 4, codes & 15", row_quantization),
    "scale ignored": _edited(
        ".to(scale.dtype) * scale + offset", ".to(scale.dtype) + offset", row_quantization
    ),
    "offset ignored": _edited(
        ".to(scale.dtype) * scale + offset", ".to(scale.dtype) * scale", row_quantization
    ),
}
_BACKWARD = {
    "only the first feature of a table trains it": _edited(
        "rows[lookup.table].append(live.rows)",
        "of_entries = of_entries * (not rows[lookup.table])\n        rows[lookup.table].append(live.rows)",
    ),
    "repeated ids trained once": _edited(
        "index_add_(0, rows, of_entries)", "index_copy_(0, rows, of_entries)"
    ),
    "dropped ids train row 0": _given(BACKWARD, values=lambda a: a.values.clamp(min=0)),
    "every entry of a maximum trained": _edited(
        "of_entries * (winner == ", "of_entries * (winner > -2 + 0 * "
    ),
    "sparse rows out of order": _called(
        BACKWARD_SPARSE, lambda right, a: [part.flip(0) for part in right(**vars(a))]
    ),
}
_UPDATES = {
    "gradient of mean undivided in the update": _edited(
        "factors, lookup.mode == MEAN, False)", "factors, False, False)", only=UPDATE
    ),
    "weights ignored in the update": _edited(
        "factors = None if lookup.mode == MAX else bags.part_of(per_sample_weights)",
        "factors = None",
        only=UPDATE,
    ),
    "updated once for each entry": _edited(
        "enumerate(sums)",
        "((t, (r[i : i + 1], g[i : i + 1])) for t, (r, g) in enumerate(terms) for i in range(len(r)))",
    ),
    "last entry's gradient instead of the sum": _edited(_ENTRIES_SUMMED, "sums = terms"),
    "entries clipped instead of their sum": _edited(
        _ENTRIES_SUMMED,
        "sums = [_sum_by_row(r, g.clamp(-hyperparameters[6], hyperparameters[6])) for r, g in terms]",
    ),
    "step not counted": _edited("step += 1", "step = step + 1"),
    "step counted after the update": _edited("int(step),", "int(step) - 1,"),
    **{
        name: _edited(old, new, row_optimizers)
        for name, old, new in (
            ("weight decay ignored", "g = g + l2 * w", "g = g"),
            (
                "weight decay of fp32 tables only",
                "g = g + l2 * w",
                "g = g + l2 * w * (tensors[0].dtype == torch.float32)",
            ),
            (
                "weight decay after the state",
                "u = u + decoupled * w",
                "u = u + (decoupled + l2) * w - l2 * w * lr",
            ),
            ("decoupled weight decay ignored", "u = u + decoupled * w", "u = u"),
            (
                "decoupled weight decay without the rate",
                "w = w - lr * trust * u",
                "w = w - lr * trust * (u - decoupled * w) - decoupled * w",
            ),
            ("gradients not clamped", "gradients.clamp(-max_gradient, max_gradient)", "gradients"),
            ("norms of gradients not limited", 'if max_norm != float("inf"):', "if False:"),
            ("first moment without bias correction", "m / (1 - beta1**step)", "m"),
            ("second moment without bias correction", "v / (1 - beta2**step)", "v"),
            ("LAMB without trust ratio", "if optimizer == LAMB:", "if False:"),
            (
                "trust ratio upside down",
                "of_w / of_u",
                "of_u / of_w",
            ),
            ("eps inside the square root", "states[0].sqrt() + eps", "(states[0] + eps).sqrt()"),
            (
                "eps inside the square root of Adam",
                "((v / (1 - beta2**step)).sqrt() + eps)",
                "((v / (1 - beta2**step)) + eps).sqrt()",
            ),
            ("row-wise state by sum", " / max(1, g.shape[1])", ""),
            (
                "row-wise state of the first column",
                "g.square().sum(1, keepdim=True) / max(1, g.shape[1])",
                "g.square()[:, :1]",
            ),
        )
    },
}

MUTANTS = (
    *(
        Mutant(name, "forward_backward", override)
        for name, override in (_FORWARD | _BACKWARD | _UPDATES).items()
    ),
    Mutant(
        "weights ignored in training",
        "gradcheck",
        _edited(
            "factors = None if lookup.mode == MAX else bags.part_of(per_sample_weights)", "factors = None"
        ),
    ),
    Mutant(
        "gradient of mean undivided",
        "gradcheck",
        _edited("factors, lookup.mode == MEAN, False)", "factors, False, False)"),
    ),
    Mutant(
        "gradient of weights undivided",
        "gradcheck",
        _edited(
            "weight, bags.live, lookup.mode == MEAN)\n            grad",
            "weight, bags.live, False)\n            grad",
        ),
    ),
    Mutant("bad ids accepted", "bad_input", _given(FORWARD, drop_invalid=lambda a: True)),
    Mutant("bad ids trained", "bad_input", _given(UPDATE, drop_invalid=lambda a: True)),
    Mutant("strides ignored", "strided", _given(FORWARD, weights=_unstrided)),
    Mutant(
        "a copy updated", "strided", _given(UPDATE, weights=lambda a: [w.contiguous() for w in a.weights])
    ),
    Mutant("all rows read", "isolation", _then(_rows_times_zero)),
    Mutant("tables mixed", "isolation", _then(lambda a: a.output.add_(0 * sum(w.sum() for w in a.weights)))),
    Mutant(
        "gradients of all bags read",
        "isolation",
        _given(UPDATE, grad_output=lambda a: a.grad_output + 0 * a.grad_output.sum()),
    ),
    Mutant("written past the end", "inputs_untouched", _then(_past_the_end)),
    Mutant("table scaled in place", "inputs_untouched", _then(lambda a: a.weights[0].mul_(0.5))),
    Mutant(
        "noise in the last bits",
        "determinism",
        _then(lambda a: a.output.mul_(1 + 1e-6 * torch.rand(()))),
    ),
    Mutant("one thread differs", "determinism", _then(_one_thread_differs)),
)
