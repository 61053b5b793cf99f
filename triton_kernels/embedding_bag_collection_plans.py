"""How the lookups of a collection are spread over launches, and what each launch is told of them."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from recsys_ops.embedding_bag_collection.reference import MAX, MEAN, Lookup
from recsys_ops.triton_kernels import embedding_bag_collection_backward_kernels as backward_kernels
from recsys_ops.triton_kernels import embedding_bag_collection_kernels as kernels
from recsys_ops.triton_kernels.embedding_bag import BAGS, LANES, EmbeddingBagForwardConfig

_KEPT = 64  # plans of each sort
_VECTOR_BYTES = 16
_WIDEST = 4  # how many times the narrowest rows of a launch fit into the widest

_Plan = TypeVar("_Plan")


class Strided(NamedTuple):
    """Where a table, or a state with a number for each row, has its elements."""

    address: int
    row_stride: int
    column_stride: int
    item_size: int

    @classmethod
    def of(cls, tensor: Tensor) -> Strided:
        column_stride = tensor.stride(1) if tensor.dim() == 2 else 1
        return cls(tensor.data_ptr(), tensor.stride(0), column_stride, tensor.element_size())

    def alignment(self, columns: int) -> int:
        """Elements that may be loaded at once: a power of two that divides all that rows start at."""
        if self.column_stride != 1:
            return 1
        vector = _VECTOR_BYTES // self.item_size
        return gcd(vector, self.address // self.item_size, self.row_stride, columns)


class Table(NamedTuple):
    """What a forward is told about a table; ``scales`` and ``per_byte`` are of a quantised one."""

    rows: int
    dim: int
    dtype: torch.dtype
    cells: Strided
    scales: Strided | None = None
    per_byte: int = 1

    @property
    def alignment(self) -> int:
        return self.cells.alignment(self.dim // self.per_byte)


class Numbers:
    """Integers in device memory, for whichever stream asks for them."""

    def __init__(self, numbers: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._stream = None
        if device.type == "cpu":
            self._tensor = torch.tensor(numbers, dtype=torch.int64)
        elif torch.cuda.is_current_stream_capturing():
            # A graph copies nothing from memory that may be gone when it runs, but it can fill.
            self._tensor = torch.empty(len(numbers), dtype=torch.int64, device=device)
            for i, number in enumerate(numbers):
                self._tensor[i].fill_(number)
        else:
            pinned = torch.tensor(numbers, dtype=torch.int64).pin_memory()
            self._tensor = pinned.to(device, non_blocking=True)
            self._stream = torch.cuda.current_stream(device)
            self._copied = self._stream.record_event()

    def get(self) -> Tensor:
        if self._stream is not None and not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self._device)
            if stream != self._stream:
                stream.wait_event(self._copied)
                self._tensor.record_stream(stream)
        return self._tensor


class Kept(Generic[_Plan]):
    """The plans that were asked for last, by what they depend on."""

    def __init__(self, build: Callable[..., _Plan]) -> None:
        self.build = build
        self.plans: OrderedDict[Hashable, _Plan] = OrderedDict()
        self._in_graphs: dict[int, _Plan] = {}  # for as long as this process lives

    def __call__(self, device: torch.device, *key: Any) -> _Plan:
        key = (device, *key)
        plan = self.plans.get(key)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if plan is None:
            plan = self.build(*key)
            if capturing:
                return plan
            self.plans[key] = plan
            if len(self.plans) > _KEPT:
                self.plans.popitem(last=False)
        else:
            self.plans.move_to_end(key)
            if capturing:
                self._in_graphs[id(plan)] = plan
        return plan


def _directory(device: torch.device, fields: Sequence[str], rows: Sequence[dict[str, int]]) -> Numbers:
    """A row for each lookup or table, as [fields, rows]."""
    return Numbers([row[name] for name in fields for row in rows], device)


@dataclass(frozen=True, eq=False)
class PoolingLaunch:
    """Lookups that are served by one launch of a kernel over bags."""

    directory: Numbers
    num_lookups: int
    programs: int
    config: EmbeddingBagForwardConfig
    dtype: torch.dtype
    is_max: bool
    has_mean: bool
    constants: dict[str, Any]


@Kept
def pooling_plan(
    device: torch.device,
    lookups: tuple[Lookup, ...],
    tables: tuple[Table, ...],
    disjoint: bool,
    config: EmbeddingBagForwardConfig | None,
) -> list[PoolingLaunch]:
    """Launches for the lookups, in each of tables that are alike.

    With ``disjoint`` there are no maxima, no entry is in two lookups of a launch, and one program
    has all columns of its bags.
    """
    if disjoint:
        lookups = tuple(lookup for lookup in lookups if lookup.mode != MAX)
    used = [lookup for lookup in lookups if lookup.num_bags > 0 and tables[lookup.table].dim > 0]
    chains = _chains(used) if disjoint else [0] * len(used)
    alike: dict[tuple[Hashable, int], list[Lookup]] = {}
    for lookup, chain in sorted(zip(used, chains, strict=True), key=lambda pair: -tables[pair[0].table].dim):
        table = tables[lookup.table]
        kind = (table.dtype, table.alignment, table.cells.column_stride == 1, lookup.mode == MAX, chain)
        # The widest of a kind come first.
        of_kind = [found for key, found in alike.items() if key[0] == kind]
        if not of_kind or tables[of_kind[-1][0].table].dim > _WIDEST * table.dim:
            of_kind.append(alike.setdefault((kind, table.dim), []))
        of_kind[-1].append(lookup)
    return [_pooling_launch(device, sorted(found), tables, disjoint, config) for found in alike.values()]


def _pooling_launch(
    device: torch.device,
    lookups: list[Lookup],
    tables: tuple[Table, ...],
    disjoint: bool,
    config: EmbeddingBagForwardConfig | None,
) -> PoolingLaunch:
    widest = max((tables[lookup.table] for lookup in lookups), key=lambda table: table.dim)
    config = config or default_config(widest)
    block_d = max(config.block_d, widest.per_byte)
    alignment, output_alignment = widest.alignment, alignment_of_cells(lookups)
    rows = []
    programs = 0
    for lookup in lookups:
        table = tables[lookup.table]
        rows.append(
            {
                **lookup._asdict(),
                **table.cells._asdict(),
                "first_program": programs,
                "is_mean": lookup.mode == MEAN,
                "rows": table.rows,
                "row_stride": table.cells.row_stride // alignment,
                "dim": table.dim // (alignment * table.per_byte),
                "start": lookup.start // output_alignment,
                "stride": lookup.stride // output_alignment,
            }
        )
        if table.scales is not None:
            rows[-1] |= {f"scales_{name}": number for name, number in table.scales._asdict().items()}
        blocks = 1 if disjoint else triton.cdiv(table.dim, block_d)
        programs += triton.cdiv(lookup.num_bags, config.bags_per_program) * blocks
    fields = kernels.FIELDS if widest.scales is not None else kernels.FIELDS[: -kernels.SCALES_FIELDS]
    constants = {
        "UNIT_COLUMNS": widest.cells.column_stride == 1,
        "SEVERAL_BLOCKS": widest.dim > block_d,
        "ALIGNMENT": alignment,
        "OUTPUT_ALIGNMENT": output_alignment,
        "BLOCK_D": block_d,
        "BAGS": config.bags_per_program,
        "ROWS": config.rows_in_flight,
        "num_warps": config.num_warps,
    }
    return PoolingLaunch(
        _directory(device, fields, rows),
        len(lookups),
        programs,
        config,
        widest.dtype,
        lookups[0].mode == MAX,
        any(lookup.mode == MEAN for lookup in lookups),
        constants,
    )


def default_config(widest: Table, lanes: int = LANES) -> EmbeddingBagForwardConfig:
    """That of a table on its own; codes are spread over lanes like the fp32 that they become."""
    dtype = widest.dtype if widest.scales is None else torch.float32
    return EmbeddingBagForwardConfig.default(widest.dim, dtype, lanes)


def alignment_of_cells(lookups: Sequence[Lookup]) -> int:
    """What divides where the lookups' cells start, up to 16 bytes of the smallest elements."""
    return gcd(_VECTOR_BYTES // 2, *(n for lookup in lookups for n in (lookup.start, lookup.stride)))


def _chains(lookups: Sequence[Lookup]) -> list[int]:
    """Numbers that are equal only for lookups whose bags follow one another, so have no entry in common."""
    ends: list[int] = []
    chains = {}
    for i, lookup in sorted(enumerate(lookups), key=lambda pair: pair[1].first_bag):
        if lookup.first_bag not in ends:
            ends.append(lookup.first_bag)
        chains[i] = ends.index(lookup.first_bag)
        ends[chains[i]] += lookup.num_bags
    return [chains[i] for i in range(len(lookups))]


class Sharer(NamedTuple):
    """One of the tables that share entries, for each set of such in a group."""

    number: int  # of the sharers of an entry
    tables: dict[int, int]  # the table of each set of entries
    alignment: int  # of the cells in the output


class Group(NamedTuple):
    """Tables of one kind, whose keys follow one another."""

    first_key: int
    end_key: int
    num_rows: int  # how many there can be
    is_max: bool
    sharers: list[Sharer]


@dataclass(frozen=True, eq=False)
class EntryPlan:
    """How entries of lookups become keys, and which keys belong to which tables."""

    groups: list[Group]
    first_keys: list[int]  # of each set of tables that share entries
    dead_key: int
    page_bits: int
    pages: Numbers  # the set of each page
    lookups: list[tuple[Numbers, int, int]]  # for each sharer: the directory, lookups and programs
    ranges: list[tuple[int, int]]  # the bags whose entries get keys, from first to end
    most_lookups: int  # of a bag
    bags_apart: int  # bags of lookups that may have entries which bags before a gap have, too
    has_mean: bool
    has_max: bool

    def num_entries(self, offsets: Tensor, num_values: int) -> int:
        """How many entries there can be.

        Bags of one number after the other never go back in ``values``. That is taken to hold
        across bags without a lookup, except that bags of one entry may follow for a second time:
        those of ``layout.with_bags_of_one``. On a GPU an assertion checks it.
        """
        each = self.most_lookups * num_values
        found = each + min(each, self.bags_apart)
        if offsets.is_cpu:
            found = max(found, sum(int(offsets[end] - offsets[first]) for first, end in self.ranges))
        return found


@Kept
def entry_plan(
    device: torch.device, lookups: tuple[Lookup, ...], num_rows: tuple[int, ...], kinds: tuple[Hashable, ...]
) -> EntryPlan:
    """The plan for tables of some numbers of rows; one launch serves tables of equal ``kinds``."""
    of_table: dict[int, list[Lookup]] = {}
    for lookup in lookups:
        if lookup.num_bags > 0:
            of_table.setdefault(lookup.table, []).append(lookup)
    shared: dict[Hashable, list[int]] = {}
    for table, found in of_table.items():
        bags = tuple((lookup.mode, lookup.first_bag, lookup.num_bags) for lookup in found)
        shared.setdefault((num_rows[table], bags), []).append(table)
    # A group for sets of tables that are alike, each table like the one in the same place of the other sets.
    grouped: dict[tuple[Hashable, bool], list[list[int]]] = {}
    for tables in shared.values():
        tables.sort(key=lambda table: repr(kinds[table]))
        kind = (tuple(kinds[table] for table in tables), of_table[tables[0]][0].mode == MAX)
        grouped.setdefault(kind, []).append(tables)

    sets = list(itertools.chain(*grouped.values()))
    total = sum(num_rows[tables[0]] for tables in sets)
    page_bits = max(1, total // max(1, len(sets))).bit_length() - 1  # so there are but a few for each table
    pages: list[int] = []
    first_keys: list[int] = []
    groups = []
    for (_, is_max), members in grouped.items():
        first_key = len(pages) << page_bits
        first_set = len(first_keys)
        for tables in members:
            first_keys.append(len(pages) << page_bits)
            pages += [len(first_keys) - 1] * triton.cdiv(num_rows[tables[0]], 1 << page_bits)
        sharers = [
            Sharer(
                number,
                {first_set + i: tables[number] for i, tables in enumerate(members)},
                alignment_of_cells([lookup for tables in members for lookup in of_table[tables[number]]]),
            )
            for number in range(len(members[0]))
        ]
        rows = sum(num_rows[tables[0]] for tables in members)
        groups.append(Group(first_key, len(pages) << page_bits, rows, is_max, sharers))

    return EntryPlan(
        groups,
        first_keys,
        len(pages) << page_bits,
        page_bits,
        Numbers(pages, device),
        _entry_directories(device, sets, of_table, num_rows, first_keys),
        *_reach([lookup for tables in sets for lookup in of_table[tables[0]]]),
        any(lookup.mode == MEAN for lookup in lookups),
        any(lookup.mode == MAX for lookup in lookups),
    )


def _entry_directories(
    device: torch.device,
    sets: list[list[int]],
    of_table: dict[int, list[Lookup]],
    num_rows: tuple[int, ...],
    first_keys: list[int],
) -> list[tuple[Numbers, int, int]]:
    before = list(itertools.accumulate((len(of_table[tables[0]]) for tables in sets), initial=0))
    directories = []
    for sharer in range(max(map(len, sets), default=0)):
        rows: list[dict[str, int]] = []
        programs = 0
        for s, tables in enumerate(sets):
            for i, lookup in enumerate(of_table[tables[sharer]] if sharer < len(tables) else []):
                rows.append(
                    {
                        **lookup._asdict(),
                        "first_program": programs,
                        "is_mean": lookup.mode == MEAN,
                        "rows": num_rows[tables[0]],
                        "first_key": first_keys[s],
                        "entries_of": before[s] + i,
                    }
                )
                programs += triton.cdiv(lookup.num_bags, BAGS)
        directories.append((_directory(device, backward_kernels.ENTRY_FIELDS, rows), len(rows), programs))
    return directories


def _reach(lookups: list[Lookup]) -> tuple[list[tuple[int, int]], int, int]:
    """The bags of each lookup from first to end, the most lookups of a bag, and bags after the first gap."""
    ranges = [(lookup.first_bag, lookup.first_bag + lookup.num_bags) for lookup in lookups]
    opened = most = reached = after_gap = 0
    for _, change in sorted(itertools.chain(*(((first, 1), (end, -1)) for first, end in ranges))):
        opened += change
        most = max(most, opened)
    for first, end in sorted(ranges):
        if after_gap or (reached and first > reached):
            after_gap += end - first
        reached = max(reached, end)
    return ranges, most, after_gap


@Kept
def table_directory(
    device: torch.device, plan: EntryPlan, number: int, tensors: tuple[tuple[Strided, ...], ...]
) -> Numbers:
    """Where the sharers of a number have their weights and states, by set of tables."""
    names = ("address", "row_stride", "column_stride")
    rows = [
        dict.fromkeys(backward_kernels.TABLE_FIELDS, 0) | {"first_key_of_table": key}
        for key in plan.first_keys
    ]
    for group in plan.groups:
        for s, table in group.sharers[number].tables.items() if number < len(group.sharers) else ():
            rows[s]["number"] = table
            for i, tensor in enumerate(tensors[table]):
                rows[s] |= {f"{name}_{i}": getattr(tensor, name) for name in names}
    return _directory(device, backward_kernels.TABLE_FIELDS, rows)
