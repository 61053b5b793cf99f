"""Purchases for the demo: the data set that ships with the package, or the user's own CSV file."""

from __future__ import annotations

import csv
import functools
import gzip
import importlib.resources
import math
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

MIN_HISTORY = 3  # purchases of a customer whose last one is held out: one to know, one to train on
MIN_USERS = 20
_MILLISECONDS_FROM = 1e11  # an epoch above this, year 5138 in seconds, counts milliseconds


class DataError(ValueError):
    """An interactions file that cannot be used; the message names the file, the line and what is wrong."""


@dataclass(frozen=True)
class Interactions:
    """N purchases in order of customer, then time, then place in the file.

    A basket is what one customer bought at one time.
    """

    name: str
    user_names: np.ndarray  # [U] str
    item_names: np.ndarray  # [I] str
    user: np.ndarray  # [N] int64, ascending
    item: np.ndarray  # [N] int64
    quantity: np.ndarray  # [N] float32, positive
    time: np.ndarray  # [N] float64, seconds since 1970
    left_out: dict[str, int] = field(default_factory=dict)  # lines of the file not used, by reason

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where each customer's purchases start, and N: int64 [U + 1]."""
        return np.searchsorted(self.user, np.arange(len(self.user_names) + 1))

    @functools.cached_property
    def basket_starts(self) -> np.ndarray:
        """Where the basket of each purchase starts: int64 [N]."""
        new = np.ones(len(self.item), bool)
        new[1:] = (self.user[1:] != self.user[:-1]) | (self.time[1:] != self.time[:-1])
        return np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))


def load_online_retail() -> Interactions:
    """The UCI "Online Retail" purchases that ship with the package.

    Example:
        >>> data = load_online_retail()
        >>> len(data.item), len(data.user_names), len(data.item_names)
        (397924, 4339, 3665)
    """
    resource = importlib.resources.files("recsys_ops.demo") / "online_retail.npz"
    with resource.open("rb") as file, np.load(file) as arrays:
        return Interactions(
            "Online Retail (UCI, Daqing Chen, 2015; CC BY 4.0)",
            arrays["customers"].astype(str),
            arrays["stock_codes"].astype(str),
            np.repeat(np.arange(len(arrays["lines"])), arrays["lines"]),
            arrays["item"].astype(np.int64),
            arrays["quantity"].astype(np.float32),
            arrays["minute"] * 60.0,
        )


def load_csv(path: Path, user: str, item: str, time: str, quantity: str | None = None) -> Interactions:
    """Read purchases from a CSV file, plain or gzip, UTF-8, with a header.

    Lines without a customer or an item, and quantities of zero or less (returns), are
    left out and counted in ``left_out``.

    Args:
        path: fields separated by comma, semicolon, tab or bar.
        user, item, time, quantity: names of columns. Times are ISO dates, with or without
            a time of day (UTC unless they say otherwise), or seconds or milliseconds since
            1970, the same way in the whole file. Without quantities each counts 1.

    Raises:
        DataError: for anything wrong with the file, naming the line.
    """
    wanted = {"user": user, "item": item, "time": time}
    if quantity is not None:
        wanted["quantity"] = quantity
    if len(set(wanted.values())) < len(wanted):
        raise DataError(f"demo: expected a different column for each of {', '.join(wanted)}, got {wanted}")

    lines = _decoded_lines(path)
    header_line = next(lines, None)
    if header_line is None:
        raise DataError(f"demo: {path} is empty, expected a CSV file with a header")
    delimiter = max(",;\t|", key=header_line.count)
    header = [name.strip() for name in next(csv.reader([header_line], delimiter=delimiter), [])]
    columns = [_column(path, header, option, name) for option, name in wanted.items()]

    user_codes: dict[str, int] = {}
    item_codes: dict[str, int] = {}
    users, items, times, quantities = array("q"), array("q"), array("d"), array("d")
    epoch: bool | None = None  # how the first line gives its time
    left_out = {"without a customer": 0, "without an item": 0, "with a quantity of zero or less": 0}
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"expected {len(header)} fields as in the header, got {len(row)}")
            user_name, item_name, when, *rest = (row[column] for column in columns)
            if epoch is None:
                epoch = _is_number(when)
            seconds = _seconds(when, epoch, time)
            amount = _quantity(rest[0], quantity) if quantity is not None else 1.0
            if not user_name:
                left_out["without a customer"] += 1
            elif not item_name:
                left_out["without an item"] += 1
            elif amount <= 0:
                left_out["with a quantity of zero or less"] += 1
            else:
                users.append(user_codes.setdefault(user_name, len(user_codes)))
                items.append(item_codes.setdefault(item_name, len(item_codes)))
                times.append(seconds)
                quantities.append(amount)
    except (csv.Error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"demo: {path}, line {reader.line_num + 1}: {error}") from None
    if not users:
        raise DataError(f"demo: {path} has no purchases below its header{_listing(left_out)}")

    order = np.lexsort((np.array(times), np.array(users)))  # stable: ties keep the file's order
    return Interactions(
        path.name,
        np.array(list(user_codes)),
        np.array(list(item_codes)),
        np.array(users)[order],
        np.array(items)[order],
        np.array(quantities, np.float32)[order],
        np.array(times)[order],
        {reason: count for reason, count in left_out.items() if count},
    )


