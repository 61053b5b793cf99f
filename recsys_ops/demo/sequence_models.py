"""Sequence recommenders of one size: HSTU, the same padded as it was published, and a softmax transformer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ops.demo.sequences import Negatives, Sequences, next_item_loss
from recsys_ops.hstu_attention.bias import TimeBucketing
from recsys_ops.jagged import sequence_of_rows
from recsys_ops.nn import HSTU, HSTULayer

HEADS = 2
TIME_BUCKETS = 128


class SequenceRecommender(nn.Module):
    """Scores every item as the next purchase after each of a history, by the embeddings that it reads.

    Args:
        encoder: ``HSTU``, ``PaddedHSTU`` or ``Transformer``.
    """

    def __init__(self, encoder: HSTU | PaddedHSTU | Transformer) -> None:
        super().__init__()
        num_items, dim = encoder.item_embedding.weight.shape
        self.encoder = encoder
        self.norm = nn.LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(num_items))

    def forward(self, sequences: Sequences) -> Tensor:
        """What stands for the purchase after each: [L, E]."""
        items, offsets, timestamps, request_timestamps, _ = sequences
        return self.norm(self.encoder(items, offsets, timestamps, request_timestamps=request_timestamps))

    def loss(self, sequences: Sequences, negatives: Negatives | None) -> Tensor:
        """See ``next_item_loss``."""
        items = self.encoder.item_embedding.weight
        return next_item_loss(self(sequences), sequences.targets, items, self.bias, negatives)

    def scores_after(self, sequences: Sequences) -> Tensor:
        """Of every item after the last purchase of each history: [B, I]."""
        last = self(sequences)[sequences.offsets[1:] - 1]
        return torch.addmm(self.bias, last, self.encoder.item_embedding.weight.T)


def hstu(
    num_items: int, dim: int, layers: int, places: int, scale: float, dropout: float, relative_bias: bool
) -> HSTU:
    """HSTU as in the paper, with or without its bias of distances in position and in time.

    Args:
        places: of positions and distances that are told apart.
        scale: of the sums of attention, the paper's 1 / N, whatever batch a history is in.
    """
    return HSTU(
        num_items,
        dim,
        num_layers=layers,
        max_seq_len=places,
        num_heads=HEADS,
        linear_hidden_dim=dim,
        attention_dim=dim // HEADS,
        num_buckets=TIME_BUCKETS if relative_bias else None,
        relative_positions=relative_bias,
        input_dropout=dropout,
        output_dropout=dropout,
        scale=scale,
    )


class Transformer(nn.Module):
    """Causal softmax attention and MLPs, with the embeddings, depth, width and parameters of ``hstu``."""

    def __init__(self, num_items: int, dim: int, layers: int, places: int, dropout: float) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(num_items, dim)
        self.position_embedding = nn.Embedding(places, dim)
        self.input_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(TransformerLayer(dim, dropout) for _ in range(layers))
        for table, std in ((self.item_embedding, 0.02), (self.position_embedding, dim**-0.5)):
            nn.init.trunc_normal_(table.weight, std=std, a=-2 * std, b=2 * std)

    def forward(
        self, ids: Tensor, offsets: Tensor, timestamps: Tensor, *, request_timestamps: Tensor | None = None
    ) -> Tensor:
        """Encode all sequences, [L, E]; it has no use for times."""
        lengths = offsets.diff().tolist()
        x = _embed(self, ids, offsets)
        for layer in self.layers:
            x = layer(x, lengths)
        return x


class TransformerLayer(nn.Module):
    """``x += attention(norm(x))``, then ``x += MLP(norm(x))``."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        # Twice as wide gives the layer the parameters of one of ``hstu``.
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Apply the layer to x [L, E], sequence by sequence."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(1, (3, HEADS, -1))  # [L, 3, H, D]
        attended = []
        for rows in qkv.split(lengths):
            q, k, v = rows.permute(1, 2, 0, 3)[:, None]  # [1, H, n, D]
            attended.append(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0])
        x = x + self.dropout(self.output(torch.cat(attended, dim=1).transpose(0, 1).flatten(1)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class PaddedHSTU(nn.Module):
    """The attention of an ``HSTU`` as its paper's code has it: padded, every score and bias in memory.

    Args:
        jagged: whose weights are used, not copied.
    """

    def __init__(self, jagged: HSTU) -> None:
        super().__init__()
        self.item_embedding, self.position_embedding = jagged.item_embedding, jagged.position_embedding
        self.input_dropout, self.layers = jagged.input_dropout, jagged.layers

    def forward(
        self, ids: Tensor, offsets: Tensor, timestamps: Tensor, *, request_timestamps: Tensor
    ) -> Tensor:
        """Encode all sequences, [L, E]."""
        lengths = offsets.diff()
        places = torch.arange(int(lengths.max()))
        there = places < lengths[:, None]  # [B, N]
        # A query's time is that of the purchase after it.
        asked = torch.cat([timestamps[1:], timestamps.new_zeros(1)])
        asked[offsets[1:] - 1] = request_timestamps
        x = _embed(self, ids, offsets)
        for layer in self.layers:
            assert isinstance(layer, HSTULayer)
            x = _padded_layer(layer, x, there, _pad(asked, there), _pad(timestamps, there))
        return x


def _padded_layer(layer: HSTULayer, x: Tensor, there: Tensor, asked: Tensor, timestamps: Tensor) -> Tensor:
    places, heads, weights = torch.arange(there.shape[1]), layer.num_heads, layer.weights
    assert layer.scale is not None and weights.output_bias is not None
    distances = places - places[:, None]  # [N, N], from query to key
    uvqk = F.silu(F.layer_norm(x, x.shape[1:], eps=layer.eps) @ weights.uvqk_weight)
    u, v, q, k = uvqk.split(layer.config.widths, dim=1)
    v, q, k = (_pad(rows.unflatten(1, (heads, -1)), there) for rows in (v, q, k))  # [B, N, H, D]
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k)
    if layer.position_weight is not None and layer.time_weight is not None:
        middle = len(layer.position_weight) // 2
        of_positions = layer.position_weight[(distances + middle).clamp(0, 2 * middle)]  # [N, N]
        elapsed = (asked[:, :, None] - timestamps[:, None]).abs()  # [B, N, N]
        buckets = torch.log(elapsed.clamp(min=1)).div(TimeBucketing().divisor).long()
        of_times = layer.time_weight[buckets.clamp(max=len(layer.time_weight) - 1)]
        scores = scores + (of_positions + of_times)[:, None]
    shares = F.silu(scores) * layer.scale * (distances <= 0)
    attended = torch.einsum("bhmn,bnhd->bmhd", shares, v)[there].flatten(1)  # [L, H * D]
    gated = u * F.layer_norm(attended, attended.shape[1:], eps=layer.eps)
    gated = F.dropout(gated, layer.output_dropout, layer.training)
    return x + torch.addmm(weights.output_bias, gated, weights.output_weight)


def _embed(encoder: PaddedHSTU | Transformer, ids: Tensor, offsets: Tensor) -> Tensor:
    """What ``HSTU`` feeds its first layer: [L, E]."""
    place = torch.arange(len(ids)) - offsets[sequence_of_rows(offsets, len(ids))]
    place = place.clamp(max=encoder.position_embedding.num_embeddings - 1)
    x = encoder.item_embedding(ids) * math.sqrt(encoder.item_embedding.embedding_dim)
    return encoder.input_dropout(x + encoder.position_embedding(place))


def _pad(rows: Tensor, there: Tensor) -> Tensor:
    """Rows [L, ...] where ``there`` [B, N] is true, else 0: [B, N, ...]."""
    return rows.new_zeros(*there.shape, *rows.shape[1:]).index_put(there.nonzero(as_tuple=True), rows)
