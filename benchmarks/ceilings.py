"""What a CPU or a GPU can do at best: measured bandwidths, matrix rate, and the cost of a call."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from recsys_ops.benchmarks.machine import cache_bytes
from recsys_ops.benchmarks.registry import Workload
from recsys_ops.embedding_bag.api import embedding_bag
from recsys_ops.embedding_bag.cost import Cost
from recsys_ops.timing import HOST_CLOCK, Clock, seconds_per_call

ROW_BYTES = (64, 128, 256, 512, 1024)
_BAG = 32
_LEAST_WORKING_SET = 2**18


@dataclass(frozen=True)
class Ceilings:
    """The best rates found, in bytes, operations and seconds (per second where they are rates)."""

    read_one_thread: float | None  # None on a GPU
    read: float
    copy: float  # read and written bytes together
    zeroed: dict[int, float]  # new blocks filled with zeros, by their bytes: large ones also cost page faults
    rows: dict[str, dict[int, float]]  # random rows read, by where they are found and by a row's bytes
    flops: float  # fp32 matrix product
    call: float  # seconds of the cheapest call that returns a tensor; on a GPU, one filled by a kernel
    device: str = "cpu"

    def row_rate(self, place: str, row_bytes: int) -> float:
        """Bytes per second of random rows, interpolated between the measured sizes."""
        return _between(self.rows[place], row_bytes)

    def limit(self, workload: Workload, cost: Cost) -> tuple[float, str]:
        """The least seconds that a call of this cost can take here, and what bounds it.

        Memory delivers each distinct row once where the workload finds its rows in memory, and
        everything streamed and zeroed; the caches deliver every lookup. On a GPU so many rows are
        waited for at once that memory may be expected to deliver them as fast as it copies.
        """
        place = workload.rows_from
        bounds = {"flops": cost.flops / self.flops, "call": self.call}
        if place == "memory" and self.device != "cpu":
            bounds["memory"] = cost.bytes / self.copy
        else:
            bounds |= self._memory_and_cache(place, cost)
        bound = max(bounds, key=lambda name: bounds[name])
        return bounds[bound], bound

    def _memory_and_cache(self, place: str, cost: Cost) -> dict[str, float]:
        hot = "last-level cache" if place == "last-level cache" else "cache"
        memory = cost.zeroed_bytes / _between(self.zeroed, cost.zeroed_bytes) if cost.zeroed_bytes else 0.0
        if place == "memory":
            memory += cost.streamed_bytes / self.read
            memory += cost.unique_row_bytes / self.row_rate(place, cost.row_bytes)
        return {"memory": memory, "cache": cost.lookup_row_bytes / self.row_rate(hot, cost.row_bytes)}


def measure_ceilings(
    working_set: int | None = None, repetitions: int = 5, device: str = "cpu", clock: Clock = HOST_CLOCK
) -> Ceilings:
    """Measure them: some seconds of work, more memory traffic than any cache holds.

    Args:
        working_set: bytes of the blocks that must not fit in a cache; by default 8 times the
            last-level cache, at least 512 MiB, on a GPU at least 2 GiB.
        repetitions: of which the best counts.
        device: "cpu" or "cuda".
        clock: of the device.
    """
    on_cpu = device == "cpu"
    second, last = cache_bytes(device)
    working_set = working_set or max(8 * last, 2**29 if on_cpu else 2**31)
    block = torch.ones(working_set // 4, device=device)
    target = torch.empty_like(block)
    half = block.numel() // 2

    def best(function: Callable[[], Any]) -> float:
        # On a GPU, several calls hide what launching one takes; on a CPU they would hide page faults.
        calls = 1 if on_cpu else 10
        return min(seconds_per_call(function, calls, clock=clock) for _ in range(repetitions))

    read_one_thread = None
    places = {"memory": working_set, "last-level cache": last // 4, "cache": second // 2}
    if not on_cpu:
        del places["last-level cache"]  # which is the second level
    else:
        with _threads(1):
            read_one_thread = working_set / 2 / best(lambda: block[:half].sum())
    side = min(1024 if on_cpu else 4096, int((working_set // 4) ** 0.5))
    left = torch.rand(side, side, device=device)
    cheapest = torch.empty if on_cpu else torch.zeros
    return Ceilings(
        device=device,
        read_one_thread=read_one_thread,
        read=working_set / best(block.sum),
        copy=2 * working_set / best(lambda: target.copy_(block)),
        zeroed={
            4 * size: 4 * size / best(functools.partial(torch.zeros, size, device=device))
            for size in sorted({2**16, 2**20, 2**22, 2**24, half})
        },
        rows={
            place: {row: _row_rate(block, row, min(size, working_set), best) for row in ROW_BYTES}
            for place, size in places.items()
        },
        flops=2 * side**3 / best(lambda: left @ left),
        call=best(lambda: [cheapest(1, 64, device=device) for _ in range(1000)]) / 1000,
    )


def _row_rate(block: torch.Tensor, row_bytes: int, size: int, best: Callable[..., float]) -> float:
    """The best rate of reading random rows of the first ``size`` bytes, over several implementations."""
    size = max(size, _LEAST_WORKING_SET)
    table = block[: size // 4].view(-1, row_bytes // 4)
    device = block.device
    looked_up = min(block.numel() * 4, 2**26 if device.type == "cpu" else 2**29) // 2
    count = looked_up // row_bytes // _BAG * _BAG
    offsets = torch.arange(0, count + 1, _BAG, device=device)
    output = torch.empty(count, table.shape[1], device=device)
    generator = torch.Generator(device).manual_seed(0)

    def ids() -> torch.Tensor:
        return torch.randint(len(table), (count,), generator=generator, device=device)

    pool = itertools.cycle([ids() for _ in range(8)])
    probes: list[Callable[[torch.Tensor], Any]] = [
        lambda ids: torch.index_select(table, 0, ids, out=output),
        lambda ids: F.embedding_bag(ids, table, offsets, mode="sum", include_last_offset=True),
        lambda ids: embedding_bag(ids, table, offsets, mode="sum", include_last_offset=True),
    ]
    seconds = []
    with torch.no_grad():
        for probe in probes:
            with contextlib.suppress(Exception):  # what breaks here fails its workloads, which say why
                seconds.append(best(lambda probe=probe: probe(next(pool))))
    return count * row_bytes / min(seconds)


def _between(rates: dict[int, float], size: int) -> float:
    """The rate at a size, between the measured ones on logarithmic axes."""
    sizes, values = np.log(list(rates)), np.log(list(rates.values()))
    return float(np.exp(np.interp(np.log(size), sizes, values)))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