def check_enough(data: Interactions) -> None:
    """Raise DataError unless enough customers bought often enough to hold a purchase out."""
    enough = int((np.diff(data.starts) >= MIN_HISTORY).sum())
    if enough < MIN_USERS:
        raise DataError(
            f"demo: {data.name}: expected at least {MIN_USERS} customers with {MIN_HISTORY} purchases or "
            f"more, so that the last can be held out, got {enough} of {len(data.user_names)} customers"
            f"{_listing(data.left_out)}"
        )
    if len(data.item_names) < 20:
        raise DataError(
            f"demo: {data.name}: expected at least 20 items to rank the ten best, got {len(data.item_names)}"
        )


def keep_most_frequent(data: Interactions, max_items: int) -> Interactions:
    """The purchases of the ``max_items`` most frequent items (all, where there are no more)."""
    if len(data.item_names) <= max_items:
        return data
    counts = np.bincount(data.item, minlength=len(data.item_names))
    kept_items = np.sort(np.argsort(-counts, kind="stable")[:max_items])
    kept = np.isin(data.item, kept_items)
    kept_users, user = np.unique(data.user[kept], return_inverse=True)
    reason = f"of items other than the {max_items:,} most frequent"
    return Interactions(
        data.name,
        data.user_names[kept_users],
        data.item_names[kept_items],
        user,
        np.searchsorted(kept_items, data.item[kept]),
        data.quantity[kept],
        data.time[kept],
        data.left_out | {reason: int((~kept).sum())},
    )


def _decoded_lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as plain:
            compressed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if compressed else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"demo: {path}, line {number}: expected UTF-8 text, "
                        f"got byte 0x{line[error.start]:02x} at column {error.start + 1}"
                    ) from None
    except FileNotFoundError:
        raise DataError(f"demo: {path} does not exist") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"demo: {path} is a damaged gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"demo: {path} cannot be read: {error.strerror or error}") from None


def _column(path: Path, header: list[str], option: str, name: str) -> int:
    if header.count(name) == 1:
        return header.index(name)
    columns = f"its columns are {', '.join(map(repr, header))}"
    if name in header:
        raise DataError(f"demo: {path} has {header.count(name)} columns named {name!r}; {columns}")
    hint = "; the first line looks like data, a header is needed" if any(map(_is_number, header)) else ""
    raise DataError(f"demo: {path} has no column {name!r} for --{option}; {columns}{hint}")


def _seconds(text: str, epoch: bool, column: str) -> float:
    """Seconds since 1970."""
    try:
        if epoch:
            value = _finite(text)
            return value / 1000 if abs(value) > _MILLISECONDS_FROM else value
        text = text.strip()
        moment = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith(("Z", "z")) else text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except ValueError:
        expected = "seconds since 1970 as in the first line" if epoch else "an ISO date or time"
        raise ValueError(f"expected {expected} in column {column!r}, got {text!r}") from None


def _quantity(text: str, column: str) -> float:
    try:
        return _finite(text)
    except ValueError:
        raise ValueError(f"expected a number in column {column!r}, got {text!r}") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _listing(left_out: dict[str, int]) -> str:
    used = [f"{count:,} {reason}" for reason, count in left_out.items() if count]
    return f" (left out: {', '.join(used)})" if used else ""
