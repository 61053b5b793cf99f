"""CUDA kernels on the CPU: what is right runs, and what is planted to be wrong is found."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_host.build import COMPILER, HERE, ROOT, build, environment

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")

CALL = """
import ctypes, sys
library, name, fault = sys.argv[1:]
function = getattr(ctypes.CDLL(library), name)
function.restype = ctypes.c_char_p
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
sizes = {"block_sum": (192, 3), "neighbour": (64, 64), "warp_sum": (32, 32), "blocks": (1, 8)}
inputs, outputs = sizes.get(name, (1, 1))
source = (ctypes.c_float * inputs).from_address(libc.malloc(4 * inputs))
target = (ctypes.c_float * outputs).from_address(libc.malloc(4 * outputs))
source[:] = range(inputs)
target[:] = [0] * outputs
said = function(source, target, int(fault)).decode()
print(said or list(target))
"""

RIGHT = {
    "block_sum": [sum(range(64 * b, 64 * b + 64)) for b in range(3)],
    "neighbour": [(i + 1) % 64 for i in range(64)],
    "warp_sum": [sum(range(16, 32))] * 16 + [sum(range(16))] * 16,
    "blocks": list(range(8)),
}

# Kernel, number of the fault in faults.cu, who finds it, and what it says.
FAULTS = [
    ("block_sum", 1, "races", "race: (reads|writes) a byte of shared memory"),
    ("block_sum", 2, "address", "divergent barrier: thread .* is at __syncthreads .*, thread "),
    ("block_sum", 3, "address", "insufficient space for an object|AddressSanitizer: global-buffer-overflow"),
    ("block_sum", 4, "races", "read of shared memory that nobody wrote"),
    ("block_sum", 5, "address", "divergent barrier: .* thread 63 has ended"),
    ("neighbour", 1, "races", "read of shared memory that nobody wrote"),
    ("neighbour", 2, "address", "AddressSanitizer: heap-buffer-overflow|past the end"),
    ("neighbour", 3, "races", "race: reads a byte of shared memory|read of shared memory that nobody wrote"),
    ("warp_sum", 1, "address", "divergent warp operation: thread .* is at __shfl_xor_sync of lanes ffffffff"),
    ("warp_sum", 2, "address", "__shfl_sync from lane 20, which takes no part"),
    ("warp_sum", 3, "address", "divergent warp operation"),
    ("warp_sum", 4, "address", "lane outside of its own mask: thread"),
    ("warp_sum", 5, "races", "race: (reads|writes) a byte of shared memory|that nobody wrote"),
    ("blocks", 1, "races", "race: (reads|writes) a byte of global memory that was (read|written)"),
    ("blocks", 2, "address", "AddressSanitizer: heap-buffer-overflow"),
    ("blocks", 3, "address", "misaligned address"),
]


@pytest.fixture(scope="module")
def libraries() -> dict[str, Path]:
    sources = [HERE / "faults.cu", ROOT / "csrc" / "common" / "cuda" / "tensor_tiles.cu"]
    return {name: build(sources, name, with_torch=False) for name in ("address", "races")}


def call(library: Path, sanitizer: str, kernel: str, fault: int, seed: int = 1) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CALL, str(library), kernel, str(fault)],
        env=environment(sanitizer) | {"CUDA_HOST_SEED": str(seed)},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", ["address", "races"])
@pytest.mark.parametrize("kernel", RIGHT)
def test_what_is_right_runs(libraries: dict[str, Path], sanitizer: str, kernel: str) -> None:
    expected = str([float(x) for x in RIGHT[kernel]])
    assert [call(libraries[sanitizer], sanitizer, kernel, 0, s).strip() for s in (1, 2, 3)] == [expected] * 3


@pytest.mark.parametrize(("kernel", "fault", "sanitizer", "message"), FAULTS)
def test_fault_is_found(
    libraries: dict[str, Path], kernel: str, fault: int, sanitizer: str, message: str
) -> None:
    for seed in (1, 2, 3):
        said = call(libraries[sanitizer], sanitizer, kernel, fault, seed)
        assert re.search(message, said), said[-2000:]


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_product_of_matrices(libraries: dict[str, Path], dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 16, generator=generator).to(getattr(torch, dtype)) for n in (16, 8))
    c = torch.full((16, 8), torch.nan)
    product = getattr(ctypes.CDLL(str(libraries["races"])), f"{dtype}_product")
    product.restype = ctypes.c_char_p
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)]
    assert product(*pointers, 0) == b""
    torch.testing.assert_close(c, a.float() @ b.float().T)
    assert b"mma.sync by a warp that is not whole" in product(*pointers, 1)


# Number of the fault in faults.cu, and what is said: where it is one of several things, the order of the
# threads decides.
TILES = [
    (1, "nobody wrote|race: "),
    (2, "tiles were fetched that nobody waited for"),
    (3, "a product without wgmma.fence"),
    (5, "products that not all of a warpgroup take part in"),
    (6, "wrote with no fence.proxy.async after it"),
    (7, "more threads arrive|a wait without end: thread .* is at mbarrier.try_wait"),
    (8, "a barrier in shared memory that nobody began"),
    (9, "a wait without end: thread .* is at mbarrier.try_wait|nobody wrote|race: "),
]


def multiply_tiles(library: Path, dtype: str, fault: int) -> tuple[str, torch.Tensor, torch.Tensor, bool]:
    """What is said, what comes out of the products of warpgroups, and whether both are right."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 64, generator=generator).to(getattr(torch, dtype)) for n in (64, 32))
    products, sums = torch.full((64, 32), torch.nan), torch.full((64, 64), torch.nan)
    multiply = getattr(ctypes.CDLL(str(library)), f"{dtype}_tiles")
    multiply.restype = ctypes.c_char_p
    said = multiply(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, products, sums)), fault).decode()
    a, b = a.float(), b.float()
    a[:, 50:], b[20:] = 0, 0
    expected = a @ b.T
    rounded = expected.to(getattr(torch, dtype)).float()
    right = torch.allclose(products, expected, atol=1e-4) and torch.allclose(sums, rounded @ b, atol=1e-1)
    return said, products, sums, right


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_products_of_warpgroups(libraries: dict[str, Path], dtype: str) -> None:
    said, products, sums, right = multiply_tiles(libraries["races"], dtype, 0)
    assert said == ""
    assert right, (products, sums)


@pytest.mark.parametrize(("fault", "message"), TILES)
def test_fault_of_tiles_is_found(libraries: dict[str, Path], fault: int, message: str) -> None:
    assert re.search(message, multiply_tiles(libraries["races"], "half", fault)[0])


def test_products_that_are_not_waited_for_are_not_there(libraries: dict[str, Path]) -> None:
    *_, right = multiply_tiles(libraries["races"], "half", 4)
    assert not right


def test_order_of_blocks_is_random(libraries: dict[str, Path]) -> None:
    sums = {call(libraries["address"], "address", "order", 0, seed) for seed in range(8)}
    assert len(sums) > 1
