"""Builds ``recsys_ops._C``, CPU kernels for every SIMD level, and ``recsys_ops._C_cuda``.

Both are on LibTorch's stable ABI. ``RECSYS_OPS_BUILD`` decides: ``auto`` (the default) builds
what it can and says what it could not: the CPU kernels, and those of CUDA where there are nvcc
and a PyTorch with CUDA, whether or not there is a GPU. ``cpu`` builds those of the CPU or
fails, ``cuda`` both or fails, ``none`` a package that has only the backends written in Python.
``RECSYS_OPS_CUDA_ARCHS`` names other GPUs than all: ``"sm_90a compute_90"``.

``python setup.py check_cuda`` compiles and links the CUDA kernels in ``build/``, without a
PyTorch with CUDA too.
"""

import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def _load(name: str) -> Any:
    """A module of the package that needs nothing else of it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recsys_ops" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_nvcc = _load("_nvcc")
BUILD = os.environ.get("RECSYS_OPS_BUILD", "auto")
TORCH_TARGET_VERSION = "0x020A000000000000"  # 2.10, the oldest that is supported
PY_LIMITED_API = "0x030A0000"  # 3.10
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("aarch64", "arm64")

# Bytes of a vector register, and what makes the compiler use it.
SIMD_LEVELS: dict[str, tuple[int, list[str]]] = {"scalar": (1, [])}
if X86:
    SIMD_LEVELS["avx2"] = (32, ["-mavx2", "-mfma", "-mf16c"])
    SIMD_LEVELS["avx512"] = (
        64,
        ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    )
if ARM:
    SIMD_LEVELS["neon"] = (16, [])

# Compiled once per level; everything else in csrc/ once.
SIMD_SOURCES = [
    "csrc/embedding_bag/bag_pooling.cpp",
    "csrc/embedding_bag/gradient_pooling.cpp",
    "csrc/embedding_bag_collection/quantized_pooling.cpp",
    "csrc/embedding_bag_collection/row_update.cpp",
    "csrc/hstu_attention/attention_tasks.cpp",
]


def _found(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


CUDA_SOURCES = _found("csrc/**/*.cu", "csrc/**/*_cuda.cpp")
SOURCES = [source for source in _found("csrc/**/*.cpp") if source not in [*SIMD_SOURCES, *CUDA_SOURCES]]
HEADERS = _found("csrc/**/*.h", "csrc/**/*.cuh")
FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fno-math-errno", "-fno-wrapv"]

# GCC 12 takes its own intrinsics' undefined operands for ours.
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]


CPU = Extension("recsys_ops._C", sources=SOURCES, depends=HEADERS, language="c++", py_limited_api=True)
CUDA = Extension(
    "recsys_ops._C_cuda",
    sources=CUDA_SOURCES,
    depends=[*HEADERS, "recsys_ops/_nvcc.py"],
    language="c++",
    py_limited_api=True,
)


def _cuda_missing() -> str | None:
    """Why ``auto`` builds no CUDA kernels, or None where it does."""
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return _nvcc.missing()


class BuildExtension(build_ext):
    """Compiles SIMD sources for each level, CUDA ones by nvcc, and records what the build contains."""

    def run(self) -> None:
        self.info: dict[str, object] = {"requested": BUILD, "cuda": None, "simd_levels": [], "reason": None}
        super().run()
        package = ROOT / "recsys_ops" if self.inplace else Path(self.build_lib) / "recsys_ops"
        package.mkdir(parents=True, exist_ok=True)
        written = f'"""Written by setup.py."""\n\nBUILD_INFO = {self.info!r}\n'
        (package / "_build_info.py").write_text(written)

    def build_extensions(self) -> None:
        self.extensions = [e for e in self.extensions if self._is_built(e)]
        self.info["compiler"] = " ".join(self.compiler.compiler_cxx)

    def _is_built(self, extension: Extension) -> bool:
        """Build it; where it need not be, go on without it and say why."""
        is_cuda = extension.name == CUDA.name
        try:
            reason = _cuda_missing() if is_cuda and BUILD == "auto" else None
            if reason is None:
                self.build_extension(extension)
                return True
        except Exception as error:
            if BUILD != "auto":
                raise
            reason = str(error)
        kernels = "CUDA kernels" if is_cuda else "compiled kernels"
        self.info["cuda_reason" if is_cuda else "reason"] = reason
        print(f"recsys-ops: built without {kernels}: {reason}", file=sys.stderr)
        return False

    def build_extension(self, extension: Extension) -> None:
        if extension.name == CUDA.name:
            self.build_cuda(extension, Path(self.get_ext_fullpath(extension.name)))
            return
        from torch.utils.cpp_extension import include_paths, library_paths

        target = "RECSYS_OPS_X86" if X86 else "RECSYS_OPS_ARM" if ARM else "RECSYS_OPS_OTHER"
        extension.include_dirs = [str(ROOT / "csrc"), *include_paths()]
        extension.define_macros = [
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("Py_LIMITED_API", PY_LIMITED_API),
            (target, None),
            # Outside of the SIMD sources, vectors have one lane.
            ("RECSYS_OPS_SIMD_LEVEL", "scalar"),
            ("RECSYS_OPS_VECTOR_BYTES", "1"),
        ]
        extension.extra_compile_args = FLAGS
        # Importing torch has loaded its libraries, so no path to them is recorded.
        extension.library_dirs = library_paths()
        extension.libraries = ["torch", "torch_cpu", "c10"]

        def compile_level(level: str) -> list[str]:
            width, flags = SIMD_LEVELS[level]
            return self.compiler.compile(
                SIMD_SOURCES,
                output_dir=os.path.join(self.build_temp, level),
                macros=[
                    (target, None),
                    ("RECSYS_OPS_SIMD_LEVEL", level),
                    ("RECSYS_OPS_VECTOR_BYTES", str(width)),
                ],
                extra_postargs=[*FLAGS, *flags, *QUIET],
                depends=HEADERS,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = pool.map(compile_level, SIMD_LEVELS)
            extension.extra_objects = [path for level in objects for path in level]
        super().build_extension(extension)
        self.info["simd_levels"] = list(SIMD_LEVELS)

    def build_cuda(self, extension: Extension, library: Path) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        if (reason := _nvcc.missing()) is not None:
            raise RuntimeError(f"recsys-ops: RECSYS_OPS_BUILD={BUILD}: {reason}")
        nvcc = _nvcc.find_nvcc()
        architectures = nvcc.architectures()
        self.info["cuda"] = {"nvcc": nvcc.version, "architectures": architectures}
        newest = max((ROOT / path).stat().st_mtime for path in [*extension.sources, *extension.depends])
        stamp = Path(self.build_temp) / "cuda" / "architectures"
        wanted = f"{nvcc.version} {architectures} {library}"
        up_to_date = stamp.exists() and stamp.read_text() == wanted
        if up_to_date and library.exists() and library.stat().st_mtime > newest and not self.force:
            return
        definitions = [
            "USE_CUDA",
            f"TORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            f"Py_LIMITED_API={PY_LIMITED_API}",
            *(["RECSYS_OPS_SM90A"] if any(name.endswith("90a") for name in architectures) else []),
        ]
        compiler = [nvcc.path, *(["-ccbin", os.environ["CXX"]] if "CXX" in os.environ else [])]
        options = [
            *_nvcc.FLAGS,
            *_nvcc.generate(architectures),
            *(f"-D{definition}" for definition in definitions),
            f"-I{ROOT / 'csrc'}",
            *(f"-isystem={path}" for path in (*include_paths(), sysconfig.get_path("include"))),
        ]

        def compile_one(source: str) -> str:
            target = stamp.parent / f"{Path(source).name}.o"
            _run(*compiler, *options, "-c", source, "-o", str(target))
            return str(target)

        stamp.parent.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_nvcc.jobs()) as pool:
            objects = list(pool.map(compile_one, extension.sources))
        # A PyTorch without CUDA lacks the last; then the symbols that are in it stay open.
        wanted_libraries = ["torch", "torch_cpu", "c10", "torch_cuda"]
        folders = library_paths()
        libraries = [n for n in wanted_libraries if any(Path(f, f"lib{n}.so").exists() for f in folders)]
        links = [*(f"-L{folder}" for folder in folders), *(f"-l{name}" for name in libraries)]
        targets = _nvcc.generate(architectures)
        _run(*compiler, *targets, "-shared", "-cudart=static", *objects, *links, "-o", str(library))
        stamp.write_text(wanted)


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


class CheckCuda(BuildExtension):
    """Compiles and links the CUDA kernels in ``build/``, as a check."""

    description = "compile and link the CUDA kernels in build/, as a check"

    def run(self) -> None:
        self.info = {}
        self.force = True
        library = ROOT / "build" / "check_cuda" / "_C_cuda.so"
        try:
            self.build_cuda(CUDA, library)
        except (RuntimeError, ValueError) as error:
            raise SystemExit(str(error)) from None
        made = self.info["cuda"]
        print(
            f"nvcc {made['nvcc']} compiled and linked {len(CUDA.sources)} sources: {', '.join(CUDA.sources)}"
        )
        print(f"for {', '.join(made['architectures'])}: {library.stat().st_size / 2**20:.1f} MiB")


EXTENSIONS = {"auto": [CPU, CUDA], "cpu": [CPU], "cuda": [CPU, CUDA], "none": []}


class StableWheel(bdist_wheel):
    """Names the wheel after the oldest Python whose limited API it uses."""

    def finalize_options(self) -> None:
        if self.distribution.has_ext_modules():
            self.py_limited_api = "cp310"
        super().finalize_options()


if BUILD not in EXTENSIONS:
    raise SystemExit(f"recsys-ops: expected RECSYS_OPS_BUILD to be auto, cpu, cuda or none, got {BUILD!r}")

setup(
    packages=find_packages(include=["recsys_ops", "recsys_ops.*"]),
    package_data={"recsys_ops": ["py.typed"]},
    include_package_data=True,
    ext_modules=EXTENSIONS[BUILD],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": StableWheel, "check_cuda": CheckCuda},
)
