"""What users say of an optimizer, and its state beside the tables that it updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from recsys_ops._extension import empty_table
from recsys_ops.embedding_bag_collection import row_optimizers
from recsys_ops.embedding_bag_collection.autograd import FusedUpdate
from recsys_ops.embedding_bag_collection.row_optimizers import STATES

_STATE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class RowOptimizer:
    """What the optimizers have in common; each touched row is updated once a step, the others never.

    Args:
        lr: the learning rate. Schedulers of ``torch.optim.lr_scheduler`` may change it later,
            through ``EmbeddingBagCollection.fused_optimizer``.
        weight_decay: its factor, of rows that are touched.
        weight_decay_mode: ``"l2"`` adds it to the gradient, ``"decoupled"`` to the step (AdamW).
        max_gradient: clamps each element of a row's gradient to [-max_gradient, max_gradient].
        max_gradient_norm: scales a row's gradient down to this norm.
        stochastic_rounding: round half-precision tables and states up or down at random, so that
            small steps count on average; reproducible by ``seed``. Else to nearest.
        state_dtype: of the state, fp32 or bf16. For fp64 tables it is fp64.
        seed: of the stochastic rounding.

    Raises:
        ValueError: a number is out of its range.
    """

    lr: float = 0.01
    weight_decay: float = 0.0
    weight_decay_mode: str = "l2"
    max_gradient: float | None = None
    max_gradient_norm: float | None = None
    stochastic_rounding: bool = True
    state_dtype: torch.dtype = torch.float32
    seed: int = 0

    kind: ClassVar[int]

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            self._expect(getattr(self, name) >= 0, name, "at least 0")
        for name in ("max_gradient", "max_gradient_norm"):
            value = getattr(self, name)
            self._expect(value is None or value > 0, name, "above 0, or None")
        self._expect(
            self.weight_decay_mode in ("l2", "decoupled"), "weight_decay_mode", "'l2' or 'decoupled'"
        )
        self._expect(self.state_dtype in _STATE_DTYPES, "state_dtype", "torch.float32 or torch.bfloat16")
        self._expect(0 <= self.seed < 2**32, "seed", "in [0, 2**32)")

    def _expect(self, condition: bool, name: str, wanted: str) -> None:
        if not condition:
            got = getattr(self, name)
            raise ValueError(f"{type(self).__name__}: expected {name} {wanted}, got {got!r}")

    @property
    def defaults(self) -> dict[str, Any]:
        """The numbers of a parameter group."""
        decoupled = self.weight_decay_mode == "decoupled"
        return {
            "lr": self.lr,
            "eps": 0.0,
            "betas": (0.0, 0.0),
            "weight_decay": 0.0 if decoupled else self.weight_decay,
            "decoupled_weight_decay": self.weight_decay if decoupled else 0.0,
            "max_gradient": math.inf if self.max_gradient is None else self.max_gradient,
            "max_gradient_norm": math.inf if self.max_gradient_norm is None else self.max_gradient_norm,
        }


@dataclass(frozen=True, kw_only=True)
class SGD(RowOptimizer):
    """w -= lr * g. Arguments: those of ``RowOptimizer``.

    Example:
        >>> import recsys_ops
        >>> recsys_ops.optim.SGD(lr=0.1).lr
        0.1
    """

    kind = row_optimizers.SGD


@dataclass(frozen=True, kw_only=True)
class _WithEps(RowOptimizer):
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect(self.eps >= 0, "eps", "at least 0")

    @property
    def defaults(self) -> dict[str, Any]:
        return {**super().defaults, "eps": self.eps}


@dataclass(frozen=True, kw_only=True)
class Adagrad(_WithEps):
    """s += g^2; w -= lr * g / (sqrt(s) + eps). Arguments: those of ``RowOptimizer``, and eps.

    Example:
        >>> import recsys_ops
        >>> recsys_ops.optim.Adagrad(lr=0.1, weight_decay=1e-4).eps
        1e-08
    """

    kind = row_optimizers.ADAGRAD


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad(_WithEps):
    """Adagrad with one number for each row: s += mean(g^2). Arguments: those of ``Adagrad``.

    Example:
        >>> import recsys_ops
        >>> recsys_ops.optim.RowWiseAdagrad(lr=0.1).state_dtype
        torch.float32
    """

    kind = row_optimizers.ROWWISE_ADAGRAD


@dataclass(frozen=True, kw_only=True)
class _WithMoments(_WithEps):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two in [0, 1)")

    @property
    def defaults(self) -> dict[str, Any]:
        return {**super().defaults, "betas": self.betas}


@dataclass(frozen=True, kw_only=True)
class Adam(_WithMoments):
    """Adam, arXiv 1412.6980, with ``weight_decay_mode="decoupled"`` AdamW. Bias correction counts steps.

    Arguments: those of ``RowOptimizer``, eps and betas.

    Example:
        >>> import recsys_ops
        >>> recsys_ops.optim.Adam(weight_decay=0.01, weight_decay_mode="decoupled").betas
        (0.9, 0.999)
    """

    kind = row_optimizers.ADAM


@dataclass(frozen=True, kw_only=True)
class PartialRowWiseAdam(_WithMoments):
    """Adam whose second moment is one number for each row, of mean(g^2). Arguments: those of ``Adam``.

    Example:
        >>> import recsys_ops
        >>> recsys_ops.optim.PartialRowWiseAdam().lr
        0.001
    """

    kind = row_optimizers.PARTIAL_ROWWISE_ADAM


@dataclass(frozen=True, kw_only=True)
class LAMB(_WithMoments):
    """LAMB, arXiv 1904.00962, each row a layer of its own. Arguments: those of ``Adam``.

    Example:
        >>> import recsys_ops
        >>> recsys_ops.optim.LAMB(max_gradient_norm=1.0).max_gradient_norm
        1.0
    """

    kind = row_optimizers.LAMB


class FusedOptimizer(torch.optim.Optimizer):
    """The optimizer that a collection applies in its backward, as PyTorch knows optimizers.

    It has one parameter group with the tables; what it holds ("lr", "weight_decay", ...) may be changed
    between steps, by a learning-rate scheduler for one. ``step`` and ``zero_grad`` do nothing: the
    backward has done it. ``state_dict`` and ``load_state_dict`` keep and restore the state to the bit.

    Args:
        config: the optimizer.
        weights: the tables, in the order of the collection.

    Example:
        >>> import torch, recsys_ops
        >>> table = recsys_ops.nn.TableConfig("t", num_embeddings=4, embedding_dim=2)
        >>> ebc = recsys_ops.nn.EmbeddingBagCollection([table], recsys_ops.optim.SGD(lr=1.0))
        >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(ebc.fused_optimizer, gamma=0.5)
        >>> ebc(torch.tensor([0, 1]), torch.tensor([0, 2])).sum().backward()
        >>> ebc.fused_optimizer.step(); scheduler.step()
        >>> ebc.fused_optimizer.param_groups[0]["lr"]
        0.5
    """

    def __init__(self, config: RowOptimizer, weights: Sequence[torch.nn.Parameter]) -> None:
        self.config = config
        self.count = torch.zeros((), dtype=torch.int64)  # of updates
        super().__init__(list(weights), config.defaults)
        self.reset_state()

    def __getstate__(self) -> dict[str, Any]:
        # torch.optim.Optimizer copies and pickles nothing but its own attributes.
        return {**super().__getstate__(), "config": self.config, "count": self.count}

    def reset_state(self) -> None:
        """Zero all state and the count of updates."""
        self.count.zero_()
        for weight in self.weights:
            dtype = torch.float64 if weight.dtype == torch.float64 else self.config.state_dtype
            self.state[weight] = {"step": self.count} | {
                name: empty_table(
                    *(weight.shape[:1] if rowwise else weight.shape), dtype=dtype, device=weight.device
                ).zero_()
                for name, rowwise in STATES[self.config.kind].items()
            }

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """The tables."""
        found: list[torch.nn.Parameter] = self.param_groups[0]["params"]
        return found

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Nothing: the backward has made the step. A closure is called all the same."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: tables have no gradients."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore state and numbers. Raises ValueError, and changes nothing, for those of other tables."""
        saved, groups = state_dict["state"], state_dict["param_groups"]
        if len(groups) != 1 or sorted(saved) != list(range(len(self.weights))):
            expected = f"expected the state of {len(self.weights)} tables, got {len(saved)}"
            raise ValueError(f"FusedOptimizer.load_state_dict: {expected}")
        pairs = []
        for number, weight in enumerate(self.weights):
            own = self.state[weight]
            shapes = {name: tuple(value.shape) for name, value in own.items()}
            got = {name: tuple(value.shape) for name, value in saved[number].items()}
            if got != shapes:
                raise ValueError(
                    f"FusedOptimizer.load_state_dict: expected state {shapes} of table {number}, got {got}"
                )
            pairs += [(own[name], saved[number][name]) for name in own]
        for own, value in pairs:
            own.copy_(value)
        group = self.param_groups[0]
        group.update({name: value for name, value in groups[0].items() if name != "params"})

    def rebind(self, weights: Sequence[torch.nn.Parameter], move: Callable[[Tensor], Tensor]) -> None:
        """Follow tables that have been moved: ``move`` is applied to the state, which keeps its dtype."""
        states = [self.state[weight] for weight in self.weights]
        self.state.clear()
        self.param_groups[0]["params"] = list(weights)
        for weight, state in zip(weights, states, strict=True):
            self.state[weight] = {
                name: value if name == "step" else move(value).to(value.dtype)
                for name, value in state.items()
            }

    def update(self) -> FusedUpdate:
        """What the next backward is told."""
        group = self.param_groups[0]
        numbers = {**group, "beta1": group["betas"][0], "beta2": group["betas"][1]}
        return FusedUpdate(
            [self.state[w][name] for w in self.weights for name in STATES[self.config.kind]],
            self.count,
            self.config.kind,
            torch.tensor(
                [float(numbers[name]) for name in row_optimizers.HYPERPARAMETERS], dtype=torch.float64
            ),
            self.config.seed,
            self.config.stochastic_rounding,
        )
