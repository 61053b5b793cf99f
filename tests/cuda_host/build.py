"""Builds CUDA sources with the C++ compiler, for fibers of a CPU instead of threads of a GPU."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILT = ROOT / "build" / "cuda_host"
COMPILER = os.environ.get("CXX", "g++")

# What watches the kernels: the first cannot be told apart from what it runs in, so it is preloaded.
SANITIZERS = {
    "address": [
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr"),
        "-fsanitize-sections=cuda_shared",
    ],
    "races": ["-fsanitize=thread"],
}
FLAGS = [
    *(
        "-std=c++17",
        "-O1",
        "-g1",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-strict-aliasing",
        "-fno-omit-frame-pointer",
    ),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", "-U_FORTIFY_SOURCE"),
    *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020A000000000000"),
    *("-DRECSYS_OPS_CUDA_LIBRARY=recsys_ops_cuda_host", "-DRECSYS_OPS_CUDA_KEY=CPU"),
    *("-DRECSYS_OPS_SIMD_LEVEL=scalar", "-DRECSYS_OPS_VECTOR_BYTES=1"),
]
# Locals that nobody has written hold a pattern.
INSTRUMENTED = ["-ftrivial-auto-var-init=pattern"]


# Sources of another operator that an operator is built on.
BORROWED = {"embedding_bag_collection": ["embedding_bag/embedding_bag_backward.cu"]}


def build(
    sources: Sequence[Path],
    sanitizer: str,
    defines: Sequence[str] = (),
    with_torch: bool = True,
    csrc: Path = ROOT / "csrc",
) -> Path:
    """A shared library of these sources and the engine; made once for the same contents."""
    engine = [HERE / "engine.cpp", HERE / "tiles_on_cpu.cpp"]
    engine += [HERE / "races.cpp"] if sanitizer == "races" else []
    engine += [HERE / "torch_on_cpu.cpp"] if with_torch else []
    headers = [path for folder in (HERE, csrc) for path in (*folder.rglob("*.h"), *folder.rglob("*.cuh"))]
    contents = hashlib.sha256(repr((sanitizer, *defines, FLAGS, INSTRUMENTED, SANITIZERS)).encode())
    contents.update(f"{torch.__version__} {COMPILER} {Path(__file__).read_text()}".encode())
    for path in [*sorted(sources), *sorted(engine), *sorted(headers)]:
        contents.update(path.read_bytes())
    library = BUILT / f"{sanitizer}-{contents.hexdigest()[:16]}.so"
    if library.exists():
        return library
    BUILT.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = library.with_name(f"{library.stem}-{source.stem}.{os.getpid()}.o")
        is_watched = source.suffix == ".cu" or (sanitizer == "address" and source not in engine)
        watched = [*SANITIZERS[sanitizer], *INSTRUMENTED] if is_watched else []
        includes = [HERE, csrc, *(cpp_extension.include_paths() if with_torch else ())]
        _run(
            *(COMPILER, *FLAGS, *watched, *(f"-D{name}" for name in defines)),
            *(f"-I{path}" for path in includes),
            *("-x", "c++", "-c", str(source), "-o", str(target)),
        )
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sources, *engine]))
    # The hooks of the thread sanitizer are our own.
    sanitized = SANITIZERS[sanitizer] if sanitizer == "address" else []
    paths = cpp_extension.library_paths()
    partial = library.with_suffix(f".{os.getpid()}")
    _run(
        *(COMPILER, "-shared", *sanitized, "-Wl,-Bsymbolic", *objects, "-o", str(partial)),
        *(f"-L{path}" for path in paths),
        *(("-ltorch", "-ltorch_cpu", "-lc10") if with_torch else ()),
    )
    partial.rename(library)
    for target in objects:
        Path(target).unlink()
    return library


def build_operator(
    operator: str, sanitizer: str, defines: Sequence[str] = (), csrc: Path = ROOT / "csrc"
) -> Path:
    """The CUDA kernels of an operator and what checks their arguments, as operators of PyTorch on the CPU."""
    folder = csrc / operator
    sources = [*csrc.glob("common/cuda/*.cu"), *folder.glob("*.cu"), *folder.glob("*_cuda.cpp")]
    sources += HERE.glob(f"{operator}_eager.cpp")
    sources += [csrc / source for source in BORROWED.get(operator, ())]
    return build(sources, sanitizer, defines, csrc=csrc)


def environment(sanitizer: str) -> dict[str, str]:
    """Of a process that loads such a library."""
    if sanitizer != "address":
        return dict(os.environ)
    runtimes = [_run(COMPILER, f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    return os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stdout
