"""Compiles CUDA kernels for GPUs that need not be here: a cubin for each source of ``csrc/`` and each GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from recsys_ops import _nvcc
from recsys_ops.inspection.binaries import CompiledKernel, missing_tools, read_cubin

CSRC = Path(__file__).parents[2] / "csrc"

_FLAGS = [flag for flag in _nvcc.FLAGS if not flag.startswith(("-X", "--threads"))]
_DTYPES = {"f": "fp32", "d": "fp64", "Half": "fp16", "BFloat16": "bf16"}


def sources(op: str) -> list[Path]:
    """The CUDA sources of an operator."""
    return sorted((CSRC / op).glob("*.cu"))


def missing() -> str | None:
    """Why CUDA kernels cannot be compiled and read here, or None where they can."""
    if not any(CSRC.glob("*/*.cu")):
        return "the CUDA sources are not in this installation: clone the repository"
    if reason := _nvcc.missing():
        return reason
    return missing_tools(Path(_compiler().path).parent)


def version() -> str:
    """Of the nvcc that is used."""
    return _compiler().version


def supports(target: str) -> bool:
    """Whether this nvcc knows the GPU."""
    return _compiler().supports(target)


def compile_source(op: str, source: Path, target: str) -> dict[str, CompiledKernel]:
    """The kernels of a source by name, such as ``forward fp32 x4``.

    Raises:
        RuntimeError: it does not compile; the message is what nvcc said.
    """
    nvcc = Path(_compiler().path)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc, "-cubin", f"-arch={target}", *_FLAGS, source, "-o", cubin]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for {target}:\n{done.stderr.strip()}")
        if "wgmma.mma_async instructions are serialized" in done.stdout + done.stderr:
            raise RuntimeError(f"{source.name}: products wait for each other:\n{done.stderr.strip()}")
        kernels = read_cubin(target, cubin, nvcc.parent)
    parameters = template_parameters(source.read_text(encoding="utf-8"))
    return {kernel_name(op, mangled, parameters): kernel for mangled, kernel in kernels.items()}


def template_parameters(source: str) -> dict[str, list[str]]:
    """Names of the template parameters of each kernel in a source."""
    found = re.findall(r"template <([^<>]*)>\s*__global__[^;{]*?(\w+)_kernel\(", source)
    return {kernel: re.findall(r"(\w+)(?:,|$)", parameters) for parameters, kernel in found}


def kernel_name(op: str, mangled: str, parameters: dict[str, list[str]]) -> str:
    """What a person calls a kernel: its types, N as x4, flags that are set, other numbers by their names.

    Example:
        >>> parameters = {"bag_sum": ["T", "N", "MAXIMUM"]}
        >>> kernel_name("bag", "_ZN12_GLOBAL__N_114bag_sum_kernelIfLi4ELb1EEEvPKT_", parameters)
        'sum fp32 x4 maximum'
    """
    found = re.search(rf".*{op}_(\w+?)_kernel(I\w*?EEv)?", mangled)
    if found is None:
        return mangled
    words = [found[1]]
    values = re.findall(r"(Half|BFloat16|[fd])|L(\w)(\d+)E", (found[2] or "").removesuffix("EEv"))
    names = parameters.get(f"{op}_{found[1]}", [])
    for (dtype, kind, number), name in zip(values, [*names, *["?"] * len(values)], strict=False):
        if dtype:
            words.append(_DTYPES[dtype])
        elif kind != "b":
            words.append(f"x{number}" if name == "N" else f"{name.lower()}{number}")
        elif number == "1":
            words.append(name.lower())
    return " ".join(words)


def _compiler() -> _nvcc.Nvcc:
    nvcc = _nvcc.find_nvcc()
    if nvcc is None:
        raise RuntimeError(str(_nvcc.missing()))
    return nvcc
