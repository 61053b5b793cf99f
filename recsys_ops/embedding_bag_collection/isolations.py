"""Values of the embedding bag collection that must not leak."""

from __future__ import annotations

from typing import Any


def isolations(case: Any) -> list[Any]:
    return []
