"""Which of the slow tests a run takes."""

from __future__ import annotations

import datetime
import importlib.util
import zlib

import pytest

SHARES = 12

# What needs TorchRec to be imported, where it is not: tests of it skip themselves.
_NEEDED = ("torchrec", "fbgemm_gpu", "tensordict", "torchmetrics", "tqdm", "pyre_extensions")
_OF_TORCHREC = ["recsys_ops/torchrec", "tests/torchrec/same_batches.py", "tests/torchrec/two_ranks.py"]
collect_ignore = [] if all(map(importlib.util.find_spec, _NEEDED)) else _OF_TORCHREC


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow",
        choices=("none", "share", "all"),
        default="none",
        help=f"slow tests to run: none, one share of {SHARES} that changes daily, or all",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--slow")
    today = datetime.date.today().toordinal() % SHARES

    def runs(item: pytest.Item) -> bool:
        if wanted == "all" or item.get_closest_marker("slow") is None:
            return True
        return wanted == "share" and zlib.crc32(item.nodeid.encode()) % SHARES == today

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]
