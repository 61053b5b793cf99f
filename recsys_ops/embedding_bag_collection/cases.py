"""The embedding bag collection as the correctness suite sees it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recsys_ops.embedding_bag_collection.api import (
    OPERATOR,
    default_output_dtype,
    embedding_bag_collection,
    quantized_collection,
)
from recsys_ops.embedding_bag_collection.autograd import KERNELS
from recsys_ops.embedding_bag_collection.bad_inputs import bad_inputs
from recsys_ops.embedding_bag_collection.isolations import isolations
from recsys_ops.embedding_bag_collection.layout import Layout
from recsys_ops.embedding_bag_collection.mutants import MUTANTS
from recsys_ops.embedding_bag_collection.row_optimizers import OPTIMIZERS, STATES
from recsys_ops.embedding_bag_collection.row_quantization import quantize_rows
from recsys_ops.testing import AWKWARD_LENGTHS, AWKWARD_WIDTHS, Case, Inputs, OperatorSpec

Fields = dict[str, Any]


@dataclass(frozen=True)
class EmbeddingBagCollectionCase(Case):
    """One lookup in several tables, its gradients, or with ``optimizer`` its update of them."""

    pooling: str | tuple[str, ...] = "sum"
    rows: tuple[int, ...] = (37, 6, 90)
    dims: tuple[int, ...] = (5, 8, 4)
    features: tuple[tuple[int, ...], ...] | None = None
    batch: int = 4
    batch_sizes: tuple[int, ...] | None = None
    length: int = 4  # of a bag, about the mean
    lengths: tuple[int, ...] | None = None  # of all bags, instead
    tail: int = 0  # entries after the last bag, outside every table
    ids: str = "zipf"
    weighted: bool = False
    sparse: bool = False
    invalid: bool = False  # some ids are outside their tables, and dropped
    ties: bool = False  # rows have many equal values
    halves: tuple[int, ...] = ()  # tables that are bf16 whatever the others are
    output: str | None = None
    wide_ids: bool = True
    wide_offsets: bool = True
    quantized: str | None = None
    optimizer: str | None = None
    decay: str | None = None  # weight_decay or decoupled_weight_decay
    clipping: str | None = None  # max_gradient or max_gradient_norm
    half_states: bool = False
    stochastic: bool = False
    step: int = 3  # of the update

    def build(self, draw: Inputs) -> dict[str, Any]:
        num_features = 1 + max(f for features in self.looked_up for f in features)
        batch_sizes = self.batch_sizes or (self.batch,) * num_features
        lengths = self.lengths or draw.lengths(sum(batch_sizes), self.length)
        ends = list(itertools.accumulate(batch_sizes, initial=0))
        per_feature = [sum(lengths[first:end]) for first, end in itertools.pairwise(ends)]
        ids = [self._ids(draw, f, count) for f, count in enumerate(per_feature)]
        arguments: dict[str, Any] = {
            "values": torch.cat([*ids, ids[0].new_full((self.tail,), -1)]),
            "offsets": draw.offsets(list(lengths), torch.int64 if self.wide_offsets else torch.int32),
            "case": self,
        }
        if self.weighted:
            arguments["per_sample_weights"] = draw.normal(sum(per_feature) + self.tail)
        longest = max(1.0, sum(lengths) / max(1, len(lengths)))
        for t, (rows, dim) in enumerate(zip(self.rows, self.dims, strict=True)):
            weight = draw.normal(rows, dim, scale=self._scale(self.modes[t], longest))
            weight = weight.sign() if self.ties else weight
            arguments[f"weight_{t}"] = self._stored(weight, t in self.halves, draw)
        if self.optimizer is not None:
            arguments |= self._optimizer_arguments(draw, batch_sizes)
        return arguments

    @property
    def looked_up(self) -> tuple[tuple[int, ...], ...]:
        return self.features or tuple((t,) for t in range(len(self.rows)))

    @property
    def modes(self) -> tuple[str, ...]:
        return (self.pooling,) * len(self.rows) if isinstance(self.pooling, str) else self.pooling

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(f"weight_{t}" for t in range(len(self.rows)))

    @property
    def differentiable(self) -> tuple[str, ...]:
        if self.optimizer is not None or self.quantized is not None:
            return ()
        return (*self.tables, *(("per_sample_weights",) if self.weighted else ()))

    @property
    def signed(self) -> tuple[str, ...]:
        return self.tables if "max" in self.modes else ()

    @property
    def layout(self) -> Layout:
        return Layout(self.looked_up, self.modes, self.dims)

    def _ids(self, draw: Inputs, feature: int, count: int) -> Tensor:
        tables = [r for r, features in zip(self.rows, self.looked_up, strict=True) if feature in features]
        rows = min(tables, default=10**6)  # of those that nobody looks up, ids are free
        ids = draw.ids(count, rows, self.ids, torch.int64 if self.wide_ids else torch.int32)
        if self.invalid:
            ids[::5], ids[3::7] = -1, rows
        return ids

    def _scale(self, pooling: str, length: float) -> float:
        """Of a table, so that the output is of order one."""
        alike = length if self.ids == "equal" and not self.weighted else math.sqrt(length)
        return {"sum": 1 / alike, "mean": length / alike, "max": 1.0, "none": 1.0}[pooling]

    def _stored(self, tensor: Tensor, in_half: bool, draw: Inputs) -> Tensor:
        if self.quantized is not None and draw.dtype == torch.float64:
            return tensor.float()
        return tensor.bfloat16() if in_half and draw.dtype != torch.float64 else tensor

    def _optimizer_arguments(self, draw: Inputs, batch_sizes: tuple[int, ...]) -> dict[str, Any]:
        size = self.layout.place([(0, b) for b in batch_sizes], apart=self.batch_sizes is not None).size
        # Of the other sign, so that the step adds to the row where magnitudes are summed.
        arguments: dict[str, Any] = {
            "grad_output": draw.normal(size),
            "minus_lr": draw.normal(1).abs() * 0 - 0.125,
        }
        kind = OPTIMIZERS.index(self.optimizer)
        for t, (rows, dim) in enumerate(zip(self.rows, self.dims, strict=True)):
            for s, rowwise in enumerate(STATES[kind].values()):
                shape = (rows,) if rowwise else (rows, dim)
                first_moment = kind >= OPTIMIZERS.index("adam") and s == 0
                state = draw.normal(*shape, scale=0.5)
                state = state if first_moment else 0.5 + state.abs()
                arguments[f"state_{t}_{s}"] = self._stored(state, self.half_states, draw)
        return arguments

    @property
    def hyperparameters(self) -> dict[str, float]:
        """All but the learning rate, in their order."""
        given = dict.fromkeys(("weight_decay", "decoupled_weight_decay"), 0.0)
        given |= dict.fromkeys(("max_gradient", "max_gradient_norm"), math.inf)
        if self.decay is not None:
            given[self.decay] = 0.25
        if self.clipping is not None:
            given[self.clipping] = 0.75
        return {"eps": 2**-10, "beta1": 0.875, "beta2": 0.9375, **given}


def run(
    case: EmbeddingBagCollectionCase,
    backend: str | None = None,
    bounds: str | None = None,
    out: Tensor | None = None,
    **arguments: Any,
) -> Any:
    """What the suite calls in the place of the public function: tables, states and all as keywords."""
    weights = [arguments[name] for name in case.tables]
    bags = (arguments["values"], arguments["offsets"])
    factors = arguments.get("per_sample_weights")
    if case.quantized is not None:
        return _quantized(case, weights, *bags, factors, backend)
    if case.optimizer is not None:
        return _updated(case, weights, arguments, backend)
    double = all(w.dtype == torch.float64 for w in weights)
    outputs = embedding_bag_collection(
        *bags,
        weights,
        case.features,
        case.pooling,
        factors,
        batch_sizes=case.batch_sizes,
        sparse=case.sparse,
        output_dtype=getattr(torch, case.output) if case.output and not double else None,
        bounds=bounds or ("drop" if case.invalid else "error"),
        out=out,
        backend=backend,
    )
    return tuple(outputs) if isinstance(outputs, list) else outputs


def _quantized(
    case: EmbeddingBagCollectionCase,
    weights: list[Tensor],
    values: Tensor,
    offsets: Tensor,
    factors: Tensor | None,
    backend: str | None,
) -> Tensor:
    assert case.quantized is not None
    codes, scales = zip(*(quantize_rows(w, case.quantized) for w in weights), strict=True)
    dtype = default_output_dtype([w.dtype for w in weights])
    batch_size = (len(offsets) - 1) // case.layout.num_features
    return quantized_collection(
        codes,
        [s.to(dtype) for s in scales],
        4 if case.quantized == "int4" else 8,
        values,
        offsets,
        factors,
        case.layout.side_by_side(batch_size),
        dtype,
        case.invalid,
        backend=backend,
    )


def _updated(
    case: EmbeddingBagCollectionCase, weights: list[Tensor], arguments: dict[str, Any], backend: str | None
) -> tuple[Tensor, ...]:
    """The weights, the states and the step after an update."""
    assert case.optimizer is not None
    weights = [w.clone(memory_format=torch.preserve_format) for w in weights]
    kind = OPTIMIZERS.index(case.optimizer)
    states = [
        arguments[f"state_{t}_{s}"].clone(memory_format=torch.contiguous_format)
        for t in range(len(weights))
        for s in range(len(STATES[kind]))
    ]
    values, offsets = arguments["values"].contiguous(), arguments["offsets"].contiguous()
    num_features = case.layout.num_features
    sizes = case.batch_sizes or ((offsets.shape[0] - 1) // num_features,) * num_features
    bags = [(sum(sizes[:f]), sizes[f]) for f in range(len(sizes))]
    placement = case.layout.place(bags, apart=case.batch_sizes is not None)
    factors = arguments.get("per_sample_weights")
    dtype = default_output_dtype([w.dtype for w in weights])
    if factors is not None:
        factors = factors.to(dtype).contiguous()
    argmax = None
    if case.layout.has_max:
        argmax = values.new_empty(placement.size, dtype=torch.int32)
        output = values.new_empty(placement.size, dtype=dtype)
        KERNELS["reference"].embedding_bag_collection_forward(
            output, argmax, weights, values, offsets, factors, placement.lookups, case.invalid
        )
    step = torch.tensor(case.step - 1)
    hyperparameters = [-float(arguments["minus_lr"]), *case.hyperparameters.values()]
    KERNELS[
        OPERATOR.choose(OPERATOR.describe(values, offsets, weights), backend).backend
    ].embedding_bag_collection_update(
        weights,
        states,
        step,
        arguments["grad_output"].to(dtype).contiguous(),
        argmax,
        values,
        offsets,
        factors,
        placement.lookups,
        case.invalid,
        kind,
        torch.tensor(hyperparameters, dtype=torch.float64),
        0x5EED,
        case.stochastic,
    )
    return (*weights, *states, step.to(values.device, dtype))


def _cases(*poolings: str | tuple[str, ...], **fields: Any) -> tuple[EmbeddingBagCollectionCase, ...]:
    """A case for each pooling, by default sum, mean and maximum; the maximum takes no weights."""
    described = [EmbeddingBagCollectionCase(p, **fields) for p in poolings or ("sum", "mean", "max")]
    return tuple(replace(c, weighted=False, sparse=False) if c.pooling == "max" else c for c in described)


SHARED: Fields = {
    "features": ((0, 2), (1,), (2, 0))
}  # tables of several features, features of several tables
MIXED: Fields = {"pooling": ("mean", "sum", "max")}
DECAYS = (None, "weight_decay", "decoupled_weight_decay")
CLIPPINGS = (None, "max_gradient", "max_gradient_norm")

QUICK = (
    EmbeddingBagCollectionCase(),
    EmbeddingBagCollectionCase(
        "mean", weighted=True, **SHARED, rows=(37, 6, 37), invalid=True, tail=2, wide_ids=False
    ),
    EmbeddingBagCollectionCase(**MIXED, **SHARED, dims=(4, 16, 33), wide_offsets=False),
    EmbeddingBagCollectionCase(("sum", "mean", "sum"), sparse=True, weighted=True, invalid=True, halves=(1,)),
    EmbeddingBagCollectionCase(("sum", "mean", "max"), batch_sizes=(3, 0, 5), ids="equal"),
    EmbeddingBagCollectionCase(("none", "sum", "mean"), dims=(4, 4, 4), **SHARED),
    EmbeddingBagCollectionCase("max", invalid=True, ties=True, **SHARED),
    EmbeddingBagCollectionCase(output="bfloat16", weighted=True, halves=(0, 2), dims=(8, 12, 1)),
    EmbeddingBagCollectionCase(lengths=(0,) * 12),
    EmbeddingBagCollectionCase(batch=0),
    EmbeddingBagCollectionCase("max", batch=0),
    EmbeddingBagCollectionCase("mean", rows=(0, 3, 1), lengths=(0, 0, 4, 1, 2, 2), batch=2),
    EmbeddingBagCollectionCase("mean", quantized="int8", weighted=True, dims=(5, 16, 64)),
    EmbeddingBagCollectionCase(**MIXED, **SHARED, quantized="int4", dims=(2, 16, 34), invalid=True),
    EmbeddingBagCollectionCase(quantized="fp8", dims=(3, 32, 8), output="float16"),
    *(
        EmbeddingBagCollectionCase("mean", optimizer=optimizer, weighted=True, decay=decay, **SHARED)
        for optimizer, decay in zip(OPTIMIZERS, itertools.cycle((None, "weight_decay")), strict=False)
    ),
    *(
        EmbeddingBagCollectionCase(
            optimizer=optimizer,
            decay="decoupled_weight_decay",
            clipping=clipping,
            half_states=True,
            stochastic=True,
        )
        for optimizer, clipping in zip(
            OPTIMIZERS, itertools.cycle(("max_gradient", "max_gradient_norm")), strict=False
        )
    ),
    EmbeddingBagCollectionCase("mean", features=((0,), (1,), (0,)), rows=(37, 6, 37), optimizer="adagrad"),
    EmbeddingBagCollectionCase(
        **MIXED, optimizer="rowwise_adagrad", halves=(0,), stochastic=True, invalid=True
    ),
)

CASES = tuple(
    itertools.chain(
        *(_cases(rows=(50, 20), dims=(dim, dim + 1), weighted=True) for dim in AWKWARD_WIDTHS),
        *(_cases(rows=(50,), dims=(33,), lengths=(length,), batch=1) for length in AWKWARD_LENGTHS),
        _cases(lengths=AWKWARD_LENGTHS, rows=(50, 20), dims=(17, 9), batch=3, weighted=True),
        *(
            _cases(wide_ids=ids, wide_offsets=offsets, weighted=True, **SHARED)
            for ids, offsets in itertools.product((True, False), repeat=2)
        ),
        *(_cases(ids=law, batch=40, weighted=True) for law in ("equal", "uniform", "zipf")),
        *(_cases(sparse=True, weighted=weighted, **SHARED) for weighted in (False, True)),
        _cases(batch_sizes=(7, 1, 3), weighted=True, **SHARED),
        _cases("sum", "mean", batch_sizes=(7, 0, 3), sparse=True, invalid=True),
        _cases("none", dims=(8, 8, 8), batch=6, **SHARED),
        _cases(("none", "mean", "max"), batch_sizes=(2, 5, 3), invalid=True),
        *(_cases(output=output, halves=(1,), weighted=True) for output in ("float16", "bfloat16", "float32")),
        _cases(rows=(9,) * 40, dims=tuple(range(1, 41)), batch=3),
        _cases(rows=(9,) * 40, dims=(16,) * 40, batch=3, features=tuple((t // 2,) for t in range(40))),
        _cases(ties=True, dims=(64, 8, 8), batch=20),
        _cases(rows=(1, 1, 1), weighted=True),
        _cases(dims=(0, 4, 4), weighted=True),
        _cases(rows=(3,), dims=(2,), ids="equal", lengths=(100_000,), batch=1, weighted=True),
        *(
            _cases(quantized=quantized, dims=(dim, dim, dim), weighted=True)
            for quantized, dim in itertools.product(
                ("int8", "int4", "fp8"), (2, 4, 16, 18, 64, 66, 100, 128, 256)
            )
        ),
        *(
            _cases(
                "sum",
                optimizer=optimizer,
                decay=decay,
                clipping=CLIPPINGS[(i + half) % 3],
                dims=(5, 16, 65),
                half_states=bool(half),
                stochastic=bool(half),
            )
            for optimizer, (i, decay), half in itertools.product(OPTIMIZERS, enumerate(DECAYS), (0, 1))
        ),
        *(_cases(optimizer=optimizer, weighted=True, halves=(0,), **SHARED) for optimizer in OPTIMIZERS),
        *(
            _cases(optimizer=optimizer, step=1, batch_sizes=(3, 1, 4), invalid=True)
            for optimizer in OPTIMIZERS
        ),
        *(
            _cases("sum", optimizer=o, rows=(3,), dims=(4,), ids="equal", lengths=(10_000, 1), batch=2)
            for o in OPTIMIZERS
        ),
    )
)

LARGE = (
    EmbeddingBagCollectionCase(batch=200, length=20, rows=(500, 40, 3000), dims=(64, 16, 33), weighted=True),
    EmbeddingBagCollectionCase("mean", batch=200, length=20, rows=(500, 40), dims=(64, 16), sparse=True),
    EmbeddingBagCollectionCase("max", batch=200, length=20, rows=(500, 40), dims=(64, 16)),
    EmbeddingBagCollectionCase(rows=(5,), dims=(16,), batch=64, length=400, weighted=True),
    *(
        EmbeddingBagCollectionCase(
            optimizer=optimizer,
            batch=200,
            length=20,
            rows=(500, 40, 3000),
            dims=(64, 16, 33),
            stochastic=True,
        )
        for optimizer in OPTIMIZERS
    ),
    EmbeddingBagCollectionCase(optimizer="rowwise_adagrad", rows=(5,), dims=(16,), batch=64, length=400),
    EmbeddingBagCollectionCase("mean", quantized="int8", batch=200, length=20, dims=(64, 16, 32)),
)


def _exhaustive() -> Iterable[EmbeddingBagCollectionCase]:
    layouts: tuple[Fields, ...] = ({}, SHARED, {"batch_sizes": (5, 0, 9)}, {**SHARED, "rows": (37, 6, 37)})
    dims = ((1, 8, 33), (16, 16, 16), (64, 129, 4))
    for layout, dim, weighted, invalid, wide, halves in itertools.product(
        layouts, dims, (False, True), (False, True), (False, True), ((), (0, 2))
    ):
        given = {**layout, "dims": dim, "weighted": weighted, "invalid": invalid, "halves": halves}
        given |= {"wide_ids": wide, "wide_offsets": not wide}
        for sparse in (False, True):
            yield from _cases(sparse=sparse, **given)
        for optimizer in OPTIMIZERS:
            yield from _cases("mean", optimizer=optimizer, stochastic=bool(halves), **given)
    for optimizer, decay, clipping, half in itertools.product(OPTIMIZERS, DECAYS, CLIPPINGS, (False, True)):
        updated = {"optimizer": optimizer, "decay": decay, "clipping": clipping, "dims": (5, 16, 65)}
        yield from _cases("sum", **updated, half_states=half, stochastic=half)


def _registered_call(arguments: dict[str, Any], backend: str) -> tuple[Any, tuple[Any, ...]]:
    case = arguments["case"]
    weights = [arguments[name] for name in case.tables]
    offsets, factors = arguments["offsets"], arguments.get("per_sample_weights")
    placement = case.layout.side_by_side((len(offsets) - 1) // case.layout.num_features)
    dtype = default_output_dtype([w.dtype for w in weights])
    return torch.ops.recsys_ops.embedding_bag_collection.default, (
        weights,
        arguments["values"],
        offsets,
        None if factors is None else factors.to(dtype),
        placement.lookups,
        placement.size,
        dtype,
        case.invalid,
        case.layout.has_max,
        case.sparse,
        backend,
    )


SPEC = OperatorSpec(
    operator=OPERATOR,
    function=run,
    kernels=KERNELS,
    registered_call=_registered_call,
    case=EmbeddingBagCollectionCase,
    quick=QUICK,
    cases=CASES,
    large=LARGE,
    small=(
        *_cases(rows=(6, 4), dims=(3, 2), batch=2, length=3, weighted=True),
        EmbeddingBagCollectionCase(
            ("mean", "sum"),
            rows=(6, 6),
            dims=(3, 3),
            features=((0, 1), (1,)),
            batch=2,
            weighted=True,
            invalid=True,
        ),
        EmbeddingBagCollectionCase(
            ("max", "none"), rows=(6, 4), dims=(3, 2), batch_sizes=(2, 3), invalid=True
        ),
    ),
    typical=(
        EmbeddingBagCollectionCase("mean", weighted=True, **SHARED),
        EmbeddingBagCollectionCase(sparse=True, wide_ids=False),
        EmbeddingBagCollectionCase(**MIXED),
    ),
    mutating=(
        EmbeddingBagCollectionCase(optimizer="adam"),
        EmbeddingBagCollectionCase("mean", quantized="int8", weighted=True),
    ),
    asynchronous=(
        *_cases(batch=20, weighted=True, **SHARED),
        EmbeddingBagCollectionCase(rows=(3,), dims=(100,), lengths=(5000,), ids="equal", batch=1),
    ),
    isolations=tuple(isolations(EmbeddingBagCollectionCase)),
    bad_inputs=bad_inputs(EmbeddingBagCollectionCase),
    mutants=MUTANTS,
    exhaustive=_exhaustive,
)
