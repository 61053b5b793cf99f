"""How Triton kernels run and threads wait, said before torch and triton load; and what tests share."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
# Threads that wait by spinning slow down everything else on a busy machine, and each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from accelerate_model import Model
from torch import Tensor


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (16, 5), generator=generator), torch.rand(16, 5, generator=generator)
