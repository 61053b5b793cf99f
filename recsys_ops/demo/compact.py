"""Makes the compact copy of the UCI "Online Retail" data set that ships with the package.

    python -m recsys_ops.demo.compact online_retail.csv.gz recsys_ops/demo/online_retail.npz

The CSV file has the columns InvoiceNo, StockCode, Quantity, InvoiceDate (ISO),
UnitPrice, CustomerID and Country of the original. Kept are the lines that have a customer
and a positive quantity, which leaves the cancellations out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from recsys_ops.demo.data import load_csv


def compact(source: Path, target: Path) -> None:
    """Write the compact copy of ``source``.

    Raises:
        DataError: the source cannot be read.
    """
    data = load_csv(source, "CustomerID", "StockCode", "InvoiceDate", "Quantity")
    np.savez_compressed(
        target,
        customers=data.user_names.astype(bytes),
        stock_codes=data.item_names.astype(bytes),
        lines=np.diff(data.starts).astype(np.int32),  # of each customer
        item=data.item.astype(np.uint16),
        quantity=data.quantity.astype(np.int32),
        minute=(data.time // 60).astype(np.int32),  # since 1970, as if the shop's clock were UTC
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    compact(Path(sys.argv[1]), Path(sys.argv[2]))
