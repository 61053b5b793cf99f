"""Random bits of dropout that depend on a seed and a place only, the same on every backend.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
The key is the seed. For row i of q, head h and key j of the row's sequence, the counter is

    (16 (j // 64) + j % 16,  i % 2**32,  h,  i // 2**32)

and of its four words, number ``j % 64 // 16`` decides: so 16 neighbouring keys take the same word of
neighbouring counters, and no word is computed in vain.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def kept(seed: Tensor, dropout: float, rows: Tensor, num_heads: int, num_keys: int) -> Tensor:
    """Whether dropout keeps each score: bool [H, M, N].

    Args:
        seed: int64 [1].
        dropout: the probability of not keeping.
        rows: int64 [M], numbers of rows of q.
        num_heads: H.
        num_keys: N.
    """
    j = torch.arange(num_keys, device=rows.device)
    heads = torch.arange(num_heads, device=rows.device)[:, None, None]
    counter = (j // 64 * 16 + j % 16, rows[:, None] & _WORD, heads, rows[:, None] >> 32)
    words = torch.stack(torch.broadcast_tensors(*philox(seed, counter)))  # [4, H, M, N]
    chosen = words.gather(0, (j % 64 // 16).expand(1, *words.shape[1:]))[0]
    return chosen >= threshold(dropout)


def threshold(dropout: float) -> int:
    """The least word that is kept."""
    return min(round(dropout * 2**32), _WORD)


def philox(seed: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four words of 32 bits in int64, for counters of four such words."""
    key = [seed & _WORD, seed >> 32 & _WORD]
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = _high(second) ^ c1 ^ key[0], _high(first) ^ c3 ^ key[1]
        c1, c3 = second & _WORD, first & _WORD
        key = [k + weyl & _WORD for k, weyl in zip(key, _WEYL, strict=True)]
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    return product >> 32 & _WORD
