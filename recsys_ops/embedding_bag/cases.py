"""The embedding bag as the correctness suite sees it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recsys_ops.embedding_bag.api import OPERATOR, embedding_bag
from recsys_ops.embedding_bag.autograd import KERNELS
from recsys_ops.embedding_bag.bad_inputs import BAD_INPUTS
from recsys_ops.embedding_bag.mutants import MUTANTS
from recsys_ops.testing import (
    AWKWARD_LENGTHS,
    AWKWARD_WIDTHS,
    Case,
    Inputs,
    Isolation,
    OperatorSpec,
)

Fields = dict[str, Any]


@dataclass(frozen=True)
class EmbeddingBagCase(Case):
    """One call of ``embedding_bag``."""

    mode: str = "sum"
    bags: int = 7
    length: int = 6  # of every bag for two_dim, else about the mean
    lengths: tuple[int, ...] | None = None  # of each bag, instead of bags and length
    rows: int = 37
    dim: int = 5
    ids: str = "zipf"
    two_dim: bool = False
    include_last_offset: bool = False
    tail: int = 0  # entries after the last bag, the last of them invalid
    padding_idx: int | None = None
    weighted: bool = False
    sparse: bool = False
    scale_grad_by_freq: bool = False
    renormalized: bool = False
    norm_type: float = 2.0
    invalid: bool = False  # some ids are outside the table, and dropped
    ties: bool = False  # rows have many equal values
    wide_ids: bool = True
    wide_offsets: bool = True

    def build(self, draw: Inputs) -> dict[str, Any]:
        lengths = self._lengths(draw)
        count = sum(lengths) + self.tail
        ids = draw.ids(count, self.rows, self.ids, torch.int64 if self.wide_ids else torch.int32)
        if self.padding_idx is not None:
            ids[1::4] = self.padding_idx % self.rows
        if self.invalid:
            ids[::5], ids[3::7] = -1, self.rows
        if self.tail:
            ids[-1] = -1
        scale = self._scale(max(1.0, sum(lengths) / max(1, len(lengths))))
        weight = draw.normal(self.rows, self.dim, scale=scale)
        arguments: dict[str, Any] = {
            "input": ids,
            "weight": weight.sign() if self.ties else weight,
            "mode": self.mode,
            "sparse": self.sparse,
            "scale_grad_by_freq": self.scale_grad_by_freq,
            "padding_idx": self.padding_idx,
            "bounds": "drop" if self.invalid else "error",
        }
        if self.weighted:
            arguments["per_sample_weights"] = draw.normal(count)
        if self.renormalized:
            norm = scale * self.dim ** (1 / self.norm_type)
            arguments |= {"max_norm": 0.8 * norm, "norm_type": self.norm_type}
        if self.two_dim:
            for name in {"input", "per_sample_weights"} & arguments.keys():
                arguments[name] = arguments[name].view(len(lengths), self.length)
        else:
            offsets = draw.offsets(lengths, torch.int64 if self.wide_offsets else torch.int32)
            arguments["offsets"] = offsets if self.include_last_offset else offsets[:-1]
            arguments["include_last_offset"] = self.include_last_offset
        return arguments

    @property
    def differentiable(self) -> tuple[str, ...]:
        return ("weight", "per_sample_weights") if self.weighted else ("weight",)

    @property
    def mutates(self) -> tuple[str, ...]:
        return ("weight",) if self.renormalized else ()

    @property
    def signed(self) -> tuple[str, ...]:
        return ("weight",) if self.mode == "max" else ()

    def _lengths(self, draw: Inputs) -> list[int]:
        if self.lengths is not None:
            return list(self.lengths)
        if self.two_dim:
            return [self.length] * self.bags
        return draw.lengths(self.bags, self.length)

    def _scale(self, length: float) -> float:
        """Of the table, so that the output is of order one."""
        alike = length if self.ids == "equal" and not self.weighted else math.sqrt(length)
        return {"sum": 1 / alike, "mean": length / alike, "max": 1.0}[self.mode]


def _cases(*modes: str, **fields: Any) -> tuple[EmbeddingBagCase, ...]:
    """A case for each mode, all three by default; what max does not take is left out for it."""
    described = [EmbeddingBagCase(mode=mode, **fields) for mode in modes or ("sum", "mean", "max")]
    return tuple(
        replace(c, weighted=False, sparse=False, scale_grad_by_freq=False) if c.mode == "max" else c
        for c in described
    )


def _layouts() -> Iterable[Fields]:
    """Every way to say where bags are, which rows are padding, and what entries weigh."""
    bags: tuple[Fields, ...] = ({}, {"include_last_offset": True, "tail": 3}, {"two_dim": True})
    for bag, padding_idx, weighted in itertools.product(bags, (None, 3, -2), (False, True)):
        yield {**bag, "padding_idx": padding_idx, "weighted": weighted}


QUICK = (
    EmbeddingBagCase(),
    EmbeddingBagCase("mean", include_last_offset=True, tail=3, padding_idx=3, weighted=True, dim=17),
    EmbeddingBagCase("max", padding_idx=-1, ties=True, dim=33, wide_ids=False),
    EmbeddingBagCase("sum", two_dim=True, weighted=True, dim=64, wide_ids=False),
    EmbeddingBagCase("mean", sparse=True, scale_grad_by_freq=True, ids="equal", wide_offsets=False),
    EmbeddingBagCase("sum", sparse=True, weighted=True, invalid=True, padding_idx=2),
    EmbeddingBagCase("max", invalid=True, include_last_offset=True, rows=5),
    EmbeddingBagCase("mean", renormalized=True, weighted=True, dim=1),
    EmbeddingBagCase("mean", lengths=(0, 0, 0)),
    EmbeddingBagCase("mean", scale_grad_by_freq=True, invalid=True, dim=8),
    EmbeddingBagCase("sum", lengths=(0, 65, 33), dim=3),
    EmbeddingBagCase("max", lengths=(34, 0), dim=4),
    EmbeddingBagCase("sum", bags=0, include_last_offset=True),
    EmbeddingBagCase("sum", rows=0, invalid=True, lengths=(1, 3), ids="equal"),
)

CASES = tuple(
    itertools.chain(
        _cases(lengths=AWKWARD_LENGTHS, dim=17, weighted=True),
        *(_cases(**layout) for layout in _layouts()),
        *(_cases(dim=dim, bags=4, weighted=True) for dim in AWKWARD_WIDTHS),
        *(_cases(dim=dim, bags=4, padding_idx=0) for dim in AWKWARD_WIDTHS),
        *(_cases(lengths=(length,), dim=33) for length in AWKWARD_LENGTHS),
        *(
            _cases(wide_ids=wide_ids, wide_offsets=wide_offsets, weighted=True)
            for wide_ids, wide_offsets in itertools.product((True, False), repeat=2)
        ),
        *(
            _cases(
                "sum",
                "mean",
                sparse=True,
                scale_grad_by_freq=scale,
                weighted=weighted,
                padding_idx=padding_idx,
            )
            for scale, weighted, padding_idx in itertools.product((False, True), (False, True), (None, 1))
        ),
        _cases("sum", "mean", scale_grad_by_freq=True, weighted=True),
        *(_cases(ids=law, bags=40, weighted=True) for law in ("equal", "uniform", "zipf")),
        _cases(ids="equal", lengths=(100_000,), rows=3, dim=2),
        _cases("sum", "mean", ids="equal", lengths=(100_000,), rows=3, dim=2, weighted=True, sparse=True),
        *(_cases(renormalized=True, norm_type=norm_type, padding_idx=4) for norm_type in (1.0, 2.0, 3.5)),
        *(
            _cases(invalid=True, weighted=weighted, tail=2, include_last_offset=True)
            for weighted in (False, True)
        ),
        _cases("sum", "mean", invalid=True, sparse=True, scale_grad_by_freq=True),
        _cases(ties=True, dim=64, bags=20, rows=9),
        _cases(lengths=(0,) * 5, weighted=True),
        _cases(bags=0),
        _cases(bags=0, include_last_offset=True, tail=4),
        _cases(bags=0, two_dim=True, weighted=True),
        _cases(length=0, two_dim=True, weighted=True),
        _cases(rows=0, lengths=(0, 0), weighted=True),
        _cases(rows=0, invalid=True, lengths=(1, 3), ids="equal"),
        _cases("sum", "mean", rows=0, lengths=(0, 0), sparse=True),
        _cases(rows=1, bags=3),
        _cases(dim=0),
    )
)

LARGE = (
    EmbeddingBagCase("sum", bags=300, length=40, rows=500, dim=64, weighted=True, sparse=True),
    EmbeddingBagCase("mean", bags=300, length=40, rows=500, dim=33, weighted=True, padding_idx=0),
    EmbeddingBagCase("max", bags=300, length=40, rows=500, dim=64),
    EmbeddingBagCase("mean", bags=64, length=400, rows=2, dim=16),
    EmbeddingBagCase("sum", lengths=(20_000,), rows=50, dim=8, weighted=True),
)


def _exhaustive() -> Iterable[EmbeddingBagCase]:
    gradients: tuple[Fields, ...] = ({}, {"sparse": True}, {"scale_grad_by_freq": True})
    for layout, gradient, invalid, wide, dim, bags in itertools.product(
        _layouts(), gradients, (False, True), (False, True), (1, 8, 33, 129), (1, 64)
    ):
        given = {**layout, **gradient, "invalid": invalid, "dim": dim, "bags": bags}
        yield from _cases(**given, wide_ids=wide, wide_offsets=not wide)


Arguments = dict[str, Any]
Cotangents = tuple[Tensor | None, ...]


def _bags_of(arguments: Arguments) -> Tensor:
    """The bag of each entry, for arguments with ``offsets``: [N]."""
    positions = torch.arange(len(arguments["input"]), device=arguments["input"].device)
    return torch.searchsorted(arguments["offsets"].long(), positions, right=True) - 1


def _poison_unreferenced(arguments: Arguments, cotangents: Cotangents) -> dict[str, Tensor]:
    arguments["weight"][-1] = torch.nan
    arguments["weight"][-2] = torch.inf
    return {}


def _poison_padding(arguments: Arguments, cotangents: Cotangents) -> dict[str, Tensor]:
    padding = arguments["input"] == arguments["padding_idx"]
    arguments["weight"][arguments["padding_idx"]] = torch.nan
    if "per_sample_weights" in arguments:
        arguments["per_sample_weights"][padding] = torch.nan
    return {}


def _poison_dropped(arguments: Arguments, cotangents: Cotangents) -> dict[str, Tensor]:
    dropped = (arguments["input"] < 0) | (arguments["input"] >= len(arguments["weight"]))
    arguments["per_sample_weights"][dropped] = torch.nan
    return {}


def _poison_tail(arguments: Arguments, cotangents: Cotangents) -> dict[str, Tensor]:
    arguments["per_sample_weights"][arguments["offsets"][-1] :] = torch.nan
    return {}


def _poison_row(arguments: Arguments, cotangents: Cotangents) -> dict[str, Tensor]:
    row = arguments["input"][4].clone()
    arguments["weight"][row] = torch.nan
    bags = _bags_of(arguments)
    named = arguments["input"] == row
    output = torch.zeros(len(arguments["offsets"]), 1, dtype=torch.bool).to(row.device)
    output[bags[named]] = True
    # The maximum may move elsewhere within the bags that name the row.
    moved = torch.zeros(len(arguments["weight"]), 1, dtype=torch.bool).to(row.device)
    if arguments["mode"] == "max":
        moved[arguments["input"][output[bags, 0]].long()] = True
    return {"output": output, "gradient of weight": moved, "gradient of per_sample_weights": named}


def _poison_per_sample_weight(arguments: Arguments, cotangents: Cotangents) -> dict[str, Tensor]:
    arguments["per_sample_weights"][4] = torch.nan
    output = torch.zeros(len(arguments["offsets"]), 1, dtype=torch.bool).to(arguments["weight"].device)
    output[_bags_of(arguments)[4]] = True
    row = torch.zeros(len(arguments["weight"]), 1, dtype=torch.bool).to(arguments["weight"].device)
    row[arguments["input"][4]] = True
    return {"output": output, "gradient of weight": row}


def _poison_gradient(arguments: Arguments, cotangents: Cotangents) -> dict[str, Tensor]:
    bags = _bags_of(arguments)
    assert cotangents[0] is not None
    cotangents[0][bags[4]] = torch.nan
    in_bag = bags == bags[4]
    rows = torch.zeros(len(arguments["weight"]), 1, dtype=torch.bool).to(bags.device)
    rows[arguments["input"][in_bag].long()] = True
    return {"gradient of weight": rows, "gradient of per_sample_weights": in_bag}


def _isolations() -> Iterable[Isolation]:
    for case in (*_cases(weighted=True, dim=9), EmbeddingBagCase("mean", weighted=True, sparse=True, dim=9)):
        quick = case.mode != "mean"
        unreferenced = replace(case, rows=2000, lengths=(2, 0, 3))
        padded = replace(case, padding_idx=2)
        apart = replace(case, lengths=(3, 0, 4, 1, 6), ids="uniform")
        given = [
            ("NaN in rows that no bag names", unreferenced, _poison_unreferenced),
            ("NaN at padding", padded, _poison_padding),
            ("NaN in a row", apart, _poison_row),
            ("NaN in the gradient of a bag", apart, _poison_gradient),
        ]
        if case.weighted:
            given += [
                ("NaN weight of a dropped entry", replace(case, invalid=True), _poison_dropped),
                (
                    "NaN weight after the last bag",
                    replace(case, include_last_offset=True, tail=3),
                    _poison_tail,
                ),
                ("NaN weight of an entry", apart, _poison_per_sample_weight),
            ]
        for name, posed, poison in given:
            yield Isolation(f"{name}, {case.mode}{', sparse' if case.sparse else ''}", posed, poison, quick)


def _registered_call(arguments: Arguments, backend: str) -> tuple[Any, tuple[Any, ...]]:
    ids, weight, offsets = arguments["input"], arguments["weight"], arguments.get("offsets")
    if offsets is None:
        offsets = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
    weights = arguments.get("per_sample_weights")
    padding_idx = arguments["padding_idx"]
    return torch.ops.recsys_ops.embedding_bag.default, (
        weight,
        ids.reshape(-1),
        offsets,
        None if weights is None else weights.reshape(-1),
        arguments["mode"],
        -1 if padding_idx is None else padding_idx % len(weight),
        arguments.get("include_last_offset", False),
        arguments["bounds"] == "drop",
        arguments["scale_grad_by_freq"],
        arguments["sparse"],
        backend,
    )


SPEC = OperatorSpec(
    operator=OPERATOR,
    function=embedding_bag,
    kernels=KERNELS,
    registered_call=_registered_call,
    case=EmbeddingBagCase,
    quick=QUICK,
    cases=CASES,
    large=LARGE,
    small=(
        *_cases(rows=6, dim=3, bags=4, length=3, weighted=True, padding_idx=1),
        EmbeddingBagCase(
            "max", rows=6, dim=3, bags=4, length=3, invalid=True, include_last_offset=True, tail=2
        ),
        EmbeddingBagCase("mean", rows=6, dim=3, bags=3, length=2, invalid=True, two_dim=True, weighted=True),
    ),
    typical=(
        EmbeddingBagCase("mean", bags=4, weighted=True, padding_idx=-1, include_last_offset=True),
        EmbeddingBagCase("sum", bags=4, sparse=True, wide_ids=False),
        EmbeddingBagCase("max", bags=3, length=4, two_dim=True),
    ),
    asynchronous=(
        *_cases(bags=20, weighted=True, padding_idx=-1, include_last_offset=True),
        EmbeddingBagCase("sum", bags=20, scale_grad_by_freq=True, wide_ids=False),
        EmbeddingBagCase("sum", lengths=(5000,), ids="equal", rows=3, dim=100),
    ),
    isolations=tuple(_isolations()),
    bad_inputs=BAD_INPUTS,
    mutants=MUTANTS,
    exhaustive=_exhaustive,
)
