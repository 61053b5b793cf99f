"""Module form of the pooled embedding lookup."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_ops.embedding_bag.api import embedding_bag


class EmbeddingBag(torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag``, computed by ``recsys_ops.embedding_bag``: same parameters, same state dict.

    Args:
        *args, **kwargs: those of ``torch.nn.EmbeddingBag``.
        bounds: ``"error"`` or ``"drop"``, see ``recsys_ops.embedding_bag``.
        backend: a backend's name, or None to choose.

    Shape: input [N] with offsets [B] (or [B + 1] with ``include_last_offset``), or input [B, L];
    output [B, embedding_dim].

    Example:
        >>> import torch, recsys_ops
        >>> bags = recsys_ops.nn.EmbeddingBag(10, 4, mode="sum")
        >>> bags(torch.tensor([1, 2, 4]), torch.tensor([0, 2])).shape
        torch.Size([2, 4])
    """

    # Class attributes, so that a torch.nn.EmbeddingBag can change its class in place.
    bounds: str = "error"
    backend: str | None = None

    def __init__(self, *args: Any, bounds: str = "error", backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bounds = bounds
        self.backend = backend

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        return embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
            bounds=self.bounds,
            backend=self.backend,
        )
