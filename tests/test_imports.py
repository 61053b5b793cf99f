"""What ``import recsys_ops`` needs, and what it leaves alone: each in a fresh interpreter."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("autotune", "benchmarks", "triton_kernels")
OPTIONAL = ("triton", "torchrec", "fbgemm_gpu", "matplotlib", "rich", "typer", "jinja2")


def _run(code: str, refused: tuple[str, ...] = (), folder: Path | None = None) -> list[str]:
    """The lines that code prints in a fresh interpreter, where importing ``refused`` fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RECSYS_OPS_", "TRITON_"))}
    refuse = f"import sys; sys.modules.update(dict.fromkeys({refused}))\n"
    done = subprocess.run(
        [sys.executable, "-c", refuse + code],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_import_leaves_optional_packages_alone() -> None:
    code = "import torch; before = set(sys.modules); import recsys_ops; print(*set(sys.modules) - before)"
    (loaded,) = _run(code)
    assert "recsys_ops.backends" in loaded.split()
    assert not {name.partition(".")[0] for name in loaded.split()} & set(OPTIONAL)


def test_without_optional_packages_and_extension_the_reference_serves() -> None:
    code = """
import torch, recsys_ops
weight = torch.ones(3, 2, requires_grad=True)
output = recsys_ops.embedding_bag(torch.tensor([[0, 2]]), weight, mode="sum")
output.sum().backward()
print(output.tolist(), weight.grad.tolist())
explanation = recsys_ops.explain("embedding_bag", torch.tensor([[0, 2]]), weight)
print(explanation.chosen)
print(explanation.rejected["native"])
try:
    recsys_ops.embedding_bag(torch.tensor([[0]]), weight, backend="native")
except RuntimeError as error:
    print(error)
"""
    values, chosen, reason, error = _run(code, (*OPTIONAL, "recsys_ops._C"))
    assert values == "[[2.0, 2.0]] [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]"
    assert chosen == "reference"
    assert "extension" in reason
    assert "pip install" in reason
    assert error.startswith("embedding_bag: backend 'native'")
    assert error.endswith(reason)


def test_without_torch_the_error_says_what_to_install() -> None:
    code = """
import recsys_ops
print(recsys_ops.__version__)
for name in recsys_ops.__all__:
    if name != "__version__":
        try:
            getattr(recsys_ops, name)
        except ImportError as error:
            print(error)
try:
    recsys_ops.no_such_name
except AttributeError as error:
    print(error)
"""
    version, *errors, unknown = _run(code, ("torch",))
    assert version[0].isdigit()
    assert len(errors) >= 5
    for error in errors:
        assert error.endswith("pip install torch")
        assert error.startswith("recsys_ops.")
    assert "no_such_name" in unknown


def test_the_command_line_and_the_doctor_import_without_anything() -> None:
    assert _run("import recsys_ops.cli, recsys_ops.doctor; print('ok')", ("torch", *OPTIONAL)) == ["ok"]


def test_only_its_own_package_imports_torchrec_at_once() -> None:
    package = ROOT / "recsys_ops"
    at_once = re.compile(r"^(?:from|import) (?:torchrec|fbgemm_gpu|recsys_ops\.torchrec)\b", re.MULTILINE)
    found = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        if at_once.search(path.read_text())
    }
    assert found == {"torchrec"}


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_folder_refuses_its_bare_name(name: str) -> None:
    code = f"""
try:
    import {name}
except ImportError as error:
    print(error)
"""
    (error,) = _run(code, folder=ROOT)
    assert error.startswith(f"import recsys_ops.{name}: ")


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_folder_belongs_to_the_package(name: str) -> None:
    link = ROOT / "recsys_ops" / name
    assert Path(os.readlink(link)) == Path("..") / name
    assert importlib.import_module(f"recsys_ops.{name}").__name__ == f"recsys_ops.{name}"
