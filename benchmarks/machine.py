"""What a measurement was made on."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
import subprocess
from typing import Any

import torch

from recsys_ops import __version__, _extension, doctor

_UNKNOWN_CACHE_BYTES = 32 * 2**20


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """The processor, its cores, threads, caches, SIMD levels and memory, and the GPU where it is that."""
    gpu = {"gpu": describe_gpu()} if device == "cuda" else {}
    return {
        **gpu,
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


def describe_gpu() -> dict[str, Any]:
    """The current GPU in words and numbers."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver, or None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.split()), None)


def versions() -> dict[str, str | None]:
    """Of Python and of what is compared; None for what is absent."""
    return {
        "python": platform.python_version(),
        "recsys_ops": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _installed("triton"),
        "torchrec": _installed("torchrec"),
        "fbgemm": _installed("fbgemm-gpu-cpu") or _installed("fbgemm-gpu"),
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def cache_bytes(device: str = "cpu") -> tuple[int, int]:
    """Size of the second-level and of the last-level cache; a guess where the system is silent."""
    if device == "cuda":
        second = _UNKNOWN_CACHE_BYTES
        if torch.cuda.is_available():
            second = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return second, second
    sizes = {name: size for name, size in map(_named_size, doctor.caches()) if size}
    last = max(sizes.values(), default=_UNKNOWN_CACHE_BYTES)
    return sizes.get("L2", last // 16), last


def _named_size(text: str) -> tuple[str, int]:
    """("L2", 524288) from "L2 512K"."""
    found = re.fullmatch(r"(\w+) (\d+)([KMG]?)", text)
    return (found[1], int(found[2]) * 1024 ** " KMG".index(found[3] or " ")) if found else (text, 0)
