"""The Triton kernels of the collection as its host functions launch them, for ``recsys-ops inspect``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from recsys_ops.embedding_bag_collection.reference import MAX, MEAN, Lookup
from recsys_ops.embedding_bag_collection.row_optimizers import OPTIMIZERS, STATES
from recsys_ops.inspection.occupancy import LIMITS
from recsys_ops.inspection.triton_compiler import TritonSource

DTYPES = {
    **{"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64},
    **{"int8": torch.uint8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn},
}
QUANTIZED = ("int8", "int4", "fp8")

POOLING = ("forward", "max_forward", "backward_per_sample_weights")
SUMS = ("backward", "backward_of_maximum", "backward_to_new_rows", "backward_of_pieces")


class Variant(NamedTuple):
    """One kernel for one kind of table; updates by ``update_<optimizer>``."""

    kernel: str
    dtype: str = "fp32"
    dim: int = 128
    sizes: str = "i32"
    stochastic: bool = False

    @property
    def name(self) -> str:
        words = [self.kernel, self.dtype, f"d{self.dim}"]
        words += ["i64"] if self.sizes == "i64" else []
        words += ["stochastic"] if self.stochastic else []
        return " ".join(words)


UPDATES = tuple(f"update_{optimizer}" for optimizer in OPTIMIZERS)
EVERY_KERNEL = [Variant(kernel) for kernel in (*POOLING, *SUMS, "entries", "entry_starts", *UPDATES)]
EVERY_KERNEL += [Variant("forward", quantized) for quantized in QUANTIZED]

# All kernels for every GPU, all kinds of tables for one of each vendor.
_MORE = {
    "sm_90": [
        *(Variant(kernel, "fp16", 256) for kernel in (*POOLING, *SUMS)),
        *(Variant(kernel, "fp32", 16) for kernel in ("forward", "backward", "update_rowwise_adagrad")),
        *(Variant(kernel, "fp32", 384) for kernel in (*POOLING, "backward", "update_adam")),
        *(Variant(kernel, "fp32", 100) for kernel in ("forward", "update_adam")),
        *(Variant(kernel, sizes="i64") for kernel in (*POOLING, *SUMS, "entries", "update_adam")),
        *(Variant("forward", quantized, 64) for quantized in QUANTIZED),
        *(Variant("max_forward", quantized) for quantized in QUANTIZED),
        *(Variant(kernel, "bf16", stochastic=True) for kernel in UPDATES),
        *(Variant(kernel, "fp64", 64) for kernel in ("forward", "backward", "update_adam")),
        Variant("forward", "fp32", 101),
    ],
    "gfx942": [
        *(Variant(kernel, "fp16", 256) for kernel in (*POOLING, *SUMS)),
        *(Variant(kernel, "bf16", stochastic=True) for kernel in UPDATES),
    ],
}


def variants(target: str) -> list[Variant]:
    """What is compiled for a GPU."""
    return EVERY_KERNEL + _MORE.get(target, [])


def triton_sources(target: str) -> list[TritonSource]:
    """The same, with the arguments that the host functions would pass there."""
    return [_source(variant, target) for variant in variants(target)]


def _source(variant: Variant, target: str) -> TritonSource:
    from recsys_ops.triton_kernels import embedding_bag as single
    from recsys_ops.triton_kernels import embedding_bag_collection as host
    from recsys_ops.triton_kernels import embedding_bag_collection_terms as terms

    name, _, kind = variant.kernel.partition("_of_")
    name = name.removesuffix("_to_new_rows").removeprefix("max_")
    wide = "fp64" if variant.dtype == "fp64" else "fp32"
    dtype = DTYPES[variant.dtype]
    lanes = LIMITS[target].lanes
    options: dict[str, Any] = {}
    constants: dict[str, Any] = {
        "D": variant.dim,
        "ACCUMULATE": single.accumulate(DTYPES[wide]),
        "COUNT": True,
        "DROP_INVALID": False,
    }
    if variant.dtype not in QUANTIZED:
        constants["DTYPE"] = host.in_triton(dtype)
    if variant.kernel in POOLING:
        if variant.dtype in QUANTIZED:
            name = f"quantized_{name}"
            constants |= {"BITS": 4 if variant.dtype == "int4" else 8, "IS_FLOAT": variant.dtype == "fp8"}
        constants |= _pooling_constants(variant, lanes)
    elif variant.kernel in SUMS:
        config = single.EmbeddingBagBackwardConfig.default(variant.dim, dtype, kind == "maximum", lanes)
        constants |= {
            "ALIGNMENT": 8,
            "ROW_ALIGNMENT": 16 // dtype.itemsize,
            "BLOCK_D": config.block_d,
            "CHUNK": config.chunk,
            "CHUNKS": config.chunks_per_program,
            "ROWS": config.rows_in_flight,
            "num_warps": config.num_warps,
        }
        to_tables = ("sums_ptr",) if variant.kernel != "backward_to_new_rows" else ("tables_ptr", "pages_ptr")
        of_pieces = ("order_ptr", "cells_ptr", "factors_ptr", "argmax_ptr", "positions_ptr")
        of_sums = ("argmax_ptr", "positions_ptr")
        absent = {"maximum": ("factors_ptr",), "pieces": of_pieces}.get(kind, of_sums)
        constants |= dict.fromkeys((*to_tables, *absent))
    elif name in ("entries", "entry_starts"):
        constants |= {"BAGS": single.BAGS, "ENTRIES": single.ENTRIES, "LOOKUPS": terms.LOOKUPS}
    else:
        constants |= _update_constants(variant, name, lanes)
        name = "update"
    module = host.kernels if variant.kernel in POOLING else host.backward_kernels
    kernel = getattr(module, f"embedding_bag_collection_{name}_kernel")
    if "num_warps" in constants:
        options["num_warps"] = constants.pop("num_warps")
    if (variant.kernel in POOLING or name.startswith("entr")) and target != "gfx942":
        options |= single.ASSERTING  # on AMD an assertion prints, which takes atomics and registers

    pointers = dict.fromkeys(("values_ptr", "offsets_ptr", "order_ptr", "starts_ptr"), "*i64")
    pointers |= dict.fromkeys(("lookups_ptr", "tables_ptr", "pages_ptr"), "*i64")
    pointers |= dict.fromkeys(("argmax_ptr", "positions_ptr"), "*i32")
    pointers |= dict.fromkeys(("keys_ptr", "cells_ptr", "rows_ptr", "targets_ptr"), f"*{variant.sizes}")
    gradients = wide if variant.kernel in ("entries", "backward_of_pieces") else variant.dtype
    pointers |= {"terms_ptr": f"*{gradients}", "grad_output_ptr": f"*{wide}"}
    numbers = {"salt": "u32", "seed": "u32"}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {
        key: pointers.get(key, f"*{wide}")
        if key.endswith("_ptr")
        else numbers.get(key, "fp64" if key in host.NUMBERS else variant.sizes)
        for key in kernel.arg_names
        if key not in constants
    }
    return TritonSource(variant.name, kernel, signature, constants, options)


def _pooling_constants(variant: Variant, lanes: int) -> dict[str, Any]:
    """Those of the plan for a lookup in an aligned table."""
    from recsys_ops.triton_kernels import embedding_bag_collection_plans as plans

    dtype = DTYPES[variant.dtype]
    per_byte = 2 if variant.dtype == "int4" else 1
    columns = variant.dim // per_byte
    cells = plans.Strided(0, columns, 1, dtype.itemsize)
    scales = plans.Strided(0, 2, 1, 4) if variant.dtype in QUANTIZED else None
    table = plans.Table(8, variant.dim, dtype, cells, scales, per_byte)
    is_max = variant.kernel == "max_forward"
    lookup = Lookup(0, MAX if is_max else MEAN, 0, 8, 0, variant.dim)
    disjoint = variant.kernel == "backward_per_sample_weights"
    config = plans.default_config(table, lanes)
    (launch,) = plans.pooling_plan.build(torch.device("cpu"), (lookup,), (table,), disjoint, config)
    return launch.constants | {"MAXIMUM": is_max} | ({"argmax_ptr": None} if not is_max else {})


def _update_constants(variant: Variant, name: str, lanes: int) -> dict[str, Any]:
    import triton

    from recsys_ops.triton_kernels import embedding_bag_collection as host

    optimizer = OPTIMIZERS.index(name.removeprefix("update_"))
    hyperparameters = torch.tensor([0.1, 1e-8, 0.9, 0.99, 0.0, 0.0, float("inf"), float("inf")])
    formula = host.formula(optimizer, hyperparameters.double(), 1)
    config = host.EmbeddingBagCollectionUpdateConfig.default(variant.dim, lanes)
    dtype = DTYPES[variant.dtype]
    states = [host.in_triton(dtype)] * len(STATES[optimizer])
    return {
        **{key: value for key, value in formula.items() if key not in host.NUMBERS},
        **dict(
            zip(
                ("FIRST_DTYPE", "SECOND_DTYPE"), [*states, *2 * [host.in_triton(torch.float32)]], strict=False
            )
        ),
        "STOCHASTIC": variant.stochastic,
        "UNIT_COLUMNS": True,
        "ALIGNMENT": 16 // dtype.itemsize,
        "BLOCK_D": triton.next_power_of_2(variant.dim),
        "ROWS": config.rows_per_program,
        "num_warps": config.num_warps,
    }
