"""``recsys-ops inspect`` as a person uses it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from command_line import Run

from recsys_ops import _nvcc
from recsys_ops.inspection import TARGETS, command, cuda_compiler, expectations, triton_compiler
from recsys_ops.inspection.binaries import CompiledKernel
from recsys_ops.inspection.expectations import Key


@pytest.fixture
def run(run: Run) -> Run:
    """Runs ``recsys-ops inspect`` with arguments, in this process."""
    return functools.partial(run, "inspect")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of expectations, a new one."""
    file = tmp_path / "expectations.csv"
    monkeypatch.setattr(expectations, "FILE", file)
    monkeypatch.setattr(expectations.read, "__defaults__", (file,))
    monkeypatch.setattr(expectations.write, "__defaults__", (file,))
    return file


@pytest.fixture
def registers(monkeypatch: pytest.MonkeyPatch, recorded: Path) -> dict[str, int]:
    """Instead of compilers: each backend has a kernel of one operator, with these registers."""
    taken = {"triton": 64, "cuda": 64}

    def compiled(backend: str, target: str) -> dict[str, CompiledKernel]:
        kernel = CompiledKernel(target, 128, taken[backend], 0, 0, {16: 8}, {16: 1}, 8, 0, 0, 0, 640)
        return {"backward_per_sample_weights fp32 d1000 i64": kernel}

    monkeypatch.setattr(command, "operators", lambda: ["embedding_bag"])
    monkeypatch.setattr(triton_compiler, "missing", lambda: None)
    monkeypatch.setattr(triton_compiler, "version", lambda: "3.7.1")
    monkeypatch.setattr(triton_compiler, "compile_operator", lambda op, target: compiled("triton", target))
    monkeypatch.setattr(cuda_compiler, "missing", lambda: None)
    monkeypatch.setattr(cuda_compiler, "version", lambda: "13.0")
    monkeypatch.setattr(cuda_compiler, "supports", lambda target: True)
    monkeypatch.setattr(cuda_compiler, "sources", lambda op: [Path("one.cu")])
    monkeypatch.setattr(cuda_compiler, "compile_source", lambda op, source, target: compiled("cuda", target))
    return taken


def test_one_gpu_compiled_for_real(run: Run) -> None:
    if reason := triton_compiler.missing():
        pytest.skip(reason)
    ended = run("--backend", "triton", "--arch", "sm_80", "--op", "embedding_bag", "--json", "-")
    assert ended.code == 0, ended.err
    content = json.loads(ended.out)
    kernels = {kernel["kernel"]: kernel for kernel in content["kernels"]}
    assert len(kernels) == 7
    assert kernels["forward fp32 d128"]["loads"]["16"] >= 8
    assert 0 < kernels["forward fp32 d128"]["occupancy"] <= 1
    assert set(content["limits"]) == {"sm_80"}
    assert "7 kernels compiled, no findings" in ended.err


def test_record_then_compare(run: Run, registers: dict[str, int], recorded: Path, tmp_path: Path) -> None:
    assert run().code == 1  # nothing is recorded yet
    ended = run("--record")
    assert ended.code == 0, ended.out
    assert f"wrote {recorded}" in ended.out
    assert len(expectations.read().lines) == 7
    ended = run()
    assert ended.code == 0
    assert "7 kernels compiled, no findings" in ended.out

    registers["cuda"] = 72
    path = tmp_path / "inspect.json"
    ended = run("--json", path)
    assert ended.code == 1
    (line,) = (line for line in ended.out.splitlines() if line.startswith("finding: ") and "sm_90a" in line)
    assert "expected occupancy 50 % with 64 registers" in line
    assert "found occupancy 44 % with 72 registers" in line
    assert len(json.loads(path.read_text())["findings"]) == 3

    registers["triton"] = 80
    assert run("--record", "--arch", "sm_80").code == 0
    lines = expectations.read().lines
    name = "backward_per_sample_weights fp32 d1000 i64"
    assert lines[Key("embedding_bag", "triton", name, "sm_80")].registers == 80
    assert lines[Key("embedding_bag", "triton", name, "sm_90")].registers == 64


def test_another_compiler_is_noted(
    run: Run, registers: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--record").code == 0
    registers["cuda"] = 72
    monkeypatch.setattr(cuda_compiler, "version", lambda: "13.1")
    ended = run()
    assert ended.code == 0
    assert "note: this is nvcc 13.1, recorded is 13.0" in ended.out
    assert ended.out.count("note: embedding_bag cuda: ") == 3
    refused = run("--record", "--arch", "sm_80")
    assert refused.code == 1
    assert "record all of them" in refused.err


def test_the_table_fits_110_columns(run: Run, registers: dict[str, int]) -> None:
    lines = run().out.splitlines()
    rows = [line for line in lines if line.strip().startswith("backward_per_sample_weights")]
    assert len(rows) == sum(map(len, TARGETS.values()))
    assert max(map(len, rows)) <= 110
    words = "backward_per_sample_weights fp32 d1000 i64 sm_100 64 0 0 50 16 16 8 640"
    assert " ".join(rows[0].split()) == words
    assert any("Limits of a multiprocessor" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "sm_42"], "expected one of sm_80, sm_90, sm_100, gfx942, sm_90a, got 'sm_42'"),
        (["--backend", "native"], "expected one of triton, cuda, got 'native'"),
        (["--backend", "cuda", "--arch", "gfx942"], "expected --arch to be one of sm_80, sm_90a, sm_100"),
        (["--op", "softmax"], "got 'softmax'"),
        (["--json", "no/such/folder/x.json"], "folder that exists"),
    ],
)
def test_wrong_usage(run: Run, arguments: list[str], said: str) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in " ".join(ended.err.replace("│", " ").split())


def test_nvcc_that_is_missing_is_said_and_skipped(
    run: Run, registers: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(_nvcc, "find_nvcc", lambda: None)
    ended = run("--backend", "cuda")
    assert ended.code == 1
    assert "cuda: not inspected: nvcc was not found: install the CUDA toolkit" in ended.out
    assert command.inspect(backends=["cuda"]).kernels == {}


def test_one_compiler_suffices(run: Run, registers: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--record").code == 0
    monkeypatch.setattr(cuda_compiler, "missing", lambda: "nvcc was not found")
    ended = run()
    assert ended.code == 0
    assert "cuda: not inspected: nvcc was not found" in ended.out
    assert "4 kernels compiled, no findings" in ended.out
    monkeypatch.setattr(triton_compiler, "missing", lambda: "triton is not installed")
    assert run().code == 1  # there is no evidence at all


def test_without_a_checkout_there_are_no_cuda_sources(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda_compiler, "CSRC", tmp_path)
    ended = run("--backend", "cuda")
    assert ended.code == 1
    assert "the CUDA sources are not in this installation" in ended.out


def test_a_kernel_that_does_not_compile_is_one_line(
    run: Run, registers: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(op: str, target: str) -> dict[str, CompiledKernel]:
        raise RuntimeError(f"the Triton kernels of {op} for {target} do not compile")

    monkeypatch.setattr(triton_compiler, "compile_operator", fails)
    ended = run("--backend", "triton", "--arch", "sm_80")
    assert ended.code == 1
    assert ended.err.endswith("recsys-ops: the Triton kernels of embedding_bag for sm_80 do not compile\n")
