"""The Triton kernels of the embedding bag as its host functions launch them, for ``recsys-ops inspect``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from recsys_ops.inspection.occupancy import LIMITS
from recsys_ops.inspection.triton_compiler import TritonSource

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}

GATHERS = (
    *("forward", "max_forward", "backward", "backward_of_maximum", "backward_of_pieces"),
    "backward_per_sample_weights",
)
KERNELS = (*GATHERS, "entries")

ABSENT = {
    "backward": ("argmax_ptr",),
    "backward_of_maximum": ("factors_ptr",),
    "backward_of_pieces": ("order_ptr", "bags_ptr", "factors_ptr", "argmax_ptr", "offsets_ptr"),
}


class Variant(NamedTuple):
    """One kernel for one kind of table."""

    kernel: str
    dtype: str = "fp32"
    dim: int = 128
    sizes: str = "i32"
    column_stride: int = 1

    @property
    def name(self) -> str:
        words = [self.kernel, self.dtype, f"d{self.dim}"]
        words += ["i64"] if self.sizes == "i64" else []
        words += [f"stride{self.column_stride}"] if self.column_stride != 1 else []
        return " ".join(words)


EVERY_KERNEL = [Variant(kernel) for kernel in KERNELS]
HALF = [Variant(kernel, "fp16", 256) for kernel in GATHERS]
SHORT_ROWS = [Variant(kernel, "fp32", 16) for kernel in ("forward", "backward")]
SHORTEST_ROWS = [Variant(kernel, "fp16", 8) for kernel in GATHERS]
DOUBLE = [Variant("forward", "fp64", 64)]
SEVERAL_BLOCKS = [Variant(kernel, "fp32", 384) for kernel in GATHERS]
LONGEST_ROWS = [Variant("backward_per_sample_weights", "fp64", 1000)]
PAST_2_TO_THE_31 = [Variant(kernel, sizes="i64") for kernel in KERNELS]
NOT_A_POWER_OF_TWO = [Variant("forward", "fp32", 100)]
UNALIGNED = [Variant("forward", "fp32", 101), Variant("forward", column_stride=1000)]

# All kernels for every GPU, all kinds of tables for one of each vendor.
_MORE = {
    "sm_90": [
        *(HALF + SHORT_ROWS + SHORTEST_ROWS + DOUBLE + SEVERAL_BLOCKS),
        *(PAST_2_TO_THE_31 + NOT_A_POWER_OF_TWO + UNALIGNED),
    ],
    "gfx942": HALF + SHORTEST_ROWS + LONGEST_ROWS,
}


def variants(target: str) -> list[Variant]:
    """What is compiled for a GPU."""
    return EVERY_KERNEL + _MORE.get(target, [])


def triton_sources(target: str) -> list[TritonSource]:
    """The same, with the arguments that the host functions would pass there."""
    return [_source(variant, target) for variant in variants(target)]


def _source(variant: Variant, target: str) -> TritonSource:
    import triton.language as tl

    from recsys_ops.triton_kernels import embedding_bag as host
    from recsys_ops.triton_kernels import embedding_bag_kernels

    name, _, terms = variant.kernel.partition("_of_")
    kernel = getattr(embedding_bag_kernels, f"embedding_bag_{name}_kernel")
    dtype = DTYPES[variant.dtype]
    sums = "fp64" if variant.dtype == "fp64" else "fp32"
    lanes = LIMITS[target].lanes
    forward = host.EmbeddingBagForwardConfig.default(variant.dim, dtype, lanes)
    backward = host.EmbeddingBagBackwardConfig.default(variant.dim, dtype, terms == "maximum", lanes)

    constants: dict[str, Any] = {
        "D": variant.dim,
        "ROW_STRIDE": variant.dim if variant.column_stride == 1 else 1,
        "COLUMN_STRIDE": variant.column_stride,
        "MEAN": True,
        "DROP_INVALID": False,
        "ACCUMULATE": getattr(tl, sums.replace("fp", "float")),
        "BLOCK_D": forward.block_d,
        "BAGS": forward.bags_per_program,
        "ROWS": (backward if name == "backward" else forward).rows_in_flight,
        "CHUNK": backward.chunk,
        "CHUNKS": backward.chunks_per_program,
        "ENTRIES": forward.bags_per_program * forward.rows_in_flight,
    }
    options: dict[str, Any] = {"num_warps": forward.num_warps}
    if variant.kernel == "entries":
        constants |= {"BAGS": host.BAGS, "ENTRIES": host.ENTRIES}
        options = {}
    if variant.kernel in ("forward", "max_forward", "entries") and target != "gfx942":
        options |= host.ASSERTING  # on AMD an assertion prints, which takes atomics and registers
    constants |= dict.fromkeys(ABSENT.get(variant.kernel, ()))

    pointers = dict.fromkeys(("indices_ptr", "offsets_ptr", "order_ptr"), "*i64") | {"argmax_ptr": "*i32"}
    pointers |= dict.fromkeys(("keys_ptr", "rows_ptr", "bags_ptr", "targets_ptr"), f"*{variant.sizes}")
    pointers |= dict.fromkeys(("pieces_ptr", "factors_ptr"), f"*{sums}")
    if terms == "pieces":
        pointers["terms_ptr"] = f"*{sums}"
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: pointers.get(name, f"*{variant.dtype}" if name.endswith("_ptr") else variant.sizes)
        for name in kernel.arg_names
        if name not in constants
    }
    return TritonSource(variant.name, kernel, signature, constants, options)
