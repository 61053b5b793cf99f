"""Before anything imports torch or triton: interpret Triton kernels, and leave the cores to others while waiting."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
# Threads that wait by spinning slow down everything else on a busy machine, and each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
