"""The layers of Meta's Generative Recommenders as ours; this never imports them, nor needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.weak import WeakTensorKeyDictionary

from recsys_ops._arguments import INTEGERS
from recsys_ops.embedding_bag_collection.torchrec_modules import Accelerated, has_hooks
from recsys_ops.hstu_attention.bias import RelativeBias
from recsys_ops.hstu_attention.layer import NAME, hstu_layer, layer_config, with_requests, without_requests
from recsys_ops.hstu_attention.layer_autograd import RECOMPUTABLE, LayerWeights
from recsys_ops.hstu_attention.masks import HSTUMask
from recsys_ops.jagged import sequence_of_rows

_LATEST = 2**62  # no boundary of buckets of times is looked for later


@dataclass(frozen=True)
class Kind:
    """One class of Meta's: where it is, and what it has under which names.

    ``arguments`` gives those of ``HSTULayer``, ``why_not`` says what ours does not do, as a clause.
    """

    name: str
    where: str
    label: str
    dropout: str
    attributes: tuple[str, ...]
    names: dict[str, str]
    arguments: Callable[[Any], dict[str, Any]]
    why_not: Callable[[Any], str | None]

    def why_not_ours(self, theirs: Any) -> str | None:
        """What an instance does that ours does not, as a clause, or None."""
        missing = [name for name in (*self.attributes, self.dropout) if not hasattr(theirs, name)]
        if missing:
            return f"it has no {missing[0]}"
        if any(is_parametrized(module) for module in theirs.modules()):
            return "its parameters are parametrized"
        return self.why_not(theirs)

    def weights(self, theirs: Any) -> dict[str, Tensor]:
        """Its parameters by our names and in our shapes, on the same memory.

        Raises:
            ValueError: it is none of these, or does something that ours does not.
        """
        if reason := self.why_not_ours(theirs):
            raise ValueError(
                f"{NAME}: expected a {self.name} that does what ours does, "
                f"got a {type(theirs).__name__}: {reason}"
            )
        return self.raw_weights(theirs)

    def raw_weights(self, theirs: Any) -> dict[str, Tensor]:
        """The same, unchecked."""
        found = {}
        for ours, path in self.names.items():
            owner: Any = theirs
            *parents, name = path.removesuffix("^T").split(".")
            for parent in parents:
                owner = None if owner is None else getattr(owner, parent)
            if owner is not None:
                found[ours] = getattr(owner, name).t() if path.endswith("^T") else getattr(owner, name)
        return found


def kind_of(module: Any) -> Kind | None:
    """Which of Meta's layers a module, or a class, is by its name."""
    mro = (module if isinstance(module, type) else type(module)).__mro__
    return next((kind for kind in KINDS for c in mro if c.__name__ == kind.name), None)


def is_certain(module: Any) -> bool:
    """Whether that class is Meta's own, rather than one of its name."""
    kind = kind_of(module)
    return kind is not None and _definer(type(module), kind).__module__ == kind.where


def why_not_swapped(module: Any) -> str | None:
    """Why a layer of Meta's cannot become ours in place, as a clause, or None."""
    kind = kind_of(module)
    assert kind is not None
    definer = next(c for c in type(module).__mro__ if "forward" in vars(c) and not issubclass(c, Accelerated))
    if definer is not _definer(type(module), kind) or "forward" in vars(module):
        return f"{type(module).__name__} has a forward of its own"
    if any(has_hooks(child) for child in module.modules() if child is not module):
        return "its parts have hooks"
    return kind.why_not_ours(module)


def forward_as_one(original: type) -> Callable[..., Any]:
    """The forward of a subclass of Meta's: ours where it does the same, else that of ``original``."""
    theirs: Callable[..., Any] = original.forward  # type: ignore[attr-defined]
    of_unit = kind_of(original) is TRANSDUCTION_UNIT

    def stu_forward(
        self: Any,
        x: Tensor,
        x_lengths: Tensor,
        x_offsets: Tensor,
        max_seq_len: int,
        num_targets: Tensor | None,
        max_kv_caching_len: int = 0,
        kv_caching_lengths: Tensor | None = None,
    ) -> Any:
        if kv_caching_lengths is not None or _why_not_stu(self) is not None:
            return theirs(
                self,
                x,
                x_lengths,
                x_offsets,
                max_seq_len,
                num_targets,
                max_kv_caching_len,
                kv_caching_lengths,
            )
        return _layer(
            self, STU_LAYER, x, x_offsets, 1 / max_seq_len, _stu_mask(self, x_offsets, num_targets), None
        )

    def unit_forward(
        self: Any,
        x: Tensor,
        x_offsets: Tensor,
        all_timestamps: Tensor | None,
        invalid_attn_mask: Tensor,
        delta_x_offsets: Any = None,
        cache: Any = None,
        return_cache_states: bool = False,
    ) -> Any:
        size = invalid_attn_mask.shape[-1]
        is_plain = delta_x_offsets is None and cache is None and not return_cache_states
        if not is_plain or not _serves_unit(self, all_timestamps, invalid_attn_mask):
            return theirs(
                self,
                x,
                x_offsets,
                all_timestamps,
                invalid_attn_mask,
                delta_x_offsets,
                cache,
                return_cache_states,
            )
        if all_timestamps is None:
            output = _layer(self, TRANSDUCTION_UNIT, x, x_offsets, 1 / size, HSTUMask(), None)
            return output, (None, None, None, output)
        sequence = sequence_of_rows(x_offsets, len(x))
        place = torch.arange(len(x), device=x.device) - x_offsets[sequence]
        batch = torch.arange(len(x_offsets) - 1, device=x.device)
        longer_x, longer, times = with_requests(
            x,
            x_offsets,
            all_timestamps[sequence, place],
            all_timestamps[batch, x_offsets.diff().clamp(max=size - 1)],
            HSTUMask(),
            1 / size,
        )
        output = _layer(self, TRANSDUCTION_UNIT, longer_x, longer, 1 / size, HSTUMask(), times)
        output = without_requests(output, longer, x_offsets)
        return output, (None, None, None, output)

    return unit_forward if of_unit else stu_forward


