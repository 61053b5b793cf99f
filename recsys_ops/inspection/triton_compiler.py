"""Compiles Triton kernels for GPUs that need not be here.

Kernels that were imported under TRITON_INTERPRET cannot be compiled, so ``compile_operator``
compiles them in a process of its own, which this module is the program of.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recsys_ops.inspection.binaries import CompiledKernel, read_amdgcn, read_cubin, tools_of_triton

_GPUS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class TritonSource:
    """A kernel as some launch wants it; ``variants.triton_sources(target)`` of an operator lists its own."""

    name: str
    kernel: Any  # what ``triton.jit`` made
    signature: dict[str, str]  # types of the run-time arguments: ``{"x_ptr": "*fp32", "n": "i32"}``
    constants: dict[str, Any]  # all other arguments: the ``tl.constexpr`` ones, and None for absent pointers
    options: dict[str, Any] = field(default_factory=dict)  # of the launch: ``num_warps``, ``debug``, ...
    multiples_of_16: tuple[str, ...] = ()  # integers that are, such as strides


def missing() -> str | None:
    """Why Triton kernels cannot be compiled here, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'recsys-ops[triton]'"
    return None


def version() -> str:
    """Of the Triton that is installed."""
    return importlib.metadata.version("triton")


def compile_operator(op: str, target: str) -> dict[str, CompiledKernel]:
    """All variants of an operator's kernels by name, compiled by a process that does not interpret them.

    Raises:
        RuntimeError: one does not compile; the message is what the process said.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, op, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the Triton kernels of {op} for {target} do not compile:\n{done.stderr.strip()}")
    return {name: CompiledKernel.from_dict(content) for name, content in json.loads(done.stdout).items()}


def compile_kernel(source: TritonSource, target: str) -> CompiledKernel:
    """Compile a Triton kernel without a GPU, for pointers aligned to 16 bytes.

    Raises:
        ValueError: target is not known, or an argument is named nowhere, twice, or does not exist.
        RuntimeError: ``TRITON_INTERPRET`` was set when the kernel was defined: nothing can be compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in _GPUS:
        raise ValueError(f"compile_kernel: expected target to be one of {list(_GPUS)}, got {target!r}")
    kernel = source.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"compile_kernel: expected a kernel defined without TRITON_INTERPRET, got {type(kernel).__name__}"
        )
    given = Counter([*source.signature, *source.constants])
    odd = sorted(
        name for name in given | Counter(kernel.arg_names) if given[name] != kernel.arg_names.count(name)
    )
    if odd:
        raise ValueError(
            f"compile_kernel: expected signature and constants to name each argument once, got {odd}"
        )
    types = {name: source.signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name in source.multiples_of_16
    }
    tree = ASTSource(kernel, types, source.constants, aligned)
    binary = triton.compile(tree, target=GPUTarget(*_GPUS[target]), options=source.options)
    if "amdgcn" in binary.asm:
        found = read_amdgcn(target, binary.asm["amdgcn"])
        return replace(found, shared_bytes=max(found.shared_bytes, binary.metadata.shared))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        (found,) = read_cubin(target, cubin, tools_of_triton()).values()
    return replace(found, shared_bytes=found.shared_bytes + binary.metadata.shared)


if __name__ == "__main__":
    op, target = sys.argv[1:]
    sources = importlib.import_module(f"recsys_ops.{op}.variants").triton_sources(target)
    print(json.dumps({source.name: compile_kernel(source, target).to_dict() for source in sources}))
