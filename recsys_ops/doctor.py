"""What this machine and this installation can do, and what to mend.

Standard library only, and nothing of the package at import: it must speak where
PyTorch is missing or the package is broken. Then run it as a file:
``python recsys_ops/doctor.py``. Whatever could crash is imported in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
REQUIRED = ("numpy", "rich", "typer", "matplotlib", "jinja2")
PACKAGES = ("torch", *REQUIRED, "triton", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu")
SIMD_FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx2", "fma", "f16c", "neon")
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 10)
PROBE = "--probe"
PROBE_SECONDS = 300

EXAMPLE = """\
examples:
  recsys-ops doctor
  recsys-ops doctor --json report.json
  python recsys_ops/doctor.py            where the package itself cannot be imported
"""


def main(arguments: list[str] | None = None) -> int:
    """Print the report; returns 0 where all is well and 1 where something is to be mended."""
    parser = argparse.ArgumentParser(
        prog="recsys-ops doctor",
        description="Say what this machine and this installation can do, and what to mend.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="PATH", help="also write the report as JSON; '-' prints only that")
    parser.add_argument(PROBE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.probe:
        run_probes()
        return 0
    report = examine()
    if options.json != "-":
        print(render(report))
    if options.json:
        text = json.dumps(report, indent=2)
        if options.json == "-":
            print(text)
        else:
            try:
                Path(options.json).write_text(text + "\n")
            except OSError as error:
                parser.error(f"--json: expected a path that can be written, got {options.json!r}: {error}")
    return 1 if report["findings"] else 0


def examine() -> dict[str, Any]:
    """The whole report, as JSON would hold it."""
    probed = _probe_in_a_process()
    died = {"error": probed.get("error")}
    report = {
        "system": _each(
            os=lambda: f"{platform.system()} {platform.release()} {platform.machine()}",
            python=lambda: f"{platform.python_version()} ({sys.executable})",
            cpu=cpu_model,
            cores=cores,
            simd=_simd_features,
            caches=caches,
            memory=memory,
        ),
        "tools": _each(
            compiler=lambda: _version_line(_compiler()),
            nvcc=lambda: _version_line("nvcc"),
            gpus=_gpus,
        ),
        "packages": {name: _guarded(functools.partial(_installed, name)) for name in PACKAGES},
        "torch": probed.get("torch", died),
        "recsys_ops": {
            "version": _guarded(_version),
            "folder": str(FOLDER),
            "build": _guarded(_build_info),
            **probed.get("recsys_ops", died),
        },
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("RECSYS_OPS_")},
    }
    report["findings"] = [
        {"problem": problem, "remedy": remedy}
        for problem, remedy in _findings(report, probed.get("environment", {}))
    ]
    return report


def render(report: dict[str, Any]) -> str:
    """The report as plain text."""
    lines = []
    for section, entries in report.items():
        if section != "findings":
            lines.append(section)
            lines += _rows(entries) or ["  none"]
            lines.append("")
    for number, finding in enumerate(report["findings"], 1):
        lines += [f"finding {number}: {finding['problem']}", f"  mend it with: {finding['remedy']}"]
    return "\n".join(lines) if report["findings"] else "\n".join([*lines, "nothing to mend"])


def _rows(entries: dict[str, Any], indent: str = "  ") -> list[str]:
    rows = []
    width = max((len(name) for name in entries), default=0)
    for name, value in entries.items():
        if isinstance(value, dict) and value:
            rows += [f"{indent}{name}", *_rows(value, indent + "  ")]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, dict)) else str(value)
            absent = value is None or value == [] or value == {}
            rows.append(f"{indent}{name:<{width}}  {'none' if absent else text}")
    return rows


def _findings(report: dict[str, Any], environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What is wrong, and the one line that mends it."""
    packages, tools, torch, package = (
        report[section] for section in ("packages", "tools", "torch", "recsys_ops")
    )
    if sys.version_info < OLDEST_PYTHON:
        oldest = _dotted(OLDEST_PYTHON)
        yield f"Python {platform.python_version()} is older than {oldest}", f"python{oldest} -m venv .venv"
    if "version" not in torch:
        if packages["torch"] is None:
            yield "PyTorch is not installed", "pip install torch"
        else:
            yield f"PyTorch does not import: {torch['error']}", "pip install --force-reinstall torch"
    elif _release(torch["version"]) < OLDEST_TORCH:
        oldest = _dotted(OLDEST_TORCH)
        yield f"PyTorch {torch['version']} is older than {oldest}", "pip install --upgrade torch"
    absent = [name for name in REQUIRED if packages[name] is None]
    if absent:
        yield f"not installed: {', '.join(absent)}", f"pip install {' '.join(absent)}"
    if "version" not in torch:
        return
    if isinstance(tools["gpus"], list) and tools["gpus"] and not torch["gpus"]:
        cause = "does not reach its driver" if torch["cuda"] else "is built without CUDA"
        yield f"there is a GPU, but PyTorch {cause}", "pip install --force-reinstall torch"
    if torch["gpus"] and packages["triton"] is None:
        yield "there is a GPU, but triton is not installed", "pip install triton"
    if packages["torchrec"] and not (packages["fbgemm-gpu-cpu"] or packages["fbgemm-gpu"]):
        fbgemm = "fbgemm-gpu" if torch["cuda"] else "fbgemm-gpu-cpu"
        yield "torchrec is installed, but not FBGEMM", f"pip install {fbgemm}=={packages['torchrec']}"
    if "extension" not in package:
        yield f"recsys_ops does not import: {package['error']}", _rebuild()
    elif package["extension"] != "loads":
        problem = package["extension"]
        if not any(FOLDER.glob("_C.*")):
            problem = "the compiled extension is not in this installation, so operators run on `reference`"
        failure = (package["build"] or {}).get("reason")
        remedy = _rebuild() if tools["compiler"] else f"install a C++17 compiler, then {_rebuild()}"
        yield f"{problem} (its build failed: {failure})" if failure else problem, remedy
    elif torch["gpus"] and torch["cuda"] and tools["nvcc"] and package["cuda_kernels"] != "load":
        yield f"there is a GPU, but {package['cuda_kernels']}", f"RECSYS_OPS_BUILD=cuda {_rebuild()}"
    if "extension" in package:
        for variable, problem in environment.items():
            yield problem, f"unset {variable}"


