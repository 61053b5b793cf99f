"""Quantised rows err no more than their formats must, and every backend reads them alike."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recsys_ops.embedding_bag_collection import api
from recsys_ops.embedding_bag_collection.cases import SPEC
from recsys_ops.embedding_bag_collection.layout import Layout
from recsys_ops.embedding_bag_collection.row_quantization import FORMATS, dequantize_rows, quantize_rows
from recsys_ops.testing import Target, targets

TARGETS = [target for target in targets(SPEC.operator)[0] if not target.interpreted]
BITS = {"int8": 8, "int4": 4, "fp8": 8}
EPS = torch.finfo(torch.float32).eps
NAN, INF = math.nan, math.inf


def rows(*, spread: float = 1.0, center: float = 0.0, dim: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return center + spread * torch.randn(50, dim, generator=generator)


TABLES = {
    "normal": rows(),
    "far from zero": rows(center=100.0),
    "large": rows(spread=1e30),
    "small": rows(spread=1e-30),
    "of many magnitudes": rows() ** 9,
    "half": rows().half(),
    "of two columns": rows(dim=2),
    "with zeros": rows() * (rows(dim=64) > 0),
}


def restored(weight: Tensor, format: str) -> Tensor:
    return dequantize_rows(*quantize_rows(weight, format), BITS[format])


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_integers_err_by_half_a_step(format: str, table: str) -> None:
    weight = TABLES[table].double()
    codes, scales = quantize_rows(TABLES[table], format)
    levels = 2 ** BITS[format] - 1
    spread = weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)
    assert torch.allclose(scales[:, :1].double(), spread / levels, rtol=1e-6, atol=0)
    error = (dequantize_rows(codes, scales, BITS[format]).double() - weight).abs()
    rounding = 4 * EPS * weight.abs().amax(1, keepdim=True)
    assert bool((error <= spread / levels / 2 + rounding).all())
    assert float((error / spread.clamp(min=1e-38) * levels).max()) > 0.4 or weight.shape[1] == 2


@pytest.mark.parametrize("table", TABLES)
def test_fp8_errs_by_a_sixteenth_of_a_number_or_of_the_least(table: str) -> None:
    weight = TABLES[table].double()
    scale = weight.abs().amax(1, keepdim=True) / 448
    error = (restored(TABLES[table], "fp8").double() - weight).abs()
    allowed = torch.maximum(weight.abs() * 2**-4, scale * 2**-10) * (1 + 4 * EPS)
    assert bool((error <= allowed).all())
    assert float((error / allowed).max()) > 0.5


@pytest.mark.parametrize("format", FORMATS)
def test_extremes_and_constants_stay(format: str) -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-1.5] * 4, [3e38] * 4, [1e-45] * 4, [-2.0, 1.0, 6.0, 0.0]])
    found = restored(weight, format)
    assert torch.equal(found[0], weight[0])
    if format == "fp8":
        assert torch.allclose(found[1:3], weight[1:3], rtol=4 * EPS)
        assert not found[3].any()  # its scale is 0
        assert float(found[4].max()) == 6.0
    else:
        assert torch.equal(found[:4], weight[:4])
        assert torch.allclose(found[4].aminmax().min, torch.tensor(-2.0))
        assert torch.allclose(found[4].aminmax().max, torch.tensor(6.0))
        codes, scales = quantize_rows(weight[:4], format)
        assert not codes.any() and scales[:, 0].tolist() == [0.0] * 4


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_range_that_holds_zero_keeps_it_within_half_a_step(format: str) -> None:
    weight = rows()
    weight[:, 7] = 0.0
    scales = quantize_rows(weight, format)[1]
    assert bool((restored(weight, format)[:, 7].abs() <= scales[:, 0] / 2 * (1 + 8 * EPS) + 8 * EPS).all())


def test_fp8_keeps_zeros() -> None:
    weight = TABLES["with zeros"]
    assert not restored(weight, "fp8")[weight == 0].any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other_does(format: str, bad: float) -> None:
    weight = rows(dim=4)
    good = restored(weight, format)
    weight[3, 2] = bad
    codes, scales = quantize_rows(weight, format)
    found = dequantize_rows(codes, scales, BITS[format])
    assert bool(found[3].isnan().all()) and bool(scales[3, 0].isnan())
    assert not codes[3].view(torch.uint8).any()
    others = torch.arange(50) != 3
    assert torch.equal(found[others], good[others])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_range_beyond_fp32_becomes_nan(format: str) -> None:
    assert bool(restored(torch.tensor([[-3e38, 3e38]]), format).isnan().all())


@pytest.mark.parametrize("format", FORMATS)
def test_subnormal_rows_stay_about_what_they_are(format: str) -> None:
    weight = torch.arange(64.0).view(8, 8) * 2.0**-149
    error = restored(weight, format) - weight
    assert float(error.abs().max()) <= float(weight.max())


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("format", FORMATS)
def test_quantising_what_was_restored_gives_the_same_codes(format: str, table: str) -> None:
    codes, scales = quantize_rows(TABLES[table], format)
    again, _ = quantize_rows(dequantize_rows(codes, scales, BITS[format]), format)
    assert torch.equal(again.float(), codes.float())


def test_codes_by_hand() -> None:
    codes, scales = quantize_rows(torch.arange(16.0)[None] / 2, "int4")
    assert codes.tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert scales.tolist() == [[0.5, 0.0]]
    codes, scales = quantize_rows(torch.tensor([[-1.0, 0.0, 254.0]]), "int8")
    assert (codes.tolist(), scales.tolist()) == ([[0, 1, 255]], [[1.0, -1.0]])
    codes, scales = quantize_rows(torch.tensor([[-224.0, 1.0, 0.0]]), "fp8")
    assert (codes.float().tolist(), scales.tolist()) == ([[-448.0, 2.0, 0.0]], [[0.5, 0.0]])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_tables(format: str, shape: tuple[int, int]) -> None:
    codes, scales = quantize_rows(torch.zeros(shape), format)
    assert scales.shape == (shape[0], 2)
    assert dequantize_rows(codes, scales, BITS[format]).shape == shape


def test_odd_widths_and_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="expected int4 rows of even length, got 3"):
        quantize_rows(torch.ones(2, 3), "int4")
    with pytest.raises(ValueError, match=r"format to be one of \('int8', 'int4', 'fp8'\), got 'int2'"):
        quantize_rows(torch.ones(2, 4), "int2")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_backend_reads_single_rows_alike(target: Target, format: str) -> None:
    """Rows of all kinds, those of NaN too, each in a bag of its own."""
    weight = torch.cat([rows(dim=36), rows(dim=36) ** 9, torch.zeros(1, 36), torch.full((1, 36), -2.5)])
    weight[5, 3] = NAN
    codes, scales = (t.to(target.device) for t in quantize_rows(weight, format))
    count = len(weight)
    with target.active():
        found = api.quantized_collection(
            [codes],
            [scales],
            BITS[format],
            torch.arange(count, device=target.device),
            torch.arange(count + 1, device=target.device),
            None,
            Layout(((0,),), ("sum",), (36,)).side_by_side(count),
            torch.float32,
            False,
            backend=target.backend,
        ).view(count, 36)
    wanted = dequantize_rows(codes, scales, BITS[format])
    # A fused multiply-add rounds once, two operations twice.
    allowed = 2 * EPS * (255 * scales[:, :1].abs() + scales[:, 1:].abs())
    assert bool((((found - wanted).abs() <= allowed) | wanted.isnan()).all())
    assert torch.equal(found.isnan(), wanted.isnan())
