"""Search over kernel variants.

Installed and imported as ``recsys_ops.autotune`` (a symbolic link in the package
points here), because the bare name belongs to other projects.
"""

if not __name__.startswith("recsys_ops."):
    raise ImportError("import recsys_ops.autotune: the bare name would load a second copy of this folder")
