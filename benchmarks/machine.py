"""What a measurement was made on."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
from typing import Any

import torch

from recsys_ops import __version__, _extension, doctor

_UNKNOWN_CACHE_BYTES = 32 * 2**20


def describe_machine() -> dict[str, Any]:
    """The processor, its cores, threads, caches, SIMD levels and memory, in words and numbers."""
    return {
        "cpu": doctor.cpu_model(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": doctor.cores(),
        "threads": torch.get_num_threads(),
        "caches": doctor.caches(),
        "simd": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "recsys_ops": _extension.module().simd_level() if not _extension.missing() else None,
        },
        "memory": doctor.memory(),
    }


def versions() -> dict[str, str | None]:
    """Of Python and of what is compared; None for what is absent."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "recsys_ops": __version__,
        "torch": torch.__version__,
        "fbgemm": None,
    }
    for package in ("fbgemm-gpu-cpu", "fbgemm-gpu"):
        try:
            found["fbgemm"] = found["fbgemm"] or importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def cache_bytes() -> tuple[int, int]:
    """Size of the second-level and of the last-level cache; a guess where the system is silent."""
    sizes = {name: size for name, size in map(_named_size, doctor.caches()) if size}
    last = max(sizes.values(), default=_UNKNOWN_CACHE_BYTES)
    return sizes.get("L2", last // 16), last


def _named_size(text: str) -> tuple[str, int]:
    """("L2", 524288) from "L2 512K"."""
    found = re.fullmatch(r"(\w+) (\d+)([KMG]?)", text)
    return (found[1], int(found[2]) * 1024 ** " KMG".index(found[3] or " ")) if found else (text, 0)
