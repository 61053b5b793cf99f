"""HSTU attention that is wrong on purpose; the correctness suite must reject every one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from recsys_ops.hstu_attention import reference
from recsys_ops.testing import Mutant

Override = Callable[[Any], dict[str, Callable[..., Any]]]

FORWARD, BACKWARD = "hstu_attention_forward", "hstu_attention_backward"
BOTH = (FORWARD, BACKWARD)
BLOCK = 64


def _called(kernels: tuple[str, ...], body: Callable[[Callable[..., Any], SimpleNamespace], Any]) -> Override:
    """Replace kernels by ``body(right, arguments)``; ``right`` takes them back as keywords."""

    def override(right: Any) -> dict[str, Callable[..., Any]]:
        def wrong(kernel: str) -> Callable[..., Any]:
            signature = inspect.signature(getattr(reference, kernel))
            function = getattr(right, kernel)
            return lambda *args: body(function, SimpleNamespace(**signature.bind(*args).arguments))

        return {kernel: wrong(kernel) for kernel in kernels}

    return override


def _given(kernels: tuple[str, ...], **changes: Callable[[SimpleNamespace], Any]) -> Override:
    """Give the right kernels other arguments, computed from the right ones."""

    def body(right: Callable[..., Any], a: SimpleNamespace) -> Any:
        return right(**{**vars(a), **{name: change(a) for name, change in changes.items()}})

    return _called(kernels, body)


def _with(owner: Any, name: str, wrong: Any, kernels: tuple[str, ...] = BOTH) -> Override:
    """Run the right kernels with a part of the reference replaced."""

    def body(right: Callable[..., Any], a: SimpleNamespace) -> Any:
        with mock.patch.object(owner, name, wrong):
            return right(**vars(a))

    return _called(kernels, body)


def _returning(change: Callable[[Tensor, SimpleNamespace], Tensor]) -> Override:
    """Give back something else than the right forward does."""
    return _called((FORWARD,), lambda right, a: change(right(**vars(a)), a))


def _changing(change: Callable[[SimpleNamespace], None]) -> Override:
    """Spoil what the right backward has written."""

    def body(right: Callable[..., Any], a: SimpleNamespace) -> Any:
        result = right(**vars(a))
        change(a)
        return result

    return _called((BACKWARD,), body)


_weights = reference.Scores.rounded_weights.fget  # type: ignore[attr-defined]
_slope = reference.Scores.backward
_seen = reference.Mask.seen
_distances = reference.Bias.distances
_times = reference.Bias.times


def _half_of_scores(self: reference.Scores) -> Tensor:
    """SiLU replaced by x / 2."""
    return torch.where(self.seen, self.scores / 2 * self.factor, 0.0)


def _softmax_of_scores(self: reference.Scores) -> Tensor:
    return torch.softmax(torch.where(self.seen, self.scores, -torch.inf), 2).nan_to_num()


def _slope_of_sigmoid(self: reference.Scores, grad_weights: Tensor) -> Tensor:
    """The factor x * (1 - sigmoid) of SiLU's slope left out."""
    return torch.where(self.seen, grad_weights * self.factor * self.sigmoid, 0.0)


def _scaled_by(factor: Callable[[int], float]) -> Callable[[SimpleNamespace], float]:
    """Another scale, for the longest sequence N."""
    return lambda a: a.scale * factor(max(1, int(a.offsets.diff().max())) if len(a.offsets) > 1 else 1)


def _seeing(change: Callable[[Tensor, reference.Sequence], Tensor]) -> Override:
    def seen(self: reference.Mask, sequence: reference.Sequence, device: torch.device) -> Tensor:
        return change(_seen(self, sequence, device), sequence)

    return _with(reference.Mask, "seen", seen)


def _targets_see_targets(seen: Tensor, sequence: reference.Sequence) -> Tensor:
    positions = torch.arange(sequence.length, device=seen.device)
    is_target = positions >= sequence.length - sequence.targets
    rows = positions[sequence.row_positions]
    return seen | (is_target[rows, None] & is_target[None] & (rows[:, None] >= positions))


