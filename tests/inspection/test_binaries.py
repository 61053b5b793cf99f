"""What is read from binaries, of kernels that show one thing each."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys_ops.inspection import TARGETS, cuda_compiler
from recsys_ops.inspection.binaries import CompiledKernel, read_amdgcn
from recsys_ops.inspection.cuda_compiler import compile_source, kernel_name, template_parameters

needs_nvcc = pytest.mark.skipif(
    cuda_compiler.missing() is not None, reason=f"CUDA: {cuda_compiler.missing()}"
)
TOYS = Path(__file__).with_name("toy_kernels.cu")


@pytest.fixture(scope="module", params=TARGETS["cuda"])
def toys(request: pytest.FixtureRequest) -> dict[str, CompiledKernel]:
    if not cuda_compiler.supports(request.param):
        pytest.skip(f"nvcc does not know {request.param}")
    return compile_source("toy", TOYS, request.param)


@needs_nvcc
def test_kernels_are_named_after_their_template_arguments(toys: dict[str, CompiledKernel]) -> None:
    assert set(toys) == {
        "indexed fp32 x64",
        "crowded fp32 x64",
        "shared fp32 adds",
        "shared fp32",
        "matrix",
        "copy",
    }


@needs_nvcc
def test_local_memory_is_what_does_not_fit_registers(toys: dict[str, CompiledKernel]) -> None:
    spilled = {name: kernel.spilled_bytes for name, kernel in toys.items() if kernel.spilled_bytes}
    assert set(spilled) == {"indexed fp32 x64", "crowded fp32 x64"}
    assert spilled["indexed fp32 x64"] == 64 * 4
    assert spilled["crowded fp32 x64"] > 0
    assert toys["crowded fp32 x64"].registers <= 32
    assert toys["crowded fp32 x64"].occupancy == 1


@needs_nvcc
def test_shared_memory_is_what_the_source_says(toys: dict[str, CompiledKernel]) -> None:
    shared = {name: kernel.shared_bytes for name, kernel in toys.items() if kernel.shared_bytes}
    assert shared == {"shared fp32 adds": 128 * 16, "shared fp32": 128 * 16}


@needs_nvcc
def test_threads_are_those_of_the_launch_bounds(toys: dict[str, CompiledKernel]) -> None:
    threads = {name: kernel.threads for name, kernel in toys.items()}
    bounds = {
        "indexed fp32 x64": 64,
        "crowded fp32 x64": 1024,
        "shared fp32 adds": 128,
        "shared fp32": 128,
        "copy": 128,
    }
    assert threads == bounds | {"matrix": 1024}


@needs_nvcc
def test_instructions_are_counted_where_they_are(toys: dict[str, CompiledKernel]) -> None:
    def having(count: str) -> set[str]:
        return {name for name, kernel in toys.items() if getattr(kernel, count)}

    assert having("atomics") == {"shared fp32 adds"}
    assert having("tensor_core") == {"matrix"}
    assert having("async_copies") == {"shared fp32 adds", "shared fp32"}
    assert toys["shared fp32"].loads == {16: 1}
    assert toys["copy"].loads == toys["copy"].stores == {16: 4}
    assert toys["copy"].loads_in_flight == 4
    assert 16 not in toys["indexed fp32 x64"].loads
    assert toys["indexed fp32 x64"].loads_in_flight == 0
    assert all(kernel.code_bytes > 0 and kernel.code_bytes % 128 == 0 for kernel in toys.values())


@needs_nvcc
def test_what_was_read_survives_json(toys: dict[str, CompiledKernel]) -> None:
    for kernel in toys.values():
        content = kernel.to_dict()
        content["loads"] = {str(width): count for width, count in content["loads"].items()}
        assert CompiledKernel.from_dict(content) == kernel


@needs_nvcc
def test_a_source_that_does_not_compile_says_why(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void toy_wrong_kernel() { nonsense(); }\n")
    with pytest.raises(RuntimeError, match=r"wrong\.cu does not compile for sm_80:\n(.|\n)*nonsense"):
        compile_source("toy", source, "sm_80")


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        (
            "_ZN10recsys_ops3bag4cuda57_GLOBAL__N__53349dfb_14_bag_forward_cu_7848793818bag_forward_kernelI"
            "NS_8BFloat16ELi8EEEvNS0_5TableEPKT_bPS9_",
            "forward bf16 x8",
        ),
        ("_ZN12_GLOBAL__N_118bag_forward_kernelINS_4HalfELi8ELb1EEEvPKT_", "forward fp16 x8 where"),
        ("_ZN12_GLOBAL__N_118bag_forward_kernelIdLi2ELb0EEEvPKT_", "forward fp64 x2"),
        ("_ZN12_GLOBAL__N_120bag_attention_kernelIfLi64ELi32EEEvPKT_", "attention fp32 block_m64 block_n32"),
        ("_ZN12_GLOBAL__N_118bag_entries_kernelENS0_4BagsE", "entries"),
        ("_ZN3cub6SortIfE", "_ZN3cub6SortIfE"),
    ],
)
def test_names(mangled: str, name: str) -> None:
    source = """
template <class T, int N, bool WHERE>
__global__ void __launch_bounds__(threads_per_block, 4)
    bag_forward_kernel(Table table) {}
template <class T, int BLOCK_M, int BLOCK_N>
__global__ void bag_attention_kernel(Table table) {}
"""
    assert kernel_name("bag", mangled, template_parameters(source)) == name


def test_an_assembly_of_amd() -> None:
    assembly = """
        global_load_dwordx4 v[0:3], v4, s[0:1]
        global_load_ushort v5, v4, s[0:1]
        buffer_load_dword v6, s[0:3], 0 offen lds
        global_load_lds_dword v[0:1], off
        global_store_dwordx2 v4, v[0:1], s[0:1]
        global_store_short_d16_hi v4, v0, s[0:1]
        v_mfma_f32_32x32x8_f16 v[0:15], v[16:17], v[18:19], v[0:15]
        global_atomic_add_f32 v0, v1, s[0:1]
; codeLenInByte = 96
    .group_segment_fixed_size: 2048
    .max_flat_workgroup_size: 256
    .private_segment_fixed_size: 16
    .vgpr_count:     96
"""
    assert read_amdgcn("gfx942", assembly) == CompiledKernel(
        target="gfx942",
        threads=256,
        registers=96,
        spilled_bytes=16,
        shared_bytes=2048,
        loads={2: 1, 4: 2, 16: 1},
        stores={2: 1, 8: 1},
        loads_in_flight=None,
        tensor_core=1,
        async_copies=2,
        atomics=1,
        code_bytes=96,
    )
