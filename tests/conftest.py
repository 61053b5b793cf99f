"""Set-up of all tests: interpreted Triton kernels, and which of the slow tests run."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
# Threads that wait by spinning take the cores from everything else on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import datetime
import zlib

import pytest

SHARES = 10


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow",
        choices=("none", "share", "all"),
        default="none",
        help=f"slow tests to run: none, one in {SHARES} (others every day), or all",
    )


def pytest_report_header(config: pytest.Config) -> str:
    slow = config.getoption("--slow")
    return f"slow tests: {f'share {_today()} of {SHARES}' if slow == 'share' else slow}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = config.getoption("--slow")
    left_out = [i for i in items if i.get_closest_marker("slow") and not _runs(i, slow)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _runs(item: pytest.Item, slow: str) -> bool:
    return slow == "all" or (slow == "share" and zlib.crc32(item.nodeid.encode()) % SHARES == _today())


def _today() -> int:
    return datetime.datetime.now(datetime.timezone.utc).toordinal() % SHARES
