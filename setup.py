"""Builds ``recsys_ops._C``: CPU kernels for every SIMD level, on LibTorch's stable ABI.

``RECSYS_OPS_BUILD`` decides: ``auto`` (the default) builds what it can and says what it
could not, ``cpu`` fails where the CPU kernels cannot be built, ``none`` builds a package
that has only the backends written in Python.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
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
SIMD_SOURCES = ["csrc/embedding_bag/bag_pooling.cpp", "csrc/embedding_bag/gradient_pooling.cpp"]
SOURCES = sorted(
    source
    for path in ROOT.glob("csrc/**/*.cpp")
    if (source := path.relative_to(ROOT).as_posix()) not in SIMD_SOURCES
)
HEADERS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.h"))
FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fno-math-errno", "-fno-wrapv"]

# GCC 12 takes its own intrinsics' undefined operands for ours.
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]


class BuildExtension(build_ext):
    """Compiles the SIMD sources for each level, and records what the build contains."""

    def run(self) -> None:
        self.info: dict[str, object] = {"requested": BUILD, "cuda": False, "simd_levels": [], "reason": None}
        super().run()
        package = ROOT / "recsys_ops" if self.inplace else Path(self.build_lib) / "recsys_ops"
        package.mkdir(parents=True, exist_ok=True)
        written = f'"""Written by setup.py."""\n\nBUILD_INFO = {self.info!r}\n'
        (package / "_build_info.py").write_text(written)

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            if BUILD == "cpu":
                raise
            self.info["reason"] = str(error)
            print(f"recsys-ops: built without compiled kernels: {error}", file=sys.stderr)
            self.extensions = []
        else:
            self.info["simd_levels"] = list(SIMD_LEVELS)
            self.info["compiler"] = " ".join(self.compiler.compiler_cxx)

    def build_extension(self, extension: Extension) -> None:
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


class StableWheel(bdist_wheel):
    """Names the wheel after the oldest Python whose limited API it uses."""

    def finalize_options(self) -> None:
        if self.distribution.has_ext_modules():
            self.py_limited_api = "cp310"
        super().finalize_options()


if BUILD not in ("auto", "cpu", "none"):
    if BUILD == "cuda":
        raise SystemExit("recsys-ops: RECSYS_OPS_BUILD=cuda: this version has no CUDA kernels to build")
    raise SystemExit(f"recsys-ops: expected RECSYS_OPS_BUILD to be auto, cpu, cuda or none, got {BUILD!r}")

setup(
    packages=find_packages(include=["recsys_ops", "recsys_ops.*"]),
    package_data={"recsys_ops": ["py.typed"]},
    include_package_data=True,
    ext_modules=[]
    if BUILD == "none"
    else [Extension("recsys_ops._C", sources=SOURCES, depends=HEADERS, language="c++", py_limited_api=True)],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": StableWheel},
)
