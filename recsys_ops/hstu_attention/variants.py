"""The Triton kernels of HSTU attention as its host functions launch them, for ``recsys-ops inspect``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from recsys_ops.inspection.triton_compiler import TritonSource

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
KERNELS = ("forward", "queries", "keys")

# The pointers of what a call may or may not have.
MASKS = ("num_contextual_ptr", "num_targets_ptr")
POSITION = ("position_weight_ptr", "position_partial_ptr", "scratch_ptr")
TIME = ("time_weight_ptr", "timestamps_ptr", "boundaries_ptr", "time_partial_ptr")
INTERVALS = ("intervals_ptr",)
DROPOUT = ("dropout_seed_ptr", "row_scale_ptr")
CACHE = ("key_cache_ptr", "value_cache_ptr", "page_table_ptr")
SCALES = ("key_scales_ptr", "value_scales_ptr")
OTHERS = ("cache_starts_ptr", "order_ptr")
FEATURES = {
    "plain": (),
    "masked": MASKS,
    "placed": (*MASKS, *POSITION),
    "timed": (*MASKS, *TIME),
    "biased": (*MASKS, *POSITION, *TIME),
    "all": (*MASKS, *POSITION, *TIME, *INTERVALS, *DROPOUT),
    "paged": (*MASKS, *CACHE),
    "int8": (*MASKS, *CACHE, *SCALES),
    "fp8": (*MASKS, *CACHE, *SCALES),
}
WORK = {"plain": 0, "masked": 0, "all": 2}  # as configurations have it; of all others 1
OPTIONAL = (*FEATURES["all"], *CACHE, *SCALES, *OTHERS)


class Variant(NamedTuple):
    """One kernel for one kind of call."""

    kernel: str
    dtype: str = "bf16"
    dim: int = 128
    features: str = "masked"
    value_dim: int | None = None  # dim

    @property
    def name(self) -> str:
        words = [self.kernel, self.dtype, f"d{self.dim}"]
        words += [] if self.value_dim is None else [f"v{self.value_dim}"]
        return " ".join([*words, self.features])


EVERY_KERNEL = [Variant(kernel, features=features) for kernel in KERNELS for features in ("masked", "biased")]
CACHED = [Variant("forward", features=features) for features in ("paged", "int8", "fp8")]
WIDTHS = [Variant(kernel, "fp16", dim) for kernel in KERNELS for dim in (32, 64, 256)]
ALL_OF_IT = [Variant(kernel, features="all") for kernel in KERNELS]
FULL = [Variant(kernel, "fp32", dim) for kernel in KERNELS for dim in (64, 128, 256)]
NOT_A_POWER_OF_TWO = [Variant(kernel, "bf16", 50, value_dim=25) for kernel in KERNELS]

# What models have on every GPU, all kinds of calls for one of each vendor.
_MORE = {
    "sm_90": ALL_OF_IT + FULL + NOT_A_POWER_OF_TWO + [Variant("forward", features="plain")],
    "gfx942": ALL_OF_IT + FULL[:3],
}


def variants(target: str) -> list[Variant]:
    """What is compiled for a GPU."""
    return EVERY_KERNEL + CACHED + WIDTHS + _MORE.get(target, [])


def triton_sources(target: str) -> list[TritonSource]:
    """The same, with the arguments that the host functions would pass there."""
    return [_source(variant, target) for variant in variants(target)]


def _source(variant: Variant, target: str) -> TritonSource:
    import triton
    import triton.language as tl

    from recsys_ops.triton_kernels import hstu_attention as host
    from recsys_ops.triton_kernels import hstu_attention_backward_kernels, hstu_attention_kernels

    kernel = (
        hstu_attention_kernels.hstu_attention_forward_kernel
        if variant.kernel == "forward"
        else getattr(hstu_attention_backward_kernels, f"hstu_attention_backward_{variant.kernel}_kernel")
    )
    dim = variant.dim
    value_dim = dim if variant.value_dim is None else variant.value_dim
    sums = "fp64" if variant.dtype == "fp64" else "fp32"
    config = host.HSTUAttentionConfig.default(
        variant.kernel, dim, value_dim, DTYPES[variant.dtype], WORK.get(variant.features, 1), target
    )
    constants: dict[str, Any] = {
        "D": dim,
        "V": value_dim,
        "CAUSAL": True,
        "NEXT": True,
        "PERSISTENT": variant.kernel == "queries" and "time_weight_ptr" in FEATURES[variant.features],
        "TIME_STEPS": 7 if "time_weight_ptr" in FEATURES[variant.features] else 0,
        "KEY_CODES": variant.features if variant.features in ("int8", "fp8") else "",
        "VALUE_CODES": variant.features if variant.features in ("int8", "fp8") else "",
        "SUMS": getattr(tl, sums.replace("fp", "float")),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": host.padded(dim),
        "BLOCK_V": host.padded(value_dim),
        "LANES": triton.next_power_of_2(config.block_m + config.block_n - 1),
        **{name: 1 for name in kernel.arg_names if name.endswith("_column")},
        **{name: None for name in OPTIONAL if name not in FEATURES[variant.features]},
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    integers = (
        *("offsets_ptr", "num_contextual_ptr", "num_targets_ptr", "intervals_ptr", "timestamps_ptr"),
        *("boundaries_ptr", "dropout_seed_ptr", "page_table_ptr"),
    )
    pointers = {name: "*i64" for name in kernel.arg_names if name.endswith(integers)}
    wide = (*POSITION, "time_weight_ptr", "time_partial_ptr", "row_scale_ptr", *SCALES)
    pointers |= dict.fromkeys(wide, f"*{sums}")
    if variant.features in ("int8", "fp8"):
        pointers |= dict.fromkeys(("key_cache_ptr", "value_cache_ptr"), "*i8")
    numbers = dict.fromkeys(("threshold", "scale", "alpha", "keep_factor"), "i64")
    signature = {
        name: pointers.get(name, f"*{variant.dtype}") if name.endswith("_ptr") else numbers.get(name, "i32")
        for name in kernel.arg_names
        if name not in constants
    }
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if target != "gfx942":  # on AMD an assertion prints, which takes atomics and registers
        options |= host.ASSERTING
    strides = tuple(
        name
        for name in signature
        if name.endswith(("_row", "_head", "_page")) and min(dim, value_dim) % 16 == 0
    )
    return TritonSource(variant.name, kernel, signature, constants, options, strides)