def _layer(
    theirs: Any,
    kind: Kind,
    x: Tensor,
    offsets: Tensor,
    scale: float,
    mask: HSTUMask,
    timestamps: Tensor | None,
) -> Tensor:
    """Our layer on the parameters of theirs."""
    weights, arguments = kind.raw_weights(theirs), kind.arguments(theirs)
    config = layer_config(
        arguments["variant"],
        num_heads=arguments["num_heads"],
        linear_hidden_dim=arguments["linear_hidden_dim"],
        attention_dim=arguments["attention_dim"],
        concat_ua=arguments.get("concat_ua", False),
        group_norm=arguments.get("group_norm", False),
        eps=arguments["eps"],
        output_dropout=arguments["output_dropout"] if theirs.training else 0.0,
        recompute=arguments["recompute"],
    )
    bias = None
    if timestamps is not None:
        position, time = weights["position_weight"], weights["time_weight"]
        bias = RelativeBias(position, time, timestamps, arguments["bucketing"])
    return hstu_layer(
        x,
        offsets,
        LayerWeights(*(weights.get(name) for name in LayerWeights._fields)),  # type: ignore[arg-type]
        config,
        scale=scale,
        alpha=arguments["alpha"],
        mask=mask,
        bias=bias,
    )


def _definer(original: type, kind: Kind) -> type:
    return next(c for c in reversed(original.__mro__) if c.__name__ == kind.name)


def _stu_arguments(theirs: Any) -> dict[str, Any]:
    return {
        "embedding_dim": theirs._embedding_dim,
        "num_heads": theirs._num_heads,
        "linear_hidden_dim": theirs._hidden_dim,
        "attention_dim": theirs._attention_dim,
        "variant": "stu",
        "output_dropout": theirs._output_dropout_ratio,
        "alpha": theirs._attn_alpha,
        "eps": 1e-6,
        "group_norm": theirs._use_group_norm,
        "recompute": tuple(name for name in RECOMPUTABLE if getattr(theirs, f"_recompute_{name}", False)),
    }


def _why_not_stu(theirs: Any) -> str | None:
    return None if theirs._causal else "it is not causal"


def _stu_mask(theirs: Any, offsets: Tensor, num_targets: Tensor | None) -> HSTUMask:
    """The mask of a call, also of sequences that are too short for their prefix: all see only themselves."""
    window, prefix = theirs._max_attn_len or None, theirs._contextual_seq_len
    targets = num_targets if theirs._target_aware else None
    if prefix:
        lengths = offsets.diff()
        history = lengths if targets is None else lengths - targets
        targets = torch.where(history < prefix, lengths, lengths - history)
    return HSTUMask(window=window, num_contextual=prefix, num_targets=targets)


def _unit_arguments(theirs: Any) -> dict[str, Any]:
    bias = theirs._rel_attn_bias
    arguments = {
        "embedding_dim": theirs._embedding_dim,
        "num_heads": theirs._num_heads,
        "linear_hidden_dim": theirs._linear_dim,
        "attention_dim": theirs._attention_dim,
        "variant": "paper",
        "output_dropout": theirs._dropout_ratio,
        "alpha": 1.0,
        "eps": theirs._eps,
        "concat_ua": theirs._concat_ua,
        "recompute": ("normed_x", "y"),
    }
    if bias is not None:
        arguments |= {"max_seq_len": bias._max_seq_len, "num_buckets": bias._num_buckets}
        arguments["bucketing"] = _boundaries(bias)
    return arguments


def _why_not_unit(theirs: Any) -> str | None:
    for name, served in (
        ("_normalization", ("rel_bias", "hstu_rel_bias")),
        ("_linear_activation", ("silu",)),
        ("_linear_config", ("uvqk",)),
    ):
        if getattr(theirs, name) not in served:
            return f"it has {name}={getattr(theirs, name)!r}"
    if type(theirs._o) is not nn.Linear or theirs._o.bias is None:
        return f"its _o is a {type(theirs._o).__name__}"
    bias = theirs._rel_attn_bias
    if bias is None:
        return None
    if any(not hasattr(bias, name) for name in ("_ts_w", "_pos_w", "_num_buckets", "_bucketization_fn")):
        return f"its relative bias is a {type(bias).__name__}"
    return None if _boundaries(bias) is not None else "its buckets of times are not ascending ranges"


