"""How Triton kernels run and threads wait, said before torch and triton load; and what tests share."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
# Threads that wait by spinning slow down everything else on a busy machine, and each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from accelerate_model import Model
from command_line import Ended, Run
from torch import Tensor

from recsys_ops import backends, cli


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (16, 5), generator=generator), torch.rand(16, 5, generator=generator)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``recsys-ops`` with arguments, in this process."""
    monkeypatch.delenv("RECSYS_OPS_BACKEND", raising=False)
    monkeypatch.delenv("RECSYS_OPS_SIMD", raising=False)
    monkeypatch.setattr(backends, "_from_environment", None)

    def invoke(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["recsys-ops", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(ended.value.code or 0, *capsys.readouterr())

    return invoke
