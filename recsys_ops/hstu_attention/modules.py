"""Module forms of HSTU attention: the layers of the paper's code and of Meta's production, and a stack."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from recsys_ops.hstu_attention import meta_modules
from recsys_ops.hstu_attention.arguments import MAX_HEAD_DIM
from recsys_ops.hstu_attention.bias import RelativeBias, TimeBucketing
from recsys_ops.hstu_attention.layer import NAME, hstu_layer, layer_config, with_requests, without_requests
from recsys_ops.hstu_attention.layer_autograd import RECOMPUTABLE, LayerConfig, LayerWeights
from recsys_ops.hstu_attention.masks import HSTUMask
from recsys_ops.jagged import sequence_of_rows

VARIANTS = ("stu", "paper")


class HSTULayer(nn.Module):
    r"""One layer of HSTU over jagged sequences, as one function whose backward keeps little.

    ``"stu"`` is Meta's production layer (``STULayer`` of Generative Recommenders), where only U is
    activated::

        [U, V, Q, K] = LN(x; w, b) @ W_uvqk + b_uvqk
        A = hstu_attention(Q, K, V)
        output = x + dropout([silu(U), A, silu(U) * LN(A; w, b)]) @ W_output

    ``"paper"`` is that of the paper's experiments (``SequentialTransductionUnitJagged`` there; Zhai et al.,
    "Actions Speak Louder than Words", 2024)::

        [U, V, Q, K] = silu(LN(x) @ W_uvqk)
        A = hstu_attention(Q, K, V, alpha=1)
        output = x + dropout(U * LN(A)) @ W_output + b_output

    Args:
        embedding_dim: columns of x, E.
        num_heads: H.
        linear_hidden_dim: of U and V for each head, Dv; 1 to 256.
        attention_dim: of Q and K for each head, Dqk; 1 to 256.
        variant: ``"stu"`` or ``"paper"``.
        output_dropout: the probability with which what W_output reads is dropped in training.
        attention_dropout: the same of silu(...) in the attention.
        scale: the factor of each row of A, the 1/N of the papers, where a call gives none: a constant
            like 1 / max_seq_len lets a user's output depend on nobody else.
        alpha: the factor of q . k; by default 1 / sqrt(Dqk), in ``"paper"`` 1.
        eps: of both norms.
        concat_ua: whether W_output reads [U, LN(A), U * LN(A)]; in ``"paper"`` only.
        group_norm: whether A is normed for each head by itself, with a weight and a bias [H]; in
            ``"stu"`` only.
        max_seq_len: gives the layer a ``position_weight`` [2 * max_seq_len - 1], see ``RelativeBias``.
        num_buckets: gives the layer a ``time_weight`` [num_buckets + 1], the last for all that is longer;
            128 in the paper's code.
        bucketing: of times, as in ``RelativeBias``.
        recompute: what the backward computes again instead of keeping it: any of ``"normed_x"`` (a norm),
            ``"uvqk"`` (that, if it is not kept, and a matrix product) and ``"y"``, what W_output reads
            (a norm and a product of elements).
        backend: of the attention: a name, or None to choose.
        device, dtype: of the weights. Computed is in the dtype of x, or of autocast.

    Raises:
        ValueError: an argument is not as above.

    Example:
        >>> import torch, recsys_ops
        >>> layer = recsys_ops.nn.HSTULayer(32, num_heads=2, linear_hidden_dim=16, attention_dim=8, scale=0.1)
        >>> x, offsets = torch.randn(5, 32), torch.tensor([0, 2, 5])
        >>> layer(x, offsets).shape
        torch.Size([5, 32])
        >>> layer(x, offsets, mask=recsys_ops.HSTUMask(num_targets=1), targets_only=True).shape
        torch.Size([2, 32])
    """

    output_weight: nn.Parameter
    position_weight: nn.Parameter | None
    time_weight: nn.Parameter | None
    bucketing: str | TimeBucketing | Tensor

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        linear_hidden_dim: int,
        attention_dim: int,
        *,
        variant: str = "stu",
        output_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        scale: float | None = None,
        alpha: float | None = None,
        eps: float = 1e-6,
        concat_ua: bool = False,
        group_norm: bool = False,
        max_seq_len: int | None = None,
        num_buckets: int | None = None,
        bucketing: str | TimeBucketing | Tensor = "log",
        recompute: Collection[str] = ("normed_x", "y"),
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_choice("variant", variant, VARIANTS)
        for name in recompute:
            _check_choice("recompute", name, RECOMPUTABLE)
        for name, size in (("embedding_dim", embedding_dim), ("num_heads", num_heads)):
            if size < 1:
                raise ValueError(f"{NAME}: expected {name} of at least 1, got {size}")
        for name, size in (("linear_hidden_dim", linear_hidden_dim), ("attention_dim", attention_dim)):
            if not 1 <= size <= MAX_HEAD_DIM:
                raise ValueError(f"{NAME}: expected {name} from 1 to {MAX_HEAD_DIM}, got {size}")
        for name, share in (("output_dropout", output_dropout), ("attention_dropout", attention_dropout)):
            if not 0.0 <= share < 1.0:
                raise ValueError(f"{NAME}: expected {name} in [0, 1), got {share}")
        other = {"concat_ua": concat_ua} if variant == "stu" else {"group_norm": group_norm}
        for name, given in other.items():
            if given:
                raise ValueError(f"{NAME}: expected {name}=False in variant {variant!r}, got True")
        self.variant, self.embedding_dim, self.num_heads = variant, embedding_dim, num_heads
        self.linear_hidden_dim, self.attention_dim = linear_hidden_dim, attention_dim
        self.output_dropout, self.attention_dropout = output_dropout, attention_dropout
        self.scale, self.eps, self.backend = scale, eps, backend
        self.alpha = 1.0 if alpha is None and variant == "paper" else alpha
        self.concat_ua, self.group_norm, self.recompute = concat_ua, group_norm, tuple(recompute)
        hidden = num_heads * linear_hidden_dim
        norms = num_heads if group_norm else hidden
        is_stu = variant == "stu"
        sizes = {
            "input_norm_weight": (embedding_dim,) if is_stu else None,
            "input_norm_bias": (embedding_dim,) if is_stu else None,
            "uvqk_weight": (embedding_dim, 2 * num_heads * (linear_hidden_dim + attention_dim)),
            "uvqk_bias": (2 * num_heads * (linear_hidden_dim + attention_dim),) if is_stu else None,
            "output_norm_weight": (norms,) if is_stu else None,
            "output_norm_bias": (norms,) if is_stu else None,
            "output_weight": (hidden * (3 if is_stu or concat_ua else 1), embedding_dim),
            "output_bias": None if is_stu else (embedding_dim,),
            "position_weight": None if max_seq_len is None else (2 * max_seq_len - 1,),
            "time_weight": None if num_buckets is None else (num_buckets + 1,),
        }
        for name, shape in sizes.items():
            weight = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, weight)
        # A buffer if it is a tensor, so that checkpoints have it.
        if isinstance(bucketing, Tensor):
            self.register_buffer("bucketing", bucketing.to(device))
        else:
            self.bucketing = bucketing
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights as Meta's layers do."""
        for name, weight in self.named_parameters(recurse=False):
            if name in ("position_weight", "time_weight") or (
                name == "uvqk_weight" and self.variant == "paper"
            ):
                nn.init.normal_(weight, std=0.02)
            elif weight.dim() == 2:
                nn.init.xavier_uniform_(weight)
            elif name == "output_bias":
                bound = 1 / math.sqrt(self.output_weight.shape[0])
                nn.init.uniform_(weight, -bound, bound)
            else:
                nn.init.constant_(weight, 1.0 if name.endswith("norm_weight") else 0.0)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        *,
        mask: HSTUMask = HSTUMask(),  # noqa: B008  frozen
        timestamps: Tensor | None = None,
        request_timestamps: Tensor | None = None,
        scale: float | Tensor | None = None,
        targets_only: bool = False,
        total_targets: int | None = None,
    ) -> Tensor:
        """Apply the layer to all sequences.

        Args:
            x: [L, E], the tokens of all sequences one after the other; fp32, fp16, bf16 or fp64.
            offsets: int32 or int64 [B + 1], where each sequence starts, the last being L.
            mask: which tokens a token sees, see ``HSTUMask``; causal by default.
            timestamps: int32 or int64 [L], where the layer has a ``time_weight``.
            request_timestamps: int32 or int64 [B], when what follows the last token of each sequence is
                asked for; None for the time of that token itself. With a causal mask without prefix,
                targets and intervals only; costs a copy of x and of the output.
            scale: a number, or a tensor [L]; None for that of the layer.
            targets_only: compute the targets, the last ``mask.num_targets`` tokens of each sequence, alone:
                Q, U and all that comes after the attention only for them. Gradients reach all of x.
            total_targets: how many those are, where that is known: else, if ``mask.num_targets`` is a
                tensor, they are counted, for which a GPU is waited for.

        Returns:
            [L, E], or [targets, E], in the dtype of x.

        Raises:
            ValueError, TypeError: an argument's shape, dtype or combination is not as above.
            RuntimeError: as in ``recsys_ops.hstu_attention``.
        """
        scale = self.scale if scale is None else scale
        if scale is None:
            raise ValueError(f"{NAME}: expected scale when it is made or called, got None")
        if self.time_weight is None:
            timestamps = request_timestamps = None
        elif timestamps is None:
            raise ValueError(f"{NAME}: expected timestamps for time_weight, got None")
        own_offsets = offsets
        if request_timestamps is not None:
            x, offsets, timestamps = with_requests(x, offsets, timestamps, request_timestamps, mask, scale)
        output = hstu_layer(
            x,
            offsets,
            self.weights,
            self.config,
            scale=scale,
            alpha=self.alpha,
            mask=mask,
            bias=self._bias(timestamps),
            attention_dropout=self.attention_dropout if self.training else 0.0,
            targets_only=targets_only,
            total_targets=total_targets,
            backend=self.backend,
        )
        return output if request_timestamps is None else without_requests(output, offsets, own_offsets)

    @property
    def weights(self) -> LayerWeights:
        """All but those of the relative bias."""
        return LayerWeights(*(getattr(self, name) for name in LayerWeights._fields))

    @property
    def config(self) -> LayerConfig:
        """What is computed with them, in the mode that the layer is in."""
        return layer_config(
            self.variant,
            num_heads=self.num_heads,
            linear_hidden_dim=self.linear_hidden_dim,
            attention_dim=self.attention_dim,
            concat_ua=self.concat_ua,
            group_norm=self.group_norm,
            eps=self.eps,
            output_dropout=self.output_dropout if self.training else 0.0,
            recompute=self.recompute,
        )

    def _bias(self, timestamps: Tensor | None) -> RelativeBias | None:
        if self.position_weight is None and self.time_weight is None:
            return None
        return RelativeBias(self.position_weight, self.time_weight, timestamps, self.bucketing)

    @classmethod
    def from_stu_layer(cls, theirs: Any, **options: Any) -> HSTULayer:
        """A layer with the weights of Meta's ``STULayer``, copied.

        Calls then say what theirs is told when it is made, and what it takes from the batch:
        ``scale=1 / max_seq_len`` and ``mask=HSTUMask(window=max_attn_len or None,
        num_contextual=contextual_seq_len, num_targets=num_targets)``.

        Args:
            theirs: a ``STULayer`` of Generative Recommenders, or what has its attributes.
            options: arguments of ours instead of what is theirs, for example ``recompute`` or ``scale``.

        Raises:
            ValueError: it is none, or does something that ours does not.
        """
        return cls._from(meta_modules.STU_LAYER, theirs, options)

    def to_stu_layer(self, theirs: Any) -> None:
        """Copy the weights into Meta's ``STULayer``.

        Raises:
            ValueError: it is none, or another layer than this.
        """
        self._to(meta_modules.STU_LAYER, theirs)

    @classmethod
    def from_sequential_transduction_unit(cls, theirs: Any, **options: Any) -> HSTULayer:
        """A layer with the weights of ``SequentialTransductionUnitJagged``, the paper's code, copied.

        Calls then give ``scale=1 / n``, where n is the size of its mask. It takes padded timestamps, of
        which the one after the last token is the time of the request: ``request_timestamps``.

        Args:
            theirs: a ``SequentialTransductionUnitJagged`` of Generative Recommenders, or what has its
                attributes.
            options: arguments of ours instead of what is theirs, for example ``recompute`` or ``scale``.

        Raises:
            ValueError: it is none, or does something that ours does not.
        """
        return cls._from(meta_modules.TRANSDUCTION_UNIT, theirs, options)

    def to_sequential_transduction_unit(self, theirs: Any) -> None:
        """Copy the weights into ``SequentialTransductionUnitJagged``, the paper's code.

        Raises:
            ValueError: it is none, or another layer than this.
        """
        self._to(meta_modules.TRANSDUCTION_UNIT, theirs)

    @classmethod
    def _from(cls, kind: meta_modules.Kind, theirs: Any, options: dict[str, Any]) -> HSTULayer:
        weights = kind.weights(theirs)
        like = weights["uvqk_weight"]
        ours = cls(**{**kind.arguments(theirs), "device": like.device, "dtype": like.dtype, **options})
        ours.train(theirs.training)
        with torch.no_grad():
            for name, weight in weights.items():
                getattr(ours, name).copy_(weight)
        return ours

    def _to(self, kind: meta_modules.Kind, theirs: Any) -> None:
        weights = kind.weights(theirs)
        own = {name: tuple(weight.shape) for name, weight in self.named_parameters()}
        if own != {name: tuple(weight.shape) for name, weight in weights.items()}:
            shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
            raise ValueError(f"{NAME}: expected a {kind.name} with weights {own}, got {shapes}")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(getattr(self, name))

    def extra_repr(self) -> str:
        return (
            f"{self.embedding_dim}, num_heads={self.num_heads}, linear_hidden_dim={self.linear_hidden_dim}, "
            f"attention_dim={self.attention_dim}, variant={self.variant!r}, scale={self.scale}"
        )


