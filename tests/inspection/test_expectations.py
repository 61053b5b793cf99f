"""Every kernel of both backends, compiled for GPUs that are not here, against what is recorded of it.

Those of embedding_bag in every run, those of other operators for one GPU at a time, in shares of days.

What must hold whatever is recorded is said here: nothing spills, nothing is atomic, and rows are
gathered by 16 bytes straight into registers.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from recsys_ops.backends import operators
from recsys_ops.embedding_bag import variants
from recsys_ops.inspection import TARGETS, cuda_compiler, expectations, triton_compiler
from recsys_ops.inspection.binaries import CompiledKernel
from recsys_ops.inspection.command import Inspection, inspect
from recsys_ops.inspection.expectations import Expectation, Key, Recorded

OP = "embedding_bag"
OTHERS = [
    (op, backend, target)
    for op in operators()
    for backend, targets in TARGETS.items()
    for target in targets
    if op != OP
]
VERSIONS = {"cuda": "13.0"}
KEY = Key("bag", "cuda", "forward fp32 x4", "sm_90")
KERNEL = CompiledKernel(
    target="sm_90",
    threads=128,
    registers=64,
    spilled_bytes=0,
    shared_bytes=1024,
    loads={4: 3, 16: 8},
    stores={16: 1},
    loads_in_flight=8,
    tensor_core=4,
    async_copies=2,
    atomics=0,
    code_bytes=4096,
)
LINE = Expectation.of(KERNEL)
# 16-byte loads in flight at least, of the Triton kernels that gather rows.
IN_FLIGHT = {
    "forward": 5,
    "max_forward": 5,
    "backward": 6,
    "backward_of_maximum": 8,
    "backward_of_pieces": 6,
    "backward_per_sample_weights": 8,
}
UNALIGNED = {variant.name for variant in variants.UNALIGNED}
SHORTEST = {variant.name for variant in variants.SHORTEST_ROWS}


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    """All kernels of one operator that can be compiled here."""
    found = inspect([OP])
    if not found.kernels:
        pytest.skip("; ".join(found.absent.values()))
    return found


def of_backend(inspection: Inspection, backend: str) -> dict[Key, CompiledKernel]:
    if backend in inspection.absent:
        pytest.skip(f"{backend}: {inspection.absent[backend]}")
    return {key: kernel for key, kernel in inspection.kernels.items() if key.backend == backend}


@pytest.mark.parametrize("backend", TARGETS)
def test_no_kernel_lost_what_is_recorded(inspection: Inspection, backend: str) -> None:
    check_nothing_lost(of_backend(inspection, backend), inspection.versions)


@pytest.mark.parametrize("backend", TARGETS)
def test_the_file_is_up_to_date(inspection: Inspection, backend: str) -> None:
    """Else a kernel that got better could become worse again unseen: run recsys-ops inspect --record."""
    check_up_to_date(of_backend(inspection, backend), inspection.versions)


def check_nothing_lost(kernels: dict[Key, CompiledKernel], versions: dict[str, str]) -> None:
    findings = expectations.compare(kernels, expectations.read(), versions)
    assert not [str(finding) for finding in findings if not finding.is_note]


def check_up_to_date(kernels: dict[Key, CompiledKernel], versions: dict[str, str]) -> None:
    recorded = expectations.read()
    for backend in {key.backend for key in kernels}:
        if recorded.versions[backend] != versions[backend]:
            pytest.skip(f"recorded with version {recorded.versions[backend]} of the compiler")
    compiled = {key._replace(kernel="") for key in kernels}
    lines = {key: line for key, line in recorded.lines.items() if key._replace(kernel="") in compiled}
    found = {key: Expectation.of(kernel) for key, kernel in kernels.items()}
    assert [key for key in {*lines, *found} if lines.get(key) != found.get(key)] == []


@pytest.mark.slow
@pytest.mark.parametrize("op, backend, target", OTHERS)
def test_other_operators_are_what_is_recorded(op: str, backend: str, target: str) -> None:
    found = inspect([op], [target], [backend])
    if not found.kernels:
        pytest.skip("; ".join(found.absent.values()))
    check_nothing_lost(found.kernels, found.versions)
    check_up_to_date(found.kernels, found.versions)
    assert [str(key) for key, kernel in found.kernels.items() if kernel.spilled_bytes or kernel.atomics] == []


def test_nothing_spills_and_nothing_is_atomic(inspection: Inspection) -> None:
    assert [str(key) for key, kernel in inspection.kernels.items() if kernel.spilled_bytes] == []
    assert [str(key) for key, kernel in inspection.kernels.items() if kernel.atomics] == []


def test_every_variant_of_a_triton_kernel_is_compiled(inspection: Inspection) -> None:
    compiled = [(key.target, key.kernel) for key in of_backend(inspection, "triton")]
    listed = [(target, v.name) for target in TARGETS["triton"] for v in variants.variants(target)]
    assert sorted(compiled) == sorted(listed)
    for kernel in variants.KERNELS:
        assert {target for target, name in compiled if name.split()[0] == kernel} == set(TARGETS["triton"])


def test_rows_do_not_pass_through_shared_memory(inspection: Inspection) -> None:
    """Only the weights' gradient has some: the sums of each warp's entries, 4 bytes of each lane."""
    every = {variant.name for variant in variants.EVERY_KERNEL if variant.kernel in variants.GATHERS}
    for key, kernel in of_backend(inspection, "triton").items():
        if key.kernel in every:
            most = 32 * 4 if key.kernel.startswith("backward_per_sample_weights ") else 0
            assert kernel.shared_bytes <= most, key


def test_rows_are_gathered_by_16_bytes_several_at_once(inspection: Inspection) -> None:
    gathering = 0
    for key, kernel in of_backend(inspection, "triton").items():
        name = key.kernel.split()[0]
        if name in IN_FLIGHT and key.kernel not in UNALIGNED | SHORTEST:
            gathering += 1
            assert kernel.loads[16] >= 8, key
            if kernel.loads_in_flight is not None:
                assert kernel.loads_in_flight >= IN_FLIGHT[name], key
    assert gathering >= 40


def test_unaligned_rows_are_gathered_by_element(inspection: Inspection) -> None:
    """Wider loads of them would fault."""
    kernels = of_backend(inspection, "triton")
    unaligned = [kernel for key, kernel in kernels.items() if key.kernel in UNALIGNED]
    assert len(unaligned) == len(UNALIGNED)
    assert not any(16 in kernel.loads for kernel in unaligned)


def test_cuda_kernels_gather_as_wide_as_their_name_says(inspection: Inspection) -> None:
    wide, narrow = ("fp32 x4", "fp16 x8", "bf16 x8", "fp64 x2"), ("fp32 x1", "fp16 x1", "bf16 x1", "fp64 x1")
    kernels = of_backend(inspection, "cuda")
    for name in ("forward", "max_forward", "backward_per_sample_weights"):
        for key, kernel in kernels.items():
            if key.kernel in {f"{name} {elements}" for elements in wide}:
                assert kernel.loads[16] >= 8, key
            if key.kernel in {f"{name} {elements}" for elements in narrow}:
                assert 16 not in kernel.loads, key


@pytest.mark.parametrize(
    ("change", "expected", "found"),
    [
        ({"spilled_bytes": 8}, "0 spilled bytes", "8 spilled bytes"),
        ({"loads": {4: 35}}, "loads of 16 bytes", "loads of 4 bytes"),
        ({"stores": {8: 2}}, "stores of 16 bytes", "stores of 8 bytes"),
        ({"stores": {}}, "stores of 16 bytes", "stores of 0 bytes"),
        ({"loads_in_flight": 7}, "8 loads in flight", "7 loads in flight"),
        (
            {"registers": 65},
            "occupancy 50 % with 64 registers and 1024 shared bytes",
            "occupancy 44 % with 65 registers and 1024 shared bytes",
        ),
        (
            {"shared_bytes": 40960},
            "occupancy 50 % with 64 registers and 1024 shared bytes",
            "occupancy 31 % with 64 registers and 40960 shared bytes",
        ),
        ({"tensor_core": 0}, "4 tensor-core instructions", "0 tensor-core instructions"),
        ({"async_copies": 0}, "2 asynchronous copies", "0 asynchronous copies"),
        ({"atomics": 1}, "0 atomics", "1 atomics"),
    ],
)
def test_a_kernel_that_got_worse_is_a_finding(change: dict[str, object], expected: str, found: str) -> None:
    (finding,) = expectations.compare(
        {KEY: replace(KERNEL, **change)},  # type: ignore[arg-type]
        Recorded(VERSIONS, {KEY: LINE}),
        VERSIONS,
    )
    assert str(finding) == f"bag cuda: forward fp32 x4 on sm_90: expected {expected}, found {found}"
    assert not finding.is_note


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"registers": 60},
        {"loads_in_flight": 16},
        {"code_bytes": 9000},
        {"tensor_core": 1},
        {"loads": {16: 1}},
        {"shared_bytes": 2048},
    ],
)
def test_a_kernel_that_did_not_is_none(change: dict[str, object]) -> None:
    kernel = replace(KERNEL, **change)  # type: ignore[arg-type]
    assert expectations.compare({KEY: kernel}, Recorded(VERSIONS, {KEY: LINE}), VERSIONS) == []


def test_with_another_compiler_what_it_schedules_is_a_note_and_the_rest_is_not() -> None:
    worse = replace(KERNEL, registers=128, spilled_bytes=4, loads={8: 16}, loads_in_flight=0)
    findings = expectations.compare({KEY: worse}, Recorded(VERSIONS, {KEY: LINE}), {"cuda": "13.1"})
    assert [(finding.expected.split()[0], finding.is_note) for finding in findings] == [
        ("0", False),
        ("loads", False),
        ("8", True),
        ("occupancy", True),
    ]


def test_kernels_that_appear_or_vanish_are_findings_where_something_was_compiled() -> None:
    vanished, elsewhere = KEY._replace(kernel="gone"), KEY._replace(target="sm_80")
    recorded = Recorded(VERSIONS, {vanished: LINE, elsewhere: LINE, KEY._replace(backend="triton"): LINE})
    found = expectations.compare({KEY: KERNEL}, recorded, VERSIONS)
    assert [(finding.key, finding.found.partition(":")[2]) for finding in found] == [
        (KEY, " recsys-ops inspect --record adds it"),
        (vanished, " it vanished"),
    ]


def test_recording_replaces_what_was_compiled_and_keeps_the_rest(tmp_path: Path) -> None:
    gone, other = KEY._replace(kernel="gone"), KEY._replace(target="gfx942", backend="triton")
    line = replace(LINE, loads_in_flight=None)
    before = Recorded({"triton": "3.7.1", "cuda": "12.8"}, {gone: LINE, other: line})
    after = expectations.updated(before, {KEY: KERNEL}, VERSIONS)
    assert after == Recorded({"triton": "3.7.1", "cuda": "13.0"}, {KEY: LINE, other: line})
    file = tmp_path / "expectations.csv"
    expectations.write(after, file)
    assert expectations.read(file) == after
    text = file.read_text()
    assert text.startswith("# recorded with nvcc 13.0, triton 3.7.1")
    assert len(text.splitlines()) == 4
    expectations.write(Recorded(after.versions, dict(reversed(after.lines.items()))), file)
    assert file.read_text() == text


def test_recording_does_not_mix_versions() -> None:
    before = Recorded({"cuda": "12.8"}, {KEY._replace(target="sm_80"): LINE})
    with pytest.raises(RuntimeError, match=r"recorded with nvcc 12\.8, this is 13\.0: record all"):
        expectations.updated(before, {KEY: KERNEL}, VERSIONS)


def test_a_source_with_narrowed_loads_is_found(tmp_path: Path) -> None:
    if reason := cuda_compiler.missing():
        pytest.skip(reason)
    shutil.copytree(cuda_compiler.CSRC, tmp_path / "csrc")
    pack = tmp_path / "csrc/common/cuda/pack.cuh"
    whole, narrowed = (f"N * sizeof(T) < {w} ? N * sizeof(T) : {w};" for w in ("widest_word", "4"))
    assert pack.read_text().count(whole) == 1
    pack.write_text(pack.read_text().replace(whole, narrowed))
    source = tmp_path / "csrc/embedding_bag/embedding_bag_forward.cu"
    kernels = {
        Key("embedding_bag", "cuda", name, "sm_90a"): kernel
        for name, kernel in cuda_compiler.compile_source("embedding_bag", source, "sm_90a").items()
    }
    findings = expectations.compare(kernels, expectations.read(), {"cuda": cuda_compiler.version()})
    said = [str(finding) for finding in findings if finding.expected == "loads of 16 bytes"]
    assert (
        "embedding_bag cuda: forward fp32 x4 on sm_90a: expected loads of 16 bytes, found loads of 8 bytes"
        in said
    )
    assert len(said) >= 12


def test_triton_kernels_that_are_interpreted_are_not_compiled() -> None:
    if reason := triton_compiler.missing():
        pytest.skip(reason)
    source = triton_compiler.TritonSource("some", lambda x: x, {}, {})
    with pytest.raises(RuntimeError, match="expected a kernel defined without TRITON_INTERPRET"):
        triton_compiler.compile_kernel(source, "sm_80")
    with pytest.raises(ValueError, match="expected target to be one of"):
        triton_compiler.compile_kernel(source, "sm_70")
