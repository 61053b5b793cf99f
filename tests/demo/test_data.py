"""Reading purchases: what is understood, and the message for every way a file can be wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from recsys_ops.demo.compact import compact
from recsys_ops.demo.data import (
    DataError,
    Interactions,
    check_enough,
    keep_most_frequent,
    load_csv,
    load_online_retail,
)

GOOD = (
    "user,item,time,amount\nb,x,2024-01-02,1\na,y,2024-01-03,2\na,x,2024-01-01T10:00,3\na,z,2024-01-03,0.5\n"
)
GZIPPED = gzip.compress(GOOD.encode(), mtime=0)  # without the time, which would differ between processes


def write(folder: Path, content: str | bytes, name: str = "file.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(path: Path, quantity: str | None = "amount") -> Interactions:
    return load_csv(path, "user", "item", "time", quantity)


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GZIPPED,
        GOOD.replace(",", ";"),
        GOOD.replace(",", "\t"),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\n\n"),
        "\ufeff" + GOOD,
        GOOD.replace("2024-01-03", "2024-01-03T00:00:00Z"),
        GOOD.replace("2024-01-03", "2024-01-03 02:00+02:00"),
        GOOD.replace(",x,", ',"x",'),
    ],
)
def test_reads_purchases_in_order_of_customer_and_time(tmp_path: Path, content: str | bytes) -> None:
    data = load(write(tmp_path, content))
    assert data.user_names.tolist() == ["b", "a"]
    assert [data.item_names[i] for i in data.item] == ["x", "x", "y", "z"]  # ties keep the file's order
    assert data.user.tolist() == [0, 1, 1, 1]
    assert data.quantity.tolist() == [1, 3, 2, 0.5]
    assert data.time.tolist() == [1704153600, 1704103200, 1704240000, 1704240000]
    assert data.starts.tolist() == [0, 1, 4]
    assert data.basket_starts.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize(("time", "seconds"), [("1704153600", 1704153600), ("1704153600250", 1704153600.25)])
def test_times_may_be_seconds_or_milliseconds(tmp_path: Path, time: str, seconds: float) -> None:
    data = load(write(tmp_path, f"user,item,time\na,x,{time}\n"), quantity=None)
    assert data.time.tolist() == [seconds]
    assert data.quantity.tolist() == [1]


def test_leaves_out_and_counts_lines_that_are_no_purchases(tmp_path: Path) -> None:
    lines = ",x,2024-01-02,1\na,,2024-01-02,1\na,x,2024-01-02,0\na,x,2024-01-02,-3\n"
    data = load(write(tmp_path, GOOD + lines))
    assert len(data.item) == 4
    assert data.left_out == {
        "without a customer": 1,
        "without an item": 1,
        "with a quantity of zero or less": 2,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty, expected a CSV file with a header"),
        ("user,item,time,amount\n", "has no purchases below its header"),
        ("user,item,time,amount\n,x,2024-01-01,1\n", "has no purchases .* 1 without a customer"),
        (GOOD.replace("time", "when"), "no column 'time' for --time; its columns are 'user', 'item', 'when'"),
        (GOOD.split("\n", 1)[1], "no column 'user' .*'b', 'x'.* looks like data, a header is needed"),
        (GOOD.replace("item", "user"), "has 2 columns named 'user'"),
        (GOOD + "a,x,soon,1\n", "line 6: expected an ISO date or time in column 'time', got 'soon'"),
        (GOOD + "a,x,,1\n", "line 6: expected an ISO date or time in column 'time', got ''"),
        (GOOD + "a,x,1704153600,1\n", "line 6: expected an ISO date or time .* got '1704153600'"),
        (
            "user,item,time,amount\na,x,1,1\na,x,2024-01-01,1\n",
            "line 3: expected seconds since 1970 as in the first line in column 'time', got '2024-01-01'",
        ),
        ("user,item,time,amount\na,x,nan,1\n", "line 2: expected seconds since 1970 .* got 'nan'"),
        (GOOD + "a,x,2024-01-01,two\n", "line 6: expected a number in column 'amount', got 'two'"),
        (GOOD + "a,x,2024-01-01,inf\n", "line 6: expected a number in column 'amount', got 'inf'"),
        (GOOD + "a,x,2024-01-01\n", "line 6: expected 4 fields as in the header, got 3"),
        (GOOD + "a,x,2024-01-01,1,1\n", "line 6: expected 4 fields as in the header, got 5"),
        (GOOD + "a,x\0,2024-01-01,one\n", "line 6: .*(NUL|expected a number)"),
        (GOOD.encode() + b"a,\xff,2024-01-01,1\n", "line 6: expected UTF-8 text, got byte 0xff at column 3"),
        (GOOD.encode("utf-16"), "line 1: expected UTF-8 text"),
        (GZIPPED[:-12], "damaged gzip file"),
        (GOOD + 'a,"' + "x" * 200_000 + '",2024-01-01,1\n', "line 6: field larger than field limit"),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_says_that_a_file_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.csv does not exist"):
        load(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_wants_a_column_for_each_role(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a different column for each of user, item, time"):
        load_csv(write(tmp_path, GOOD), "user", "user", "time")


def test_wants_enough_customers_and_items(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"at least 20 customers with 3 purchases or more.* got 1 of 2 customers"
    ):
        check_enough(load(write(tmp_path, GOOD)))
    same_items = "".join(f"{user},{item},{item}\n" for user in range(30) for item in range(5))
    with pytest.raises(DataError, match=r"at least 20 items .* got 5"):
        check_enough(load(write(tmp_path, "user,item,time\n" + same_items), quantity=None))


def test_keeps_the_most_frequent_items(tmp_path: Path) -> None:
    data = load(write(tmp_path, GOOD + "c,y,2024-01-01,7\n"))
    kept = keep_most_frequent(data, 1)
    assert kept.item_names.tolist() == ["x"]  # as frequent as y, and earlier
    assert kept.user_names.tolist() == ["b", "a"]
    assert (kept.user.tolist(), kept.item.tolist(), kept.quantity.tolist()) == ([0, 1], [0, 0], [1, 3])
    assert kept.left_out == {"of items other than the 1 most frequent": 3}
    assert keep_most_frequent(data, 3) is data


def test_compact_copy_holds_what_the_csv_file_holds(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        "InvoiceNo,StockCode,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
        "536365,85123A,6,2010-12-01T08:26,2.55,17850,United Kingdom\n"
        "536365,71053,80995,2010-12-01T08:26,3.39,17850,United Kingdom\n"
        "C536366,71053,-6,2010-12-01T08:28,3.39,17850,United Kingdom\n"
        "536367,22423,6,2010-12-01T08:28,1.85,,United Kingdom\n",
    )
    compact(source, tmp_path / "compact.npz")
    with np.load(tmp_path / "compact.npz") as arrays, np.load(_shipped()) as shipped:
        assert {name: array.dtype.kind for name, array in arrays.items()} == {
            name: array.dtype.kind for name, array in shipped.items()
        }
        assert arrays["stock_codes"].tolist() == [b"85123A", b"71053"]
        assert arrays["quantity"].tolist() == [6, 80995]
        assert arrays["lines"].tolist() == [2]
        assert arrays["minute"].tolist() == [21519866, 21519866]


def test_shipped_copy_is_in_order() -> None:
    data = load_online_retail()
    assert (np.diff(data.user) >= 0).all()
    assert (np.diff(data.time)[np.diff(data.user) == 0] >= 0).all()
    assert data.quantity.min() > 0
    assert data.item_names[data.item[0]] == "85123A"
    assert (_shipped().parent / "online_retail.LICENSE.txt").is_file()


def _shipped() -> Path:
    import recsys_ops.demo

    return Path(recsys_ops.demo.__file__).parent / "online_retail.npz"
