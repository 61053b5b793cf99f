"""The clocks, and candidates that take turns by them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from recsys_ops.timing import CudaClock, HostClock, seconds_per_call, time_interleaved


class FakeGpu:
    """Runs what is launched in order, later: a launch takes 1 ms of the host and its work on the GPU."""

    def __init__(self) -> None:
        self.host = self.gpu = 0.0  # milliseconds: now, and when all that is launched will be done
        self.Event = self._event

    def launch(self, milliseconds: float) -> Callable[[], None]:
        def call() -> None:
            self.host += 1.0
            self.gpu = max(self.gpu, self.host) + milliseconds

        return call

    def synchronize(self) -> None:
        self.host = max(self.host, self.gpu)

    def _event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(synchronize=self.synchronize)

        def record() -> None:
            event.at = self.gpu = max(self.gpu, self.host)

        def elapsed_time(end: Any) -> float:
            assert self.host >= end.at, "read before it has happened"
            return float(end.at - event.at)

        event.record, event.elapsed_time = record, elapsed_time
        return event


@pytest.mark.parametrize(
    ("work", "seconds"), [(5.0, (1 + 8 * 5) / 8), (0.1, 1.1 / 8 + 7 / 8)], ids=["large calls", "small calls"]
)
def test_events_tell_what_calls_in_a_row_take(work: float, seconds: float) -> None:
    gpu = FakeGpu()
    assert seconds_per_call(gpu.launch(work), 8, clock=CudaClock(gpu)) == pytest.approx(seconds / 1e3)


def test_a_call_behind_a_busy_gpu_is_timed_without_its_launch() -> None:
    gpu = FakeGpu()
    gpu.launch(50.0)()
    assert seconds_per_call(gpu.launch(0.5), clock=CudaClock(gpu)) == pytest.approx(0.5e-3)


def test_the_host_clock_waits_before_and_not_after(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    monkeypatch.setattr("time.perf_counter", lambda: gpu.host / 1e3)
    gpu.launch(50.0)()
    assert seconds_per_call(gpu.launch(5.0), 4, clock=HostClock(gpu.synchronize)) == pytest.approx(1e-3)
    assert gpu.gpu > gpu.host


def test_candidates_are_timed_behind_what_goes_before_each() -> None:
    gpu = FakeGpu()
    flushed: list[float] = []

    def flush() -> None:
        flushed.append(gpu.host)
        gpu.launch(50.0)()

    candidates = {"fast": gpu.launch(0.2), "slow": gpu.launch(0.6)}
    seconds = time_interleaved(candidates, rounds=5, before_each=flush, clock=CudaClock(gpu))
    assert seconds["fast"] == pytest.approx(0.2e-3) and seconds["slow"] == pytest.approx(0.6e-3)
    assert len(flushed) >= 2 * 5


def test_a_round_ends_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))
    now = 0.0

    def call() -> None:
        nonlocal now
        now += 1.0
        next(calls)

    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert seconds_per_call(call, 80, longest=15.0) == 1.0
    assert next(calls) == 20
