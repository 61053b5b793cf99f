"""NVIDIA's compiler: where it is, and what it can compile for. For setup.py it needs nothing but Python."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT_VARIABLE = "RECSYS_OPS_CUDA_ARCHS"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
OLDEST_RELEASE = (12, 0)

FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi")
_JOB_BYTES = 2**31  # what compiling one source for one architecture takes at most


@dataclass(frozen=True)
class Nvcc:
    """A compiler that was found."""

    path: str
    release: tuple[int, int]
    supported: frozenset[str]  # "sm_80", "compute_80", ...

    def supports(self, architecture: str) -> bool:
        """Whether it compiles for ``sm_90a``, or to PTX for ``compute_90``."""
        return architecture.rstrip("af") in self.supported

    def architectures(self, requested: str | None = None) -> list[str]:
        """What to compile for: those asked for, else all of ours that are known here and PTX of the newest.

        Args:
            requested: such as ``"sm_90a compute_90"``, with spaces, commas or semicolons; by default
                the value of RECSYS_OPS_CUDA_ARCHS.

        Raises:
            ValueError: one of those asked for is not known.
        """
        if requested is None:
            requested = os.environ.get(ENVIRONMENT_VARIABLE, "")
        names = re.split(r"[ ,;]+", requested.strip()) if requested.strip() else []
        for name in names:
            if not re.fullmatch(r"(sm|compute)_\d+[af]?", name) or not self.supports(name):
                known = " ".join([*ARCHITECTURES, "compute_90"])
                raise ValueError(
                    f"recsys-ops: expected {ENVIRONMENT_VARIABLE} to name what nvcc {self.version} "
                    f"compiles for, such as {known}, got {name!r}"
                )
        if names:
            return names
        found = [name for name in ARCHITECTURES if self.supports(name)]
        return [*found, found[-1].rstrip("af").replace("sm_", "compute_")]

    @property
    def version(self) -> str:
        return "{}.{}".format(*self.release)


def find_nvcc() -> Nvcc | None:
    """The one that CUDACXX names, else that of CUDA_HOME or CUDA_PATH, on the PATH, or in its usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    if named := os.environ.get("CUDACXX"):
        places = [named]
    return next(filter(None, map(_described, filter(None, map(shutil.which, places)))), None)


@functools.cache
def _described(path: str) -> Nvcc | None:
    """What a compiler says of itself; None where it is no nvcc."""
    version = re.search(r"release (\d+)\.(\d+)", _output(path, "--version"))
    if version is None:
        return None
    known = _output(path, "--list-gpu-code") + _output(path, "--list-gpu-arch")
    return Nvcc(path, (int(version[1]), int(version[2])), frozenset(known.split()))


def missing() -> str | None:
    """Why CUDA kernels cannot be compiled here, or None where they can."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to its folder"
    if nvcc.release < OLDEST_RELEASE:
        oldest = "{}.{}".format(*OLDEST_RELEASE)
        return f"nvcc {nvcc.version} at {nvcc.path} is too old: expected {oldest} or later"
    return None


def generate(architectures: list[str]) -> list[str]:
    """The options that make nvcc compile for all of these."""
    options = []
    for name in architectures:
        virtual = name.replace("sm_", "compute_")
        options.append(f"-gencode=arch={virtual},code={name}")
    return options


def jobs() -> int:
    """How many compilations fit into the cores and the free memory."""
    memory = Path("/proc/meminfo")
    free = (
        re.search(r"^MemAvailable: +(\d+) kB$", memory.read_text(), re.MULTILINE) if memory.exists() else None
    )
    fitting = int(free[1]) * 1024 // _JOB_BYTES if free else 1
    return max(1, min(os.cpu_count() or 1, fitting))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