def _rebuild() -> str:
    """The line that builds the extension for this copy of the package."""
    if (FOLDER.parent / "setup.py").is_file():
        return f"pip install --no-build-isolation -e {FOLDER.parent}"
    return "pip install --force-reinstall --no-deps --no-build-isolation recsys-ops"


def run_probes() -> None:
    """Import PyTorch, then the package; print a line for each, so that a crash loses only what follows."""
    for name, probe in PROBES.items():
        print(json.dumps({name: _guarded(probe)}), flush=True)


def _probe_torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _probe_package() -> dict[str, Any]:
    import torch

    from recsys_ops import _extension, backends

    said: dict[str, Any] = {"extension": _extension.missing() or "loads"}
    if said["extension"] == "loads":
        compiled = _extension.module()
        said["simd_levels"] = compiled.simd_levels()
        said["simd_level"] = _guarded(compiled.simd_level)
    said["cuda_kernels"] = _extension.cuda_missing() or "load"
    said["serves"] = {
        f"{operator} on {device}": {backend: reason or "can serve" for backend, reason in reasons.items()}
        for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
        for operator, reasons in backends.survey(backends.Call(device, torch.float32)).items()
    }
    return said


def _probe_environment() -> dict[str, str]:
    """What is wrong with a variable that steers the package."""
    from recsys_ops import _extension, backends

    problems = {}
    if level := os.environ.get("RECSYS_OPS_SIMD"):
        try:
            best = _extension.module().simd_levels()[0]
            if _extension.module().simd_level() != best:
                problems["RECSYS_OPS_SIMD"] = f"RECSYS_OPS_SIMD={level} is slower than this machine's {best}"
        except (ImportError, RuntimeError) as error:
            problems["RECSYS_OPS_SIMD"] = str(error)
    variable = backends.ENVIRONMENT_VARIABLE
    if backend := os.environ.get(variable):
        reason = backends.BACKENDS[backend]() if backend in backends.BACKENDS else "no such backend"
        if reason:
            problems[variable] = f"{variable}={backend}: {reason}"
    return problems


