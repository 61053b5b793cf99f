"""The check of the suite itself: it must reject kernels that are wrong on purpose."""

from __future__ import annotations

import itertools

import torch

from recsys_ops.testing.contract import Mutant, OperatorSpec
from recsys_ops.testing.execution import Target, candidate, one_thread, overridden
from recsys_ops.testing.registry import CHECKS, Result, check, demand


@check(
    lambda spec, quick: spec.mutants, serves=lambda target: target.backend == "reference" and target.on_cpu
)
def check_mutant(spec: OperatorSpec, mutant: Mutant, target: Target, dtype: torch.dtype, seed: int) -> None:
    """The suite rejects kernels that are wrong on purpose."""
    demand(rejection(spec, mutant, seed) is not None, f"{mutant.caught_by} does not reject this mutant")


@one_thread()
def rejection(spec: OperatorSpec, mutant: Mutant, seed: int = 0) -> Result | None:
    """The first failure that a mutant of the reference kernels meets in the check that should catch it."""
    catching = CHECKS[mutant.caught_by]
    right = spec.operator.implementations["reference"].kernels
    with candidate(spec, overridden(right, mutant.override(right))) as target:
        subjects, few = catching.subjects(spec, False), catching.subjects(spec, True)
        for some in ([subject for subject in subjects if subject in few], subjects):  # most meet it soon
            for dtype, subject in itertools.product(catching.dtypes(spec, False), some):
                result = catching(spec, subject, target, dtype, seed)
                if not result.ok:
                    return result
    return None
