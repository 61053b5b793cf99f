"""Workloads, peers and the limits that operators are measured against.

Installed and imported as ``recsys_ops.benchmarks`` (a symbolic link in the package
points here), because the bare name belongs to other projects.
"""

if not __name__.startswith("recsys_ops."):
    raise ImportError("import recsys_ops.benchmarks: the bare name would load a second copy of this folder")

from recsys_ops.benchmarks.run import run_bench

__all__ = ["run_bench"]
