"""Calls of the embedding bag collection that must be refused, and what the message must say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_ops.testing import BadInput, Inputs


def bad_inputs(case: Any) -> tuple[BadInput, ...]:
    """Of the class of cases."""

    def bad(
        name: str,
        message: str,
        error: type[Exception] = ValueError,
        fields: dict[str, Any] | None = None,
        **changed: Any,
    ) -> BadInput:
        """Two features of two bags, [1, 2], [3], [0] and [1, 0], looked up in tables [5, 3] and [4, 2].

        But for what is changed in the case or in the arguments; a callable draws its value.
        """

        def build(draw: Inputs) -> dict[str, Any]:
            arguments: dict[str, Any] = {
                "case": case(**{"rows": (5, 4), "dims": (3, 2), "batch": 2, **(fields or {})}),
                "values": _integers(1, 2, 3, 0, 1, 0).to(draw.device),
                "offsets": _integers(0, 2, 3, 4, 6).to(draw.device),
                "weight_0": draw.normal(5, 3),
                "weight_1": draw.normal(4, 2),
            }
            for argument, value in changed.items():
                value = value(draw) if callable(value) else value
                arguments[argument] = value.to(draw.device) if isinstance(value, Tensor) else value
            return arguments

        return BadInput(name, build, error, message)

    def refused_values(kernel: str, fields: dict[str, Any], **changed: Any) -> list[BadInput]:
        """What only the values show, refused by this kernel."""
        described: list[tuple[str, str, dict[str, tuple[int, ...]]]] = [
            (
                "negative id",
                r"values in \[0, 5\) for table 0, got values\[2\] = -1",
                {"values": (1, 2, -1, 0, 1, 0)},
            ),
            (
                "id past the second table",
                r"\[0, 4\) for table 1, got values\[3\] = 4",
                {"values": (1, 4, 3, 4, 1, 0)},
            ),
            ("offsets that start late", r"offsets\[0\] = 0, got 1", {"offsets": (1, 2, 3, 4, 6)}),
            (
                "offsets that decrease",
                r"never decrease, got offsets\[3\] = 4, offsets\[4\] = 3",
                {"offsets": (0, 2, 3, 4, 3)},
            ),
            (
                "offsets past the end",
                r"within the 6 values, got offsets\[4\] = 7",
                {"offsets": (0, 2, 3, 4, 7)},
            ),
        ]
        return [
            bad(f"{name}, {kernel}", message, RuntimeError, fields, **changed, **_tensors(values))
            for name, message, values in described
        ]

    half = torch.bfloat16
    return (
        bad("no tables", "one table or more, got none", fields={"rows": (), "dims": ()}),
        bad(
            "table of one dimension",
            r"weights\[1\] of shape \[R, D\], got \[5\]",
            weight_1=lambda d: d.normal(5),
        ),
        bad("scalar table", r"weights\[0\] of shape \[R, D\], got \[\]", weight_0=lambda d: d.normal()),
        bad(
            "table of integers",
            r"weights\[1\] of dtype .*, got int64",
            TypeError,
            weight_1=_integers(1, 2).view(1, 2),
        ),
        bad(
            "one table of fp64",
            r"all weights or none to be float64, got weights\[0\] of float32 and weights\[1\] of float64",
            TypeError,
            weight_1=torch.ones(4, 2).double(),
        ),
        bad(
            "values of floats", "values of dtype int64 or int32, got float32", TypeError, values=torch.ones(6)
        ),
        bad(
            "values of two dimensions", r"values of shape \[N\], got \[2, 3\]", values=torch.ones(2, 3).long()
        ),
        bad(
            "offsets of floats",
            "offsets of dtype int64 or int32, got float32",
            TypeError,
            offsets=torch.ones(5),
        ),
        bad(
            "offsets of two dimensions",
            r"offsets of shape \[G \+ 1\], got \[1, 5\]",
            offsets=torch.zeros(1, 5).long(),
        ),
        bad("no offsets", r"offsets of shape \[G \+ 1\], got \[0\]", offsets=_integers()),
        bad(
            "bags that features do not share",
            r"offsets of shape \[2 \* B \+ 1\], got \[4\]",
            offsets=_integers(0, 2, 3, 6),
        ),
        bad("features of one table", "features for 2 tables, got 1", fields={"features": ((0,),)}),
        bad(
            "table without features",
            r"features\[1\] to name one feature or more, got \[\]",
            fields={"features": ((0, 1), ())},
        ),
        bad("negative feature", r"features\[1\] to name .*, got \[-1\]", fields={"features": ((0,), (-1,))}),
        bad("pooling of one table", "pooling for 2 tables, got 1", fields={"pooling": ("sum",)}),
        bad(
            "unknown pooling",
            r"pooling to be one of \('sum', 'mean', 'max', 'none'\), got 'median'",
            fields={"pooling": ("sum", "median")},
        ),
        bad("unknown bounds", r"bounds to be one of \('error', 'drop'\), got 'wrap'", bounds="wrap"),
        *(
            bad(
                f"batch sizes {sizes}",
                rf"batch_sizes of 2 features that add up to the 4 bags of offsets, got \[{sizes}\]",
                fields={"batch_sizes": tuple(map(int, sizes.split(", ")))},
            )
            for sizes in ("4", "2, 3", "5, -1")
        ),
        bad(
            "sparse maximum",
            "sparse=False with pooling 'max', got True",
            fields={"pooling": ("sum", "max"), "sparse": True},
        ),
        *(
            bad(
                f"weighted {pooling}",
                f"per_sample_weights=None with pooling '{pooling}', got a tensor",
                NotImplementedError,
                {"pooling": ("sum", pooling)},
                per_sample_weights=lambda d: d.normal(6),
            )
            for pooling in ("max", "none")
        ),
        bad(
            "too few weights", r"shape of values, \[6\], got \[5\]", per_sample_weights=lambda d: d.normal(5)
        ),
        bad(
            "weights of integers",
            "per_sample_weights of dtype .*, got int64",
            TypeError,
            per_sample_weights=torch.ones(6).long(),
        ),
        bad("output of integers", "output_dtype .*, got int64", TypeError, {"output": "int64"}),
        bad(
            "output in fp64 of others",
            "float64 with float64 tables, got float64",
            TypeError,
            {"output": "float64"},
        ),
        bad("out of another size", r"out contiguous, of 10 elements, got \[2, 4\]", out=torch.zeros(2, 4)),
        bad("out with gaps", r"out contiguous, of 10 elements, got \[2, 5\]", out=torch.zeros(5, 2).T),
        bad(
            "out of another dtype",
            "out of dtype float32, got bfloat16",
            TypeError,
            out=torch.zeros(2, 5, dtype=half),
        ),
        bad(
            "out where gradients are wanted",
            "out=None where gradients are wanted",
            RuntimeError,
            out=torch.zeros(2, 5),
            weight_0=lambda d: d.normal(5, 3).requires_grad_(),
        ),
        bad(
            "decreasing offsets of a sequence",
            r"never decrease, got offsets\[2\] = 3, offsets\[4\] = 2",
            RuntimeError,
            {"pooling": "none", "dims": (3, 3)},
            weight_1=lambda d: d.normal(4, 3),
            offsets=_integers(0, 2, 3, 4, 2),
        ),
        *(refused_values("sum", {})),
        *(refused_values("mean", {"pooling": "mean"}, per_sample_weights=lambda d: d.normal(6))),
        *(refused_values("max", {"pooling": "max"})),
        *(refused_values("int8", {"quantized": "int8"})),
        *(
            refused_values(
                "update",
                {"optimizer": "sgd"},
                grad_output=lambda d: d.normal(10),
                minus_lr=torch.tensor([-0.5]),
            )
        ),
        bad(
            "id past a table of a sequence",
            r"\[0, 4\) for table 1, got values\[4\] = 4",
            RuntimeError,
            {"pooling": ("sum", "none")},
            values=_integers(1, 2, 3, 0, 4, 0),
        ),
        bad(
            "id in an empty table",
            r"in \[0, 0\) for table 1, got values\[3\]",
            RuntimeError,
            weight_1=torch.ones(0, 2),
        ),
        bad("int4 of an odd width", "int4 rows of even length, got 3", fields={"quantized": "int4"}),
    )


def _integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _tensors(arguments: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: _integers(*values) for name, values in arguments.items()}
