"""Compiles Triton kernels for GPUs that need not be here, and reads from the binary what became of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class CompiledKernel:
    """What a kernel became: counts are instructions in the binary, not executions."""

    target: str
    registers: int  # of a thread; on AMD vector registers
    spilled_bytes: int  # stack and local memory of a thread
    shared_bytes: int  # of a block
    loads: dict[int, int]  # from global memory, by width in bytes
    stores: dict[int, int]
    atomics: int  # on global memory
    loads_in_flight: int | None  # 16-byte loads issued before the first of them is used; NVIDIA only


def compile_kernel(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], target: str, **options: Any
) -> CompiledKernel:
    """Compile a Triton kernel without a GPU, for pointers aligned to 16 bytes.

    Args:
        kernel: what ``triton.jit`` made.
        signature: types of the run-time arguments: ``{"x_ptr": "*fp32", "n": "i32"}``.
        constants: values of all other arguments: the ``tl.constexpr`` ones, and None for absent pointers.
        target: a key of ``TARGETS``.
        **options: of the launch: ``num_warps``, ``debug``, ...

    Raises:
        ValueError: target is not known, or an argument is named nowhere, twice, or does not exist.
        RuntimeError: ``TRITON_INTERPRET`` was set when the kernel was defined: nothing can be compiled.

    Example:
        >>> from recsys_ops.testing import compiled
        >>> list(compiled.TARGETS)
        ['sm_80', 'sm_90', 'sm_100', 'gfx942']
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in TARGETS:
        raise ValueError(f"compile_kernel: expected target to be one of {list(TARGETS)}, got {target!r}")
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"compile_kernel: expected a kernel defined without TRITON_INTERPRET, got {type(kernel).__name__}"
        )
    given = Counter([*signature, *constants])
    odd = sorted(
        name for name in given | Counter(kernel.arg_names) if given[name] != kernel.arg_names.count(name)
    )
    if odd:
        raise ValueError(
            f"compile_kernel: expected signature and constants to name each argument once, got {odd}"
        )
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")
    }
    source = ASTSource(kernel, types, constants, aligned)
    binary = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    if "cubin" in binary.asm:
        return _read_cubin(target, binary.asm["cubin"], binary.metadata.shared)
    return _read_amdgcn(target, binary.asm["amdgcn"])


def _read_cubin(target: str, cubin: bytes, shared_bytes: int) -> CompiledKernel:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _run_tool("cuobjdump", "--dump-resource-usage", file)
        sass = _run_tool("nvdisasm", "--print-code", file)
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return CompiledKernel(
        target,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        shared_bytes,
        _by_width(re.findall(r"\bLDG\.E([.\w]*)", sass)),
        _by_width(re.findall(r"\bSTG\.E([.\w]*)", sass)),
        len(re.findall(r"\b(?:RED|ATOM|ATOMG)\b", sass)),
        _loads_in_flight(sass),
    )


def _read_amdgcn(target: str, assembly: str) -> CompiledKernel:
    used = {name: int(count) for name, count in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    memory = r"\b(?:global|buffer|flat)_"
    return CompiledKernel(
        target,
        used["vgpr_count"],
        used["private_segment_fixed_size"],
        used["group_segment_fixed_size"],
        _by_width(re.findall(memory + r"load_(\w+)", assembly)),
        _by_width(re.findall(memory + r"store_(\w+)", assembly)),
        len(re.findall(memory + "atomic", assembly)),
        None,
    )


def _run_tool(name: str, *args: object) -> str:
    """Output of one of NVIDIA's tools, which Triton's wheel carries."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    command = [str(tool), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_WIDTHS = {"128": 16, "x4": 16, "x3": 12, "64": 8, "x2": 8, "short": 2, "16": 2, "byte": 1, "8": 1}


def _by_width(suffixes: Iterable[str]) -> dict[int, int]:
    """Instructions by the bytes they move, from ``.128`` or ``dwordx4``; 4 bytes where nothing is said."""
    return dict(Counter(next((w for key, w in _WIDTHS.items() if key in suffix), 4) for suffix in suffixes))


def _loads_in_flight(sass: str) -> int:
    """The most 16-byte loads that are issued from one of them on, before that one's registers are touched."""
    lines = [line for line in sass.splitlines() if re.match(r"\s*/\*[0-9a-f]+\*/", line)]
    most = 0
    for start, line in enumerate(lines):
        if target := re.search(r"\bLDG\.E\S*\.128\S* R(\d+)", line):
            first = int(target[1])
            touches = re.compile(rf"\bR(?:{'|'.join(str(first + i) for i in range(4))})\b")
            loads = 1
            for later in lines[start + 1 :]:
                if touches.search(later):
                    break
                loads += bool(re.search(r"\bLDG\.E\S*\.128", later))
            most = max(most, loads)
    return most
