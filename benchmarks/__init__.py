"""Workloads, peers and the limits that operators are measured against.

Installed and imported as ``recsys_ops.benchmarks`` (a symbolic link in the package
points here), because the bare name belongs to other projects.
"""

if not __name__.startswith("recsys_ops."):
    raise ImportError("import recsys_ops.benchmarks: the bare name would load a second copy of this folder")

from typing import Any

__all__ = ["run_bench"]


def __getattr__(name: str) -> Any:
    """``run_bench`` at its first use: ``make gpu`` starts where PyTorch may be missing, and says so."""
    if name == "run_bench":
        from recsys_ops.benchmarks.run import run_bench

        return run_bench
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
