"""Before anything imports torch or triton: how Triton kernels run, and how threads wait."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
# Threads that wait by spinning slow down everything else on a busy machine, and each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
