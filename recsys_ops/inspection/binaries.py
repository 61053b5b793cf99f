"""What can be read from the binary of a kernel. Counts are instructions in it, not executions."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from recsys_ops.inspection.occupancy import LIMITS, occupancy

TOOLS = ("cuobjdump", "nvdisasm")


@dataclass(frozen=True)
class CompiledKernel:
    """What a kernel became for one GPU."""

    target: str
    threads: int  # of a block, at most
    registers: int  # of a thread; on AMD vector registers
    spilled_bytes: int  # stack and local memory of a thread
    shared_bytes: int  # of a block, without what a launch adds
    loads: dict[int, int]  # from global memory, by width in bytes
    stores: dict[int, int]
    loads_in_flight: int | None  # 16-byte loads issued before the first of them is used; NVIDIA only
    tensor_core: int
    async_copies: int  # from global to shared memory
    atomics: int  # on global memory
    code_bytes: int

    @property
    def occupancy(self) -> float:
        """Warps that a multiprocessor holds of those that it could, from 0 to 1."""
        return occupancy(self.target, self.threads, self.registers, self.shared_bytes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"occupancy": self.occupancy}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CompiledKernel:
        """From ``to_dict``, also after JSON made strings of the widths."""
        content = {name: value for name, value in content.items() if name != "occupancy"}
        for name in ("loads", "stores"):
            content[name] = {int(width): count for width, count in content[name].items()}
        return cls(**content)


def missing_tools(near: Path | None = None) -> str | None:
    """Why cubins cannot be read here, or None where they can."""
    absent = [name for name in TOOLS if _tool(name, near) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} not found: install the CUDA toolkit's binary utilities, or triton"


def read_cubin(target: str, cubin: Path, near: Path | None = None) -> dict[str, CompiledKernel]:
    """The kernels of a cubin by their names in it.

    Args:
        target: which GPU it is for.
        cubin: the file.
        near: a folder whose ``cuobjdump`` and ``nvdisasm`` go before those on the PATH.
    """
    usage = _run_tool("cuobjdump", near, "--dump-resource-usage", cubin)
    listing = re.split(r"^\t\.section\t([^\s,]+),", _run_tool("nvdisasm", near, cubin), flags=re.MULTILINE)
    sections = dict(zip(listing[1::2], listing[2::2], strict=True))
    kernels = {}
    for name, numbers in re.findall(r"^ Function (\S+):\n(.*)$", usage, re.MULTILINE):
        if f".nv.info.{name}" not in sections:
            continue  # a function that kernels call
        used = {kind: int(count) for kind, count in re.findall(r"\b(\w+):(\d+)", numbers)}
        # From sm_90 on, static shared memory includes what the system takes.
        reserved = LIMITS[target].shared_reserved if target != "sm_80" else 0
        sass = [
            line
            for line in sections[f".text.{name}"].splitlines()
            if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)
        ]
        code = "\n".join(sass)
        if set(re.findall(r"\*/\s+(?:@!?U?P\w+ )?(\w+)", code)) <= _NOTHING:
            continue  # a kernel for other GPUs
        kernels[name] = CompiledKernel(
            target,
            _threads(sections[f".nv.info.{name}"]),
            used["REG"],
            used["STACK"] + used["LOCAL"],
            max(0, used["SHARED"] - reserved),
            _by_width(re.findall(r"\b(?:LDG?|LDGSTS)\.E([.\w]*)", code)),
            _by_width(re.findall(r"\bSTG?\.E([.\w]*)", code)),
            _loads_in_flight(sass),
            len(re.findall(r"\b(?:[A-Z]G?MMA|UTC\w*MMA)\b", code)),
            len(re.findall(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", code)),
            len(re.findall(r"\b(?:REDG?|ATOMG?)\.E", code)),
            _code_bytes(sass),
        )
    return kernels


def read_amdgcn(target: str, assembly: str) -> CompiledKernel:
    """The only kernel of an assembly file."""
    used = {name: int(count) for name, count in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    size = re.search(r"^; codeLenInByte = (\d+)$", assembly, re.MULTILINE)
    memory = r"\b(?:global|buffer|flat)_"
    return CompiledKernel(
        target,
        used["max_flat_workgroup_size"],
        used["vgpr_count"],
        used["private_segment_fixed_size"],
        used["group_segment_fixed_size"],
        _by_width(re.findall(memory + r"load_(\w+)", assembly)),
        _by_width(re.findall(memory + r"store_(\w+)", assembly)),
        None,
        len(re.findall(r"\bv_s?mfma", assembly)),
        len(re.findall(memory + r"load_(?:lds_|.*\blds$)", assembly, re.MULTILINE)),
        len(re.findall(memory + "atomic", assembly)),
        int(size[1]) if size else 0,
    )


def tools_of_triton() -> Path | None:
    """The folder of Triton's wheel with NVIDIA's tools."""
    try:
        import triton.backends.nvidia
    except ImportError:
        return None
    return Path(triton.backends.nvidia.__file__).parent / "bin"


def _tool(name: str, near: Path | None) -> str | None:
    for folder in (near, None, tools_of_triton()):
        if found := shutil.which(name, path=None if folder is None else str(folder)):
            return found
    return None


def _run_tool(name: str, near: Path | None, *args: object) -> str:
    tool = _tool(name, near)
    if tool is None:
        raise RuntimeError(f"{name} was not found")
    done = subprocess.run([tool, *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout


def _threads(info: str) -> int:
    """Of a block at most: what the kernel's launch bounds say, or what every block may have."""
    found = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\n(?:.*\n){5}((?:.*\.word.*\n){3})", info)
    return prod(int(word, 16) for word in re.findall(r"\.word\s+(0x\w+)", found[1])) if found else 1024


_NOTHING = {"MOV", "LDC", "EXIT", "BRA", "NOP"}


def _code_bytes(sass: list[str]) -> int:
    return 16 + max((int(line.split("*")[1], 16) for line in sass), default=-16)


_WIDTHS = {
    **{"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1},
    **{"dwordx4": 16, "dwordx3": 12, "dwordx2": 8},
    **{"ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1, "byte": 1},
}


def _by_width(suffixes: Iterable[str]) -> dict[int, int]:
    """Instructions by the bytes they move, from ``.128`` or ``dwordx4``; 4 bytes where nothing is said."""

    def width(suffix: str) -> int:
        return next((_WIDTHS[part] for part in re.split(r"[._]", suffix) if part in _WIDTHS), 4)

    return dict(sorted(Counter(map(width, suffixes)).items()))


def _loads_in_flight(sass: list[str]) -> int:
    """The most 16-byte loads that are issued from one of them on, before that one's registers are touched."""
    loads = [re.search(r"\bLDG\.E\S*\.128\S* R(\d+)", line) for line in sass]
    if not any(loads):
        return 0
    touched = [frozenset(map(int, re.findall(r"\bR(\d+)\b", line))) for line in sass]
    most = 0
    for start, load in enumerate(loads):
        if load:
            own = frozenset(range(int(load[1]), int(load[1]) + 4))
            end = next((i for i in range(start + 1, len(sass)) if own & touched[i]), len(sass))
            most = max(most, sum(map(bool, loads[start:end])))
    return most
