"""Arguments that embedding_bag_collection must refuse, on every backend alike."""

from __future__ import annotations

from recsys_ops.testing import BadInput

BAD_INPUTS: tuple[BadInput, ...] = ()
