"""Triton kernels, one file per operator.

Installed and imported as ``recsys_ops.triton_kernels`` (a symbolic link in the package
points here), because the bare name belongs to other projects.
"""

if not __name__.startswith("recsys_ops."):
    raise ImportError(
        "import recsys_ops.triton_kernels: the bare name would load a second copy of this folder"
    )
