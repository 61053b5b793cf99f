"""What kernels become on GPUs that need not be here: ``recsys-ops inspect``."""

from __future__ import annotations

from recsys_ops._nvcc import ARCHITECTURES

TARGETS: dict[str, tuple[str, ...]] = {
    "triton": ("sm_80", "sm_90", "sm_100", "gfx942"),
    "cuda": ARCHITECTURES,
}