def _serves_unit(theirs: Any, all_timestamps: Tensor | None, mask: Tensor) -> bool:
    """Whether ours does what the unit would, whatever has changed since the swap."""
    if _why_not_unit(theirs) is not None or not _is_causal(mask):
        return False
    bias, size = theirs._rel_attn_bias, mask.shape[-1]
    return all_timestamps is None or (
        bias is not None
        and bias._max_seq_len == size
        and all_timestamps.shape[1:] == (size,)
        and all_timestamps.dtype in INTEGERS
    )


# Of each bias: its function, the device, and the boundaries of its buckets, if it has any.
_BOUNDARIES: WeakKeyDictionary[nn.Module, tuple[Any, torch.device, Tensor | None]] = WeakKeyDictionary()
# The version of masks that were looked at, and whether they are causal.
_CAUSAL = WeakTensorKeyDictionary()


def _boundaries(bias: Any) -> Tensor | None:
    """The least |dt| of each bucket after the first, as this device rounds them, or None."""
    function, device = bias._bucketization_fn, bias._ts_w.device
    known = _BOUNDARIES.get(bias)
    if known is None or known[0] is not function or known[1] != device:
        known = _BOUNDARIES[bias] = (function, device, _search_boundaries(bias, device))
    return known[2]


@torch.no_grad()
def _search_boundaries(bias: Any, device: torch.device) -> Tensor | None:
    last = bias._num_buckets

    def bucket(dt: Tensor) -> Tensor:
        return bias._bucketization_fn(dt).clamp(0, last)

    wanted = torch.arange(1, last + 1, device=device)
    low, high = torch.full_like(wanted, -1), torch.full_like(wanted, _LATEST)
    try:
        for _ in range(_LATEST.bit_length()):
            middle = low + (high - low) // 2
            reached = bucket(middle.clamp(min=0)) >= wanted
            low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
        steps = 1.1 ** torch.arange(400, device=device, dtype=torch.float64)
        times = torch.cat([high, high - 1, steps.long()])
        times = torch.cat([times, -times])
        agrees = torch.equal(bucket(times), torch.searchsorted(high, times.abs(), right=True))
    except Exception:  # whatever a function of theirs raises for times that it does not know
        return None
    return high if agrees else None


def _is_causal(mask: Tensor) -> bool:
    """Whether this mask, [N, N] of 0 and 1, shows each token itself and all before; looked at once."""
    if torch.compiler.is_compiling():
        return False
    version = None if mask.is_inference() else mask._version
    known = _CAUSAL.get(mask)
    if known is None or version is None or known[0] != version:
        size = mask.shape[-1]
        causal = torch.ones(size, size, dtype=mask.dtype, device=mask.device).tril()
        known = _CAUSAL[mask] = (version, torch.equal(mask, causal))
    return known[1]


STU_LAYER = Kind(
    "STULayer",
    "generative_recommenders.modules.stu",
    "STU layer",
    "_output_dropout_ratio",
    (
        *("_num_heads", "_embedding_dim", "_hidden_dim", "_attention_dim", "_target_aware", "_causal"),
        *("_max_attn_len", "_attn_alpha", "_use_group_norm", "_contextual_seq_len"),
        *("_uvqk_weight", "_uvqk_beta", "_input_norm_weight", "_input_norm_bias", "_output_weight"),
        *("_output_norm_weight", "_output_norm_bias"),
    ),
    {
        "input_norm_weight": "_input_norm_weight",
        "input_norm_bias": "_input_norm_bias",
        "uvqk_weight": "_uvqk_weight",
        "uvqk_bias": "_uvqk_beta",
        "output_norm_weight": "_output_norm_weight",
        "output_norm_bias": "_output_norm_bias",
        "output_weight": "_output_weight",
    },
    _stu_arguments,
    _why_not_stu,
)
TRANSDUCTION_UNIT = Kind(
    "SequentialTransductionUnitJagged",
    "generative_recommenders.research.modeling.sequential.hstu",
    "HSTU layer",
    "_dropout_ratio",
    (
        *("_embedding_dim", "_linear_dim", "_attention_dim", "_num_heads", "_rel_attn_bias"),
        *("_normalization", "_linear_config", "_linear_activation", "_concat_ua", "_eps", "_uvqk", "_o"),
    ),
    {
        "uvqk_weight": "_uvqk",
        "output_weight": "_o.weight^T",
        "output_bias": "_o.bias",
        "position_weight": "_rel_attn_bias._pos_w",
        "time_weight": "_rel_attn_bias._ts_w",
    },
    _unit_arguments,
    _why_not_unit,
)
KINDS = (STU_LAYER, TRANSDUCTION_UNIT)
