"""Runs the correctness suite of an operator on its CUDA kernels, built for the CPU by ``build.py``.

    python tests/cuda_host/contract.py LIBRARY OPERATOR RESULTS EXTENT [CHECK ...]

EXTENT is ``quick``, ``all``, or a part of all such as ``3of8``; ``quick:float16,bfloat16`` is in these dtypes
only, of which quick checks take the first. In a process of its own: a sanitizer ends
the process where it finds a fault.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from recsys_ops.testing import CHECKS, OperatorSpec, candidate, examples

LIBRARY = "recsys_ops_cuda_host"


def load_kernels(library: str, operator: str) -> SimpleNamespace:
    """The operator's kernels by the names of its reference, which gives them their schemas."""
    reference = importlib.import_module(f"recsys_ops.{operator}.reference")
    names = importlib.import_module(f"recsys_ops.{operator}.autograd").FAKES
    fragment = torch.library.Library(LIBRARY, "FRAGMENT")
    changed = getattr(reference, "MUTATES", {})
    for name in names:
        schema = torch.library.infer_schema(getattr(reference, name), mutates_args=changed.get(name, ()))
        fragment.define(name + schema)
    torch.ops.load_library(library)
    load_kernels.fragment = fragment  # type: ignore[attr-defined]  # lives as long as the kernels
    return SimpleNamespace(**{name: getattr(getattr(torch.ops, LIBRARY), name).default for name in names})


def checking_values(kernels: SimpleNamespace, check: Callable[..., None]) -> SimpleNamespace:
    """Kernels whose arguments are checked first: on a GPU, a bad value only says that there is one."""

    def checked(kernel: Any) -> Callable[..., Any]:
        names = [argument.name for argument in kernel._schema.arguments]

        def call(*args: Any) -> Any:
            check(SimpleNamespace(**dict(zip(names, args, strict=True))))
            return kernel(*args)

        return call

    return SimpleNamespace(**{name: checked(kernel) for name, kernel in vars(kernels).items()})


def register_fakes(kernels: SimpleNamespace, operator: str) -> None:
    """As for every backend: nothing else differs between a kernel on the CPU and on a GPU."""
    fakes = importlib.import_module(f"recsys_ops.{operator}.autograd").FAKES
    for name, kernel in vars(kernels).items():
        torch.library.register_fake(kernel, fakes[name])


def _check_bags(call: SimpleNamespace) -> None:
    from recsys_ops.embedding_bag.reference import check_values

    rows = call.weight.shape[0] if hasattr(call, "weight") else call.num_embeddings
    check_values(call.indices, call.offsets, rows, call.include_last_offset, call.drop_invalid)


def _check_lookups(call: SimpleNamespace) -> None:
    from recsys_ops.embedding_bag_collection.reference import _check_values, each_lookup

    tables = call.codes if hasattr(call, "codes") else call.weights
    for lookup in each_lookup(call.lookups):
        rows = tables[lookup.table].shape[0]
        _check_values(lookup, call.values, call.offsets, rows, call.drop_invalid)


def _check_sequences(call: SimpleNamespace) -> None:
    from recsys_ops.hstu_attention import reference

    queries, num_rows, num_keys = call.query_offsets, len(call.q), len(call.k)
    if hasattr(call, "key_cache"):
        reference.check_offsets("offsets", queries, num_rows)
        _check_cache(call)
        num_keys = int(call.offsets[-1])
    reference.sequences(queries, call.offsets, num_rows, num_keys, call.num_contextual, call.num_targets)


def _check_cache(call: SimpleNamespace) -> None:
    from recsys_ops.hstu_attention import reference

    is_paged = call.page_table is not None
    num_rows = call.key_cache.shape[:2].numel() if is_paged else len(call.key_cache)
    for b, cached in enumerate(reference.cached_lengths(call.query_offsets, call.offsets)):
        if is_paged:
            reference.check_pages(call.page_table[b], b, cached, call.key_cache.shape[1], num_rows)
        else:
            reference.check_start(int(call.cache_starts[b]), b, cached, num_rows)


VALUE_CHECKS = {
    "embedding_bag": _check_bags,
    "embedding_bag_collection": _check_lookups,
    "hstu_attention": _check_sequences,
}


def run(library: str, operator: str, checks: list[str], extent: str) -> dict[str, Any]:
    """For each check how many examples passed, and the failures."""
    extent, _, dtypes = extent.partition(":")
    part, _, parts = extent.partition("of")
    spec: OperatorSpec = importlib.import_module(f"recsys_ops.{operator}.cases").SPEC
    if dtypes:
        spec = dataclasses.replace(spec, dtypes=tuple(getattr(torch, name) for name in dtypes.split(",")))
    kernels = load_kernels(library, operator)
    register_fakes(kernels, operator)
    outcome: dict[str, Any] = {name: {"passed": 0, "failures": []} for name in checks}
    for name in checks:
        checked = checking_values(kernels, VALUE_CHECKS[operator]) if name == "bad_input" else kernels
        with candidate(spec, checked, "cuda_host") as target:
            of_check = [e for e in examples(spec, [target], extent == "quick") if e.check.name == name]
            if parts:  # one example at least: those of a check may be fewer than the parts
                of_check = of_check[(int(part) - 1) % len(of_check) :: int(parts)]
            for example in of_check:
                result = example.run()
                outcome[name]["passed"] += result.ok
                outcome[name]["failures"] += [] if result.ok else [str(result)]
    return outcome


if __name__ == "__main__":
    library, operator, results, extent, *only = sys.argv[1:]
    torch.set_num_threads(1)
    Path(results).write_text(json.dumps(run(library, operator, only or list(CHECKS), extent)))
