"""Values of the embedding bag collection that must not leak."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recsys_ops.embedding_bag_collection.row_optimizers import OPTIMIZERS, STATES
from recsys_ops.testing import Isolation

Arguments = dict[str, Any]
Cotangents = tuple[Tensor | None, ...]
Masks = dict[str, Tensor]

ENTRY = 4  # the one whose bag, row or weight is poisoned where a single one is


class _Entries:
    """What becomes of the entries of a case whose features have one batch size."""

    def __init__(self, arguments: Arguments) -> None:
        self.case, self.values = arguments["case"], arguments["values"]
        positions = torch.arange(len(self.values), device=self.values.device)
        bags = torch.searchsorted(arguments["offsets"].long(), positions, right=True) - 1
        self.features, self.samples = bags // self.case.batch, bags % self.case.batch

    def looked_up_in(self, table: int) -> Tensor:
        """The live entries of a table, [N]."""
        valid = (self.values >= 0) & (self.values < self.case.rows[table])
        return valid & torch.isin(self.features, self.features.new_tensor(self.case.looked_up[table]))

    def live(self) -> Tensor:
        """Those of any table, [N]."""
        return torch.stack([self.looked_up_in(t) for t in range(len(self.case.rows))]).any(0)

    def in_bag_of(self, entry: int) -> Tensor:
        """Those of the same bag, [N]."""
        return (self.features == self.features[entry]) & (self.samples == self.samples[entry])

    def rows(self, table: int, entries: Tensor) -> Tensor:
        """The rows of a table that some entries name, [R]."""
        named = self.values.new_zeros(self.case.rows[table], dtype=torch.bool)
        named[self.values[entries & self.looked_up_in(table)].long()] = True
        return named

    def cells(self, table: int, entries: Tensor) -> Tensor:
        """The cells of the output, or of its gradient, in which a table and a bag of these entries meet."""
        layout = self.case.layout
        cells = self.values.new_zeros((self.case.batch, layout.pooled_dim), dtype=torch.bool)
        for number, feature, columns in _lookups(self.case):
            if number == table:
                cells[self.samples[entries & (self.features == feature)], columns] = True
        return cells

    def trained(self, table: int, rows: Tensor) -> Masks:
        """Rows of what comes out for a table: its gradient, or the updated weight and states."""
        if self.case.optimizer is None:
            return {f"gradient of weight_{table}": rows[:, None]}
        rowwise = list(STATES[OPTIMIZERS.index(self.case.optimizer)].values())
        first = len(self.case.rows) + table * len(rowwise)
        states = {f"output {first + s}": rows if r else rows[:, None] for s, r in enumerate(rowwise)}
        return {f"output {table}": rows[:, None], **states}


def _lookups(case: Any) -> Iterator[tuple[int, int, slice]]:
    """Of each lookup the table, the feature and the columns of the output."""
    column = 0
    for table, features in enumerate(case.looked_up):
        for feature in features:
            yield table, feature, slice(column, column + case.dims[table])
            column += case.dims[table]


def _merged(*masks: Masks) -> Masks:
    merged: Masks = {}
    for mask in masks:
        merged |= {name: merged[name] | m if name in merged else m for name, m in mask.items()}
    return merged


def _of_table(arguments: Arguments, table: int) -> list[Tensor]:
    """Its weight and its states."""
    return [t for n, t in arguments.items() if n == f"weight_{table}" or n.startswith(f"state_{table}_")]


def _gradient(arguments: Arguments, cotangents: Cotangents) -> Tensor:
    """That of the output, [B, sum of D]."""
    gradient = arguments["grad_output"] if "grad_output" in arguments else cotangents[0]
    assert gradient is not None
    return gradient.view(arguments["case"].batch, -1)


def _poison_unnamed(arguments: Arguments, cotangents: Cotangents) -> Masks:
    entries, kept = _Entries(arguments), []
    for table in range(len(entries.case.rows)):
        unnamed = ~entries.rows(table, entries.looked_up_in(table))
        for tensor in _of_table(arguments, table):
            tensor[unnamed] = torch.nan
        kept.append(entries.trained(table, unnamed))
    return _merged(*kept) if entries.case.optimizer is not None else {}


def _poison_row(arguments: Arguments, cotangents: Cotangents) -> Masks:
    entries, table = _Entries(arguments), 0
    row = entries.values[entries.looked_up_in(table).nonzero()[0, 0]]
    for tensor in _of_table(arguments, table):
        tensor[row] = torch.nan
    naming = entries.looked_up_in(table) & (entries.values == row)
    cells = entries.cells(table, naming)
    # The maximum may move elsewhere within the bags that name the row.
    beside = naming
    if "max" in entries.case.modes:
        beside = torch.stack([entries.in_bag_of(int(e)) for e in naming.nonzero()]).any(0)
    moved = entries.trained(table, entries.rows(table, beside))
    if entries.case.optimizer is not None:
        return moved
    return {"output": cells, "gradient of per_sample_weights": naming, **moved}


def _poison_table(arguments: Arguments, cotangents: Cotangents) -> Masks:
    entries, table = _Entries(arguments), 1
    for tensor in _of_table(arguments, table):
        tensor[:] = torch.nan
    looked_up = entries.looked_up_in(table)
    everything = torch.ones_like(entries.cells(table, looked_up)[:1])
    columns = torch.zeros_like(everything)
    for number, _, those in _lookups(entries.case):
        columns[:, those] |= number == table
    _gradient(arguments, cotangents)[:, columns[0]] = torch.nan
    trained = entries.trained(table, entries.rows(table, looked_up) | (entries.case.optimizer is not None))
    if entries.case.optimizer is not None:
        return trained
    return {"output": columns, "gradient of per_sample_weights": looked_up, **trained}


def _poison_gradient(arguments: Arguments, cotangents: Cotangents) -> Masks:
    entries, table = _Entries(arguments), 0
    chosen = int(entries.looked_up_in(table).nonzero()[ENTRY, 0])
    bag = entries.in_bag_of(chosen)
    _gradient(arguments, cotangents)[entries.cells(table, bag)] = torch.nan
    return {
        "gradient of per_sample_weights": bag & entries.looked_up_in(table),
        **entries.trained(table, entries.rows(table, bag)),
    }


def _poison_dead_weights(arguments: Arguments, cotangents: Cotangents) -> Masks:
    arguments["per_sample_weights"][~_Entries(arguments).live()] = torch.nan
    return {}


def _poison_weight(arguments: Arguments, cotangents: Cotangents) -> Masks:
    entries = _Entries(arguments)
    chosen = torch.zeros_like(entries.live())
    chosen[entries.live().nonzero()[ENTRY, 0]] = True
    arguments["per_sample_weights"][chosen] = torch.nan
    tables = range(len(entries.case.rows))
    trained = [entries.trained(table, entries.rows(table, chosen)) for table in tables]
    if entries.case.optimizer is not None:
        return _merged(*trained)
    cells = torch.stack([entries.cells(table, chosen) for table in tables]).any(0)
    return _merged({"output": cells}, *trained)


def isolations(case: Any) -> Iterable[Isolation]:
    """Of the class of cases."""
    posed = case(dims=(9, 4, 16), batch=6, ids="uniform", features=((0, 2), (1,), (2, 0)), rows=(37, 6, 37))
    weighted = replace(posed, weighted=True)
    for name, base, quick in (
        ("sum", weighted, True),
        ("mean", replace(weighted, pooling="mean"), False),
        ("max", replace(posed, pooling="max"), True),
        ("sparse", replace(weighted, pooling="mean", sparse=True), True),
        *(
            (optimizer, replace(weighted, pooling=pooling, optimizer=optimizer, decay=decay), quick)
            for optimizer, pooling, decay, quick in (
                ("sgd", "sum", "weight_decay", False),
                ("rowwise_adagrad", "mean", None, True),
                ("adam", "sum", "decoupled_weight_decay", True),
                ("lamb", "mean", "weight_decay", False),
            )
        ),
        ("adagrad, max", replace(posed, pooling="max", optimizer="adagrad"), False),
    ):
        given = [
            ("NaN in rows that no bag names", replace(base, rows=(2000, 300, 2000)), _poison_unnamed),
            ("NaN in a row", base, _poison_row),
            ("NaN in a table", base, _poison_table),
            ("NaN in the gradient of a bag", base, _poison_gradient),
        ]
        if base.weighted:
            given += [
                ("NaN weight of a dropped entry", replace(base, invalid=True), _poison_dead_weights),
                ("NaN weight after the last bag", replace(base, tail=3), _poison_dead_weights),
                (
                    "NaN weight in bags that no table looks up",
                    replace(base, features=((0,), (3,), (2, 0))),
                    _poison_dead_weights,
                ),
                ("NaN weight of an entry", base, _poison_weight),
            ]
        for what, described, poison in given:
            yield Isolation(f"{what}, {name}", described, poison, quick)