class HSTU(nn.Module):
    """A stack of HSTU layers on embedded items, over jagged sequences.

    A token enters as ``sqrt(E) * item_embedding(id) + position_embedding(place in its sequence)``, as in the
    paper's code. Targets all have the place that comes next after the history, plus that in their group,
    so that no target depends on which others stand beside.

    Args:
        num_items: rows of the item embedding.
        embedding_dim: E.
        num_layers: how many layers.
        max_seq_len: places that have an embedding of their own and, in the bias, distances; tokens further
            on share the last. It gives the layers a ``scale`` of 1 / max_seq_len.
        num_heads, linear_hidden_dim, attention_dim: of each layer, see ``HSTULayer``.
        num_buckets: buckets of times in the layers' bias, 128 in the paper's code; None for none.
        relative_positions: whether the layers' bias has weights of distances.
        input_dropout: the probability with which elements of the embedded tokens are dropped in training.
        device, dtype: of the weights.
        options: further arguments of the layers, whose ``variant`` is ``"paper"`` by default.

    Raises:
        ValueError: an argument is not as above.

    Example:
        >>> import torch, recsys_ops
        >>> model = recsys_ops.nn.HSTU(
        ...     1000, 32, num_layers=2, max_seq_len=50, num_heads=2, linear_hidden_dim=16, attention_dim=16
        ... )
        >>> ids, offsets = torch.tensor([3, 7, 3, 11, 12]), torch.tensor([0, 2, 5])
        >>> times = torch.tensor([100, 160, 20, 25, 90])
        >>> model(ids, offsets, times).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        num_items: int,
        embedding_dim: int,
        *,
        num_layers: int,
        max_seq_len: int,
        num_heads: int,
        linear_hidden_dim: int,
        attention_dim: int,
        num_buckets: int | None = 128,
        relative_positions: bool = True,
        input_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"HSTU: expected num_layers of at least 1, got {num_layers}")
        if max_seq_len < 1:
            raise ValueError(f"HSTU: expected max_seq_len of at least 1, got {max_seq_len}")
        self.max_seq_len = max_seq_len
        self.item_embedding = nn.Embedding(num_items, embedding_dim, device=device, dtype=dtype)
        self.position_embedding = nn.Embedding(max_seq_len, embedding_dim, device=device, dtype=dtype)
        self.input_dropout = nn.Dropout(input_dropout)
        options = {"variant": "paper", "scale": 1 / max_seq_len, **options}
        self.layers = nn.ModuleList(
            HSTULayer(
                embedding_dim,
                num_heads,
                linear_hidden_dim,
                attention_dim,
                max_seq_len=max_seq_len if relative_positions else None,
                num_buckets=num_buckets,
                device=device,
                dtype=dtype,
                **options,
            )
            for _ in range(num_layers)
        )
        for table, std in ((self.item_embedding, 0.02), (self.position_embedding, embedding_dim**-0.5)):
            nn.init.trunc_normal_(table.weight, std=std, a=-2 * std, b=2 * std)

    def forward(
        self,
        ids: Tensor,
        offsets: Tensor,
        timestamps: Tensor | None = None,
        *,
        mask: HSTUMask = HSTUMask(),  # noqa: B008  frozen
        request_timestamps: Tensor | None = None,
        scale: float | Tensor | None = None,
        targets_only: bool = False,
        total_targets: int | None = None,
    ) -> Tensor:
        """Encode all sequences.

        Args:
            ids: int32 or int64 [L], the items of all sequences one after the other.
            offsets, timestamps, mask, request_timestamps, scale, total_targets: as in ``HSTULayer``.
            targets_only: let the last layer compute the targets alone.

        Returns:
            [L, E], or [targets, E].

        Raises:
            ValueError, TypeError, RuntimeError: as in ``HSTULayer``.
        """
        if ids.dim() != 1:
            raise ValueError(f"HSTU: expected ids of shape [L], got {list(ids.shape)}")
        x = self.item_embedding(ids) * math.sqrt(self.item_embedding.embedding_dim)
        x = self.input_dropout(x + self.position_embedding(self._places(offsets, len(ids), mask)))
        own_offsets = offsets
        if not any(layer.time_weight is not None for layer in self.layers):
            request_timestamps = None
        if request_timestamps is not None:
            x, offsets, timestamps = with_requests(x, offsets, timestamps, request_timestamps, mask, scale)
        for i, layer in enumerate(self.layers):
            x = layer(
                x,
                offsets,
                mask=mask,
                timestamps=timestamps,
                scale=scale,
                targets_only=targets_only and i == len(self.layers) - 1,
                total_targets=total_targets,
            )
        return x if request_timestamps is None else without_requests(x, offsets, own_offsets)

    def _places(self, offsets: Tensor, total: int, mask: HSTUMask) -> Tensor:
        """The row of the position embedding of each token, [L]."""
        sequence = sequence_of_rows(offsets, total)
        place = torch.arange(total, device=offsets.device) - offsets[sequence]
        if mask.num_targets is not None:
            first = (offsets.diff() - mask.num_targets)[sequence]
            place = torch.where(place < first, place, first + (place - first) % mask.target_group_size)
        return place.clamp(max=self.max_seq_len - 1)


def _check_choice(argument: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(f"{NAME}: expected {argument} to be one of {choices}, got {given!r}")
