"""Kernels of the embedding bag collection that are wrong on purpose."""

from __future__ import annotations

from recsys_ops.testing import Mutant

MUTANTS: tuple[Mutant, ...] = ()