def _without_last_block(seen: Tensor, sequence: reference.Sequence) -> Tensor:
    """The keys of a last block that is not whole are skipped."""
    seen = seen.clone()
    if sequence.length % BLOCK:
        seen[:, sequence.length // BLOCK * BLOCK :] = False
    return seen


def _without_diagonal(seen: Tensor, sequence: reference.Sequence) -> Tensor:
    positions = torch.arange(sequence.length, device=seen.device)
    return seen & (positions[sequence.row_positions, None] != positions)


def _transposed_distances(self: reference.Bias, sequence: reference.Sequence, device: torch.device) -> Tensor:
    assert self.position_weight is not None
    return self.position_weight.shape[1] - 1 - _distances(self, sequence, device)


def _distances_among_targets(
    self: reference.Bias, sequence: reference.Sequence, device: torch.device
) -> Tensor:
    """Targets counted at their own positions."""
    return _distances(self, sequence._replace(targets=0), device)


def _next_bucket(self: reference.Bias, sequence: reference.Sequence) -> Tensor:
    assert self.time_weight is not None
    return (_times(self, sequence) + 1).clamp(max=self.time_weight.shape[1] - 1)


def _times_from_below(self: reference.Bias, sequence: reference.Sequence) -> Tensor:
    """A difference equal to a boundary falls below it."""
    assert self.boundaries is not None
    return _times(self._replace(boundaries=self.boundaries + 1), sequence)


def _times_of_rows(self: reference.Bias, sequence: reference.Sequence) -> Tensor:
    return _times(self._replace(next_timestamps=not self.next_timestamps), sequence)


def _round_per_block(a: SimpleNamespace) -> None:
    """dq summed in the type of q, rounded after each block of keys."""
    total = torch.zeros_like(a.grad_q)
    parts = reference.Mask.seen
    backward: Any = reference.hstu_attention_backward
    arguments = {name: value for name, value in vars(a).items() if name not in reference.MUTATES[BACKWARD]}
    longest = int(a.offsets.diff().max()) if len(a.offsets) > 1 else 0
    for first in range(0, longest, BLOCK):

        def of_block(
            self: reference.Mask, sequence: reference.Sequence, device: torch.device, first: int = first
        ) -> Tensor:
            seen = parts(self, sequence, device).clone()
            seen[:, :first] = False
            seen[:, first + BLOCK :] = False
            return seen

        grads = [torch.empty_like(t) for t in (a.grad_q, a.grad_k, a.grad_v)]
        with mock.patch.object(reference.Mask, "seen", of_block):
            backward(*grads, **arguments)
        half = torch.bfloat16 if a.grad_q.dtype == torch.float32 else a.grad_q.dtype
        total = (total + grads[0]).to(half).to(a.grad_q.dtype)
    a.grad_q.copy_(total)


def _neighbour_rows(a: SimpleNamespace) -> Tensor:
    return torch.roll(a.k, 1, 0)


def _packed(name: str) -> Callable[[SimpleNamespace], Tensor]:
    """Read as if its rows lay one after the other."""
    return lambda a: getattr(a, name).as_strided(
        getattr(a, name).shape, torch.empty(getattr(a, name).shape, device="meta").stride()
    )


def _write_into(name: str) -> Callable[[SimpleNamespace], None]:
    def change(a: SimpleNamespace) -> None:
        if getattr(a, name).numel():
            getattr(a, name).view(-1)[0] += 1

    return change


def _accumulates(right: Callable[..., Any], a: SimpleNamespace) -> Any:
    """Adds to what is in the gradients' memory."""
    before = [t.clone() for t in (a.grad_q, a.grad_k, a.grad_v)]
    result = right(**vars(a))
    for tensor, old in zip((a.grad_q, a.grad_k, a.grad_v), before, strict=True):
        tensor += old
    return result


def _past_the_end(output: Tensor, a: SimpleNamespace) -> Tensor:
    if output.numel():
        torch.as_strided(output, (1,), (1,), output.storage_offset() + output.numel()).fill_(0)
    return output


_runs = iter(range(10**9))


def _noisy(output: Tensor, a: SimpleNamespace) -> Tensor:
    """Different in every run."""
    return output * (1 + 2**-20 * (next(_runs) % 7)) if output.dtype == torch.float32 else output


def _reaching_all(output: Tensor, a: SimpleNamespace) -> Tensor:
    """The sum of all values, which is NaN where one is, times zero."""
    return output + 0 * a.v.sum()


def _unchecked(a: SimpleNamespace) -> Tensor | None:
    return None if a.num_targets is None else a.num_targets.clamp(min=0).minimum(a.offsets.diff())


def _mutant(name: str, override: Override, caught_by: str = "forward_backward") -> Mutant:
    return Mutant(name, caught_by, override)


def _gradient_of_table(right: Callable[..., Any], a: SimpleNamespace) -> Any:
    """Of per-head tables, heads confused."""
    position, time = right(**vars(a))
    return position.flip(0), time.flip(0)


def _scaled_bias(a: SimpleNamespace) -> Any:
    return None if a.position_weight is None else a.alpha * a.position_weight


MUTANTS = (
    _mutant("SiLU is x / 2", _with(reference.Scores, "rounded_weights", property(_half_of_scores))),
    _mutant("softmax", _with(reference.Scores, "rounded_weights", property(_softmax_of_scores))),
    _mutant(
        "slope of SiLU is its sigmoid", _with(reference.Scores, "backward", _slope_of_sigmoid, (BACKWARD,))
    ),
    _mutant("N + 1 in the place of N", _given(BOTH, scale=_scaled_by(lambda n: n / (n + 1)))),
    _mutant("1.1 N in the place of N", _given(BOTH, scale=_scaled_by(lambda n: 1 / 1.1))),
    _mutant("N + 1 in the backward", _given((BACKWARD,), scale=_scaled_by(lambda n: n / (n + 1)))),
    _mutant("row scales left out", _given(BOTH, row_scale=lambda a: None)),
    _mutant("targets see each other", _seeing(_targets_see_targets)),
    _mutant("window off by one", _given(BOTH, window=lambda a: a.window and a.window + 1)),
    _mutant("window off by one in the backward", _given((BACKWARD,), window=lambda a: max(0, a.window - 1))),
    _mutant("window left out", _given(BOTH, window=lambda a: 0)),
    _mutant(
        "tail off by one",
        _given(BOTH, full_window_tail=lambda a: a.full_window_tail and a.full_window_tail + 1),
    ),
    _mutant("groups of one target", _given(BOTH, target_group_size=lambda a: 1)),
    _mutant("prefix left out", _given(BOTH, num_contextual=lambda a: None)),
    _mutant("targets left out", _given(BOTH, num_targets=lambda a: None)),
    _mutant("intervals left out", _given(BOTH, intervals=lambda a: None)),
    _mutant(
        "only the first interval",
        _given(BOTH, intervals=lambda a: None if a.intervals is None else a.intervals[:, :1].contiguous()),
    ),
    _mutant("not causal", _given(BOTH, causal=lambda a: False)),
    _mutant("always causal", _given(BOTH, causal=lambda a: True)),
    _mutant("a row does not see itself", _seeing(_without_diagonal)),
    _mutant("last block skipped", _seeing(_without_last_block)),
    _mutant("row of a neighbour read", _given(BOTH, k=_neighbour_rows)),
    _mutant("bias transposed", _with(reference.Bias, "distances", _transposed_distances)),
    _mutant("bias times alpha", _given(BOTH, position_weight=_scaled_bias)),
    _mutant("distances among targets", _with(reference.Bias, "distances", _distances_among_targets)),
    _mutant("next bucket of time", _with(reference.Bias, "times", _next_bucket)),
    _mutant("boundaries of time off by one", _with(reference.Bias, "times", _times_from_below)),
    _mutant("timestamps of the wrong row", _with(reference.Bias, "times", _times_of_rows)),
    _mutant("gradients of heads' weights confused", _called((BACKWARD,), _gradient_of_table)),
    _mutant("dq rounded per block", _changing(_round_per_block)),
    _mutant("dk without alpha", _changing(lambda a: a.grad_k.div_(a.alpha))),
    _mutant("no dropout", _given(BOTH, dropout_seed=lambda a: None)),
    _mutant(
        "other dropout in the backward",
        _given((BACKWARD,), dropout_seed=lambda a: None if a.dropout_seed is None else a.dropout_seed + 1),
    ),
    _mutant("zeros", _returning(lambda output, a: torch.zeros_like(output))),
    _mutant("last row dropped", _returning(lambda output, a: torch.cat([output[:-1], output[-1:] * 0]))),
    _mutant("memory left as it was", _returning(lambda output, a: torch.empty_like(output))),
    _mutant("gradients added to memory", _called((BACKWARD,), _accumulates)),
    _mutant(
        "q changed",
        _called((FORWARD,), lambda right, a: (right(**vars(a)), _write_into("q")(a))[0]),
        "inputs_untouched",
    ),
    _mutant("written past the end", _returning(_past_the_end), "inputs_untouched"),
    _mutant("q taken as contiguous", _given((FORWARD,), q=_packed("q")), "strided"),
    _mutant("v taken as contiguous", _given((FORWARD,), v=_packed("v")), "strided"),
    _mutant(
        "gradient of the output taken as contiguous",
        _given((BACKWARD,), grad_output=_packed("grad_output")),
        "strided",
    ),
    _mutant("different in every run", _returning(_noisy), "determinism"),
    _mutant("a sequence reaches all others", _returning(_reaching_all), "isolation"),
    _mutant("gradient of k halved", _changing(lambda a: a.grad_k.mul_(0.5)), "gradcheck"),
    _mutant("targets not checked", _given((FORWARD,), num_targets=_unchecked), "bad_input"),
)
