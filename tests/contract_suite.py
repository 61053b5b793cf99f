"""The correctness suite of an operator as pytest runs it."""

from __future__ import annotations

import os

import pytest
import torch

from recsys_ops.testing import (
    Case,
    Example,
    OperatorSpec,
    check_forward_backward,
    check_inputs_untouched,
    examples,
    targets,
)


class ContractSuite:
    """An operator's examples on this machine; those of a group share a subject and a backend."""

    def __init__(self, spec: OperatorSpec) -> None:
        self.spec = spec
        self.targets, self.absent = targets(spec.operator)
        self.compiled = [target for target in self.targets if not target.interpreted]
        self.groups: dict[str, list[Example]] = {}
        for example in examples(spec, self.targets):
            name = f"{example.check.name}-{example.subject.name}-{example.target.backend}"
            self.groups.setdefault(name, []).append(example)

    def check_group(self, group: str) -> None:
        results = [example.run() for example in self.groups[group]]
        failures = [str(result) for result in results if not result.ok]
        assert not failures, "\n".join(failures)

    def check_presence(self, backend: str) -> None:
        if backend == "native" and os.environ.get("RECSYS_OPS_BUILD") != "none":
            assert backend not in self.absent, self.absent[backend]
        if backend in self.absent:
            pytest.skip(f"{backend}: {self.absent[backend]}")
        assert any(target.backend == backend for target in self.targets)

    def check_part(self, part: int, parts: int) -> None:
        """One of several parts of all cases that are worth hours."""
        cases = list(dict.fromkeys(self.spec.exhaustive()))
        failures = []
        for case in cases[part::parts]:
            for dtype in self.spec.dtypes:
                results = [check_forward_backward(self.spec, case, target, dtype) for target in self.compiled]
                failures += [str(result) for result in results if not result.ok]
        assert not failures, "\n".join(failures)

    def check_drawn(self, case: Case, dtype: torch.dtype, seed: int) -> None:
        for target in self.compiled:
            for check in (check_forward_backward, check_inputs_untouched):
                result = check(self.spec, case, target, dtype, seed)
                assert result.ok, str(result)
