"""Pooling's gradients, the optimizers and stochastic rounding once more: loops and fp64, from the papers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
HALVES = {"float16": (10, -24), "bfloat16": (7, -133)}  # bits of the mantissa, exponent of the least number


@dataclass(frozen=True)
class Settings:
    """Of an optimizer."""

    lr: float = 0.25
    eps: float = 2**-7
    beta1: float = 0.75
    beta2: float = 0.875
    weight_decay: float = 0.0
    decoupled_weight_decay: float = 0.0
    max_gradient: float = math.inf
    max_gradient_norm: float = math.inf


@dataclass
class Bags:
    """What was looked up: lists of row numbers and of factors, for each feature and each of its samples."""

    ids: list[list[list[int]]]
    factors: list[list[list[float]]]
    features: Sequence[Sequence[int]]
    pooling: Sequence[str]
    lookups: list[tuple[int, int]] = field(init=False)  # table and feature

    def __post_init__(self) -> None:
        self.lookups = [(table, f) for table, features in enumerate(self.features) for f in features]


def gradients(bags: Bags, tables: Sequence[Array], upstream: Sequence[Array]) -> list[dict[int, Array]]:
    """Of each table the gradient of every row that was looked up, given that of each lookup's output."""
    result: list[dict[int, Array]] = [{} for _ in tables]
    for (table, feature), gradient in zip(bags.lookups, upstream, strict=True):
        rows, dim = tables[table].shape
        for sample, ids in enumerate(bags.ids[feature]):
            live = [(i, w) for i, w in zip(ids, bags.factors[feature][sample], strict=True) if 0 <= i < rows]
            for i, _ in live:
                result[table].setdefault(i, np.zeros(dim))
            if bags.pooling[table] == "max" and live:
                for column in range(dim):
                    highest = max(tables[table][i, column] for i, _ in live)
                    winner = next(i for i, _ in live if tables[table][i, column] == highest)
                    result[table][winner][column] += gradient[sample, column]
                continue
            for i, factor in live:
                share = factor / len(live) if bags.pooling[table] == "mean" else factor
                result[table][i] += share * gradient[sample]
    return result


def update(
    optimizer: str, weight: Array, states: Sequence[Array], touched: dict[int, Array], s: Settings, step: int
) -> None:
    """One step of the touched rows, in place."""
    for row, gradient in touched.items():
        _update_row(optimizer, weight, states, row, gradient, s, step)


def _update_row(
    optimizer: str,
    weight: Array,
    states: Sequence[Array],
    row: int,
    gradient: Array,
    s: Settings,
    step: int,
) -> None:
    w = weight[row].copy()
    g = np.array([min(max(x, -s.max_gradient), s.max_gradient) for x in gradient])
    norm = math.sqrt(sum(x * x for x in g))
    if norm > s.max_gradient_norm:
        g = g / norm * s.max_gradient_norm
    g = g + s.weight_decay * w
    if optimizer == "sgd":
        direction = g
    elif optimizer == "adagrad":
        states[0][row] += g**2
        direction = g / (np.sqrt(states[0][row]) + s.eps)
    elif optimizer == "rowwise_adagrad":
        states[0][row] += np.mean(g**2)
        direction = g / (math.sqrt(states[0][row]) + s.eps)
    else:
        first, second = states
        first[row] = s.beta1 * first[row] + (1 - s.beta1) * g
        square = np.mean(g**2) if optimizer == "partial_rowwise_adam" else g**2
        second[row] = s.beta2 * second[row] + (1 - s.beta2) * square
        first_hat, second_hat = first[row] / (1 - s.beta1**step), second[row] / (1 - s.beta2**step)
        direction = first_hat / (np.sqrt(second_hat) + s.eps)
    direction = direction + s.decoupled_weight_decay * w
    rate = s.lr
    if optimizer == "lamb":
        of_weight, of_direction = np.linalg.norm(w), np.linalg.norm(direction)
        if of_weight > 0 and of_direction > 0:
            rate *= of_weight / of_direction
    weight[row] = w - rate * direction


def rounded_at_random(x: float, half: str, seed: int, step: int, tensor: int, row: int, column: int) -> float:
    """A number as a half keeps it."""
    if x == 0:
        return x
    mantissa, least = HALVES[half]
    unit = math.ldexp(1.0, max(math.frexp(x)[1] - 1 - mantissa, least))
    bits = _random_bits(seed, step, tensor, row, column)
    return round(x / unit + (bits - 2047.5) / 4096) * unit


def _random_bits(seed: int, step: int, tensor: int, row: int, column: int) -> int:
    key = 0
    for number in (seed, step, tensor, row // 2**32, row):
        key = _murmur3_finaliser(key + number)
    return _murmur3_finaliser(key + column * 0x9E3779B9) >> 20


def _murmur3_finaliser(h: int) -> int:
    """``fmix32`` of https://github.com/aappleby/smhasher/blob/master/src/MurmurHash3.cpp."""
    h &= 0xFFFFFFFF
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    h ^= h >> 16
    return h