PROBES = {"torch": _probe_torch, "recsys_ops": _probe_package, "environment": _probe_environment}


def _probe_in_a_process() -> dict[str, Any]:
    """What ``run_probes`` says in a process of its own; under "error" how that ended, if early."""
    command = [sys.executable, str(Path(__file__).resolve()), PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    said: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith(tuple(f'{{"{name}": ' for name in PROBES)):
            said.update(json.loads(line))
    if len(said) < len(PROBES):
        last_words = (done.stderr.strip().splitlines() or [""])[-1]
        ended = f"by signal {-done.returncode}" if done.returncode < 0 else f"with status {done.returncode}"
        said["error"] = f"the process that imports it ended {ended} {last_words}".strip()
    return said


def _each(**probes: Callable[[], Any]) -> dict[str, Any]:
    return {name: _guarded(probe) for name, probe in probes.items()}


def _guarded(probe: Callable[[], Any]) -> Any:
    """What a probe says; a probe that fails says so, and takes nothing else with it."""
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _version() -> str:
    found = re.search(r'"(.+)"', (FOLDER / "_version.py").read_text())
    return found[1] if found else "unknown"


def _build_info() -> dict[str, Any] | None:
    path = FOLDER / "_build_info.py"
    if not path.is_file():
        return None
    names: dict[str, Any] = {}
    exec(path.read_text(), names)
    return names["BUILD_INFO"]


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str:
    """The C++ compiler that a build would use."""
    return (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]


def _version_line(program: str) -> str | None:
    """The line of ``program --version`` that tells the version."""
    if shutil.which(program) is None:
        return None
    lines = _output(program, "--version").splitlines()
    return next((line for line in lines if re.search(r"\d+\.\d+", line)), None)


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = "--query-gpu=name,memory.total,driver_version,compute_cap"
    return _output("nvidia-smi", query, "--format=csv,noheader").splitlines()


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


def cpu_model() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cores() -> str:
    total = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return f"{total}" if usable == total else f"{total}, {usable} of them for this process"


def _simd_features() -> list[str]:
    if platform.machine().lower() in ("aarch64", "arm64"):
        return ["neon"]
    if sys.platform == "darwin":
        flags = _output("sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features").lower().split()
    else:
        flags = _cpuinfo("flags").split()
    return [feature for feature in SIMD_FEATURES if feature in flags]


def _cpuinfo(field: str) -> str:
    """A field of the first core in Linux's /proc/cpuinfo; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*: (.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else ""


def caches() -> list[str]:
    if sys.platform == "darwin":
        names = {"L1d": "hw.l1dcachesize", "L2": "hw.l2cachesize"}
        return [f"{name} {int(_output('sysctl', '-n', key)) // 1024}K" for name, key in names.items()]
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        found.append(f"L{level}{'' if kind == 'Unified' else kind[0].lower()} {size}")
    return found


def memory() -> str:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else None
    return f"{total / 2**30:.1f} GiB" + (f", {free / 2**30:.1f} GiB of it free" if free else "")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def _import_from_beside_the_package() -> None:
    """Run as a file, Python would search recsys_ops/ itself, whose html.py hides the standard library's."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != FOLDER]
    if str(FOLDER.parent) not in sys.path:
        sys.path.insert(0, str(FOLDER.parent))


if __name__ == "__main__":
    _import_from_beside_the_package()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
