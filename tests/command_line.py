"""What a command that was run in this process leaves; the fixture ``run`` of conftest.py runs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Ended(NamedTuple):
    code: object
    out: str
    err: str


Run = Callable[..., Ended]
