"""Quantised collections: how far off they are, what they take, and that they can be saved and copied."""

from __future__ import annotations

import copy
import io
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import recsys_ops
from recsys_ops.embedding_bag_collection import autograd
from recsys_ops.embedding_bag_collection.row_quantization import FORMATS, dequantize_rows
from recsys_ops.nn import EmbeddingBagCollection, QuantizedEmbeddingBagCollection, TableConfig


def bag_collection(*poolings: str, **options: Any) -> EmbeddingBagCollection:
    """A table for each pooling, with rows that are large, constant, zero, and below fp8's normal range."""
    torch.manual_seed(0)
    dims = (8, 16, 6)
    tables = [
        TableConfig(f"t{i}", 30 + i, dims[i], [f"f{i}", "common"], pooling)
        for i, pooling in enumerate(poolings)
    ]
    ebc = EmbeddingBagCollection(tables, **options)
    with torch.no_grad():
        for weight in ebc.weights:
            weight.normal_()
            weight[0].mul_(1e4)
            weight[1] = 0.3
            weight[2] = 0
            weight[3, 1:].mul_(1e-5)
    return ebc


def bags(num_features: int, batch_size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 6, (num_features * batch_size,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.randint(0, 30, (int(offsets[-1]),), generator=generator), offsets


def dequantized(quantized: QuantizedEmbeddingBagCollection) -> list[Tensor]:
    pairs = zip(quantized.weights, quantized.scales, strict=True)
    return [dequantize_rows(codes, scales, quantized.bits) for codes, scales in pairs]


def largest_errors(weight: Tensor, scales: Tensor, format: str) -> Tensor:
    """The bound that the docstring of ``quantize`` states for each element, [R, D]."""
    scale = scales[:, :1].double()
    if format == "fp8":
        bound = torch.maximum(weight.double().abs() / 16, scale * 2**-10)
    else:
        bound = (scale / 2).expand_as(weight)
    rounding = 4 * torch.finfo(torch.float32).eps * weight.double().abs().amax(1, keepdim=True)
    return bound + rounding


@pytest.mark.parametrize("output_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_small_calls_bypass_the_dispatcher(format: str, output_dtype: torch.dtype) -> None:
    quantized = recsys_ops.quantize(bag_collection("sum", "mean", "sum"), format, output_dtype=output_dtype)
    asked = recsys_ops.quantize(bag_collection("sum", "mean", "sum"), format, output_dtype=output_dtype)
    asked.backend = "native"
    values, offsets = bags(4)
    weights = torch.rand(len(values), generator=torch.Generator().manual_seed(2))
    for given in ((values, offsets), (values.int(), offsets.int()), (values, offsets, weights)):
        expected = asked(*given)
        out = torch.empty_like(expected)
        with mock.patch.object(autograd, "KERNELS", {}):
            assert torch.equal(quantized(*given), expected)
            assert torch.equal(quantized(*given, out=out), expected)
            assert torch.equal(out, expected)
    with mock.patch.object(autograd, "KERNELS", {}), pytest.raises(RuntimeError, match=r"values\[0\] = 1000"):
        quantized(torch.full_like(values, 1000), offsets)


@pytest.mark.parametrize("format", FORMATS)
def test_elements_are_within_the_bound(format: str) -> None:
    ebc = bag_collection("sum", "sum", "sum")
    quantized = recsys_ops.quantize(ebc, format)
    for weight, scales, back in zip(ebc.weights, quantized.scales, dequantized(quantized), strict=True):
        error = (back.double() - weight.detach().double()).abs()
        assert (error <= largest_errors(weight.detach(), scales, format)).all()
        assert error.max() > 0
        assert torch.equal(back[1:3], weight[1:3].detach()) or format == "fp8"  # constant rows are exact


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_sums_and_means_are_within_the_bound(format: str, weighted: bool) -> None:
    ebc = bag_collection("sum", "mean")
    quantized = recsys_ops.quantize(ebc, format)
    values, offsets = bags(3)
    weights = torch.randn(len(values)) if weighted else None
    error = (quantized(values, offsets, weights) - ebc(values, offsets, weights)).abs()
    absolute = bag_collection("sum", "mean")
    with torch.no_grad():
        for bound, weight, scales in zip(absolute.weights, ebc.weights, quantized.scales, strict=True):
            bound.copy_(largest_errors(weight, scales, format))
    of_rows = absolute(values, offsets, None if weights is None else weights.abs())
    assert (error <= of_rows * (1 + 1e-5)).all()
    assert error.max() > 0


@pytest.mark.parametrize("format", FORMATS)
def test_pools_the_dequantised_rows(format: str) -> None:
    ebc = bag_collection("max", "none", "sum")
    quantized = recsys_ops.quantize(ebc, format)
    exact = bag_collection("max", "none", "sum")
    with torch.no_grad():
        for weight, rows in zip(exact.weights, dequantized(quantized), strict=True):
            weight.copy_(rows)
    inputs = bags(4)
    (pooled, sequences), (expected, expected_sequences) = quantized(*inputs), exact(*inputs)
    torch.testing.assert_close(pooled, expected)
    assert sequences.keys() == expected_sequences.keys() == {"f1", "common@t1"}
    for name, rows in sequences.items():
        torch.testing.assert_close(rows, expected_sequences[name])


def test_forward_takes_what_the_collection_takes() -> None:
    ebc = bag_collection("sum", "mean")
    quantized = recsys_ops.quantize(ebc, "int8", output_dtype=torch.bfloat16)
    values, offsets = bags(3)
    whole = quantized(values, offsets)
    assert whole.dtype == torch.bfloat16 and not whole.requires_grad
    assert quantized.features == ebc.features and quantized.embedding_names == ebc.embedding_names
    out = torch.empty_like(whole)
    assert quantized(values, offsets, out=out) is out
    assert torch.equal(out, whole)
    each = quantized(values, offsets, batch_sizes=[7, 7, 7])
    assert torch.equal(torch.cat(each, 1), whole)
    with pytest.raises(RuntimeError, match=r"expected values in \[0, 30\)"):
        quantized(torch.tensor([30, 0, 0]), torch.tensor([0, 1, 2, 3]))
    dropping = recsys_ops.quantize(bag_collection("sum", bounds="drop"), "int8")
    assert dropping(torch.tensor([-1, 99]), torch.tensor([0, 1, 2])).eq(0).all()


def test_keyed_input() -> None:
    torchrec = pytest.importorskip("torchrec")
    ebc = bag_collection("sum", "mean")
    quantized = recsys_ops.quantize(ebc, "fp8")
    values, offsets = bags(3)
    features = torchrec.KeyedJaggedTensor(keys=["f0", "common", "f1"], values=values, offsets=offsets)
    result = quantized(features)
    assert result.keys() == ["f0", "common@t0", "f1", "common@t1"]
    assert torch.equal(result.values(), quantized(values, offsets))


@pytest.mark.parametrize("fused", [False, True])
def test_torchrec_collections_are_taken(fused: bool) -> None:
    torchrec = pytest.importorskip("torchrec")
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

    tables = [
        torchrec.EmbeddingBagConfig(name=f"t{i}", num_embeddings=30, embedding_dim=8, feature_names=[f"f{i}"])
        for i in range(2)
    ]
    if fused:
        theirs: Any = FusedEmbeddingBagCollection(tables, torch.optim.SGD, {"lr": 0.1})
    else:
        theirs = torchrec.EmbeddingBagCollection(tables=tables)
    quantized = recsys_ops.quantize(theirs, "int8")
    values, offsets = bags(2)
    features = torchrec.KeyedJaggedTensor(keys=["f0", "f1"], values=values, offsets=offsets)
    expected = theirs(features)
    assert quantized(features).keys() == expected.keys()
    torch.testing.assert_close(quantized(features).values(), expected.values(), atol=0.02, rtol=0)
    assert [k for k in quantized.state_dict() if k.endswith("weight")] == list(theirs.state_dict())


@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_copies_and_pickles(format: str) -> None:
    quantized = recsys_ops.quantize(bag_collection("sum", "mean"), format)
    state = quantized.state_dict()
    assert list(state) == [
        f"embedding_bags.{table}.{name}" for table in ("t0", "t1") for name in ("weight", "scales")
    ]
    assert not list(quantized.parameters())
    empty = QuantizedEmbeddingBagCollection(quantized.tables, format)
    inputs = bags(3)
    expected = quantized(*inputs)
    assert empty(*inputs).eq(0).all() and expected.ne(0).any()
    empty.load_state_dict(state)
    file = io.BytesIO()
    torch.save(quantized, file)
    file.seek(0)
    for other in (empty, copy.deepcopy(quantized), torch.load(file, weights_only=False)):
        assert torch.equal(other(*inputs), expected)
    half = copy.deepcopy(quantized).half()
    assert torch.equal(half(*inputs), expected)


def test_fp64_tables_become_fp32() -> None:
    tables = [TableConfig("t", 10, 4, dtype=torch.float64)]
    quantized = recsys_ops.quantize(EmbeddingBagCollection(tables), "int8")
    assert quantized(torch.tensor([1]), torch.tensor([0, 1])).dtype == torch.float32


def test_leaves_the_collection_as_it_is() -> None:
    ebc = bag_collection("sum", backend="reference").eval()
    before = copy.deepcopy(ebc.state_dict())
    quantized = recsys_ops.quantize(ebc, "int4")
    assert not quantized.training and quantized.backend == "reference"
    assert recsys_ops.quantize(ebc, "int4", backend="native").backend == "native"
    torch.testing.assert_close(ebc.state_dict(), before, rtol=0, atol=0)


def test_wrong_arguments() -> None:
    ebc = bag_collection("sum")
    with pytest.raises(ValueError, match=r"expected format to be one of .*, got 'int2'"):
        recsys_ops.quantize(ebc, "int2")
    with pytest.raises(TypeError, match="expected an EmbeddingBagCollection, got Linear"):
        recsys_ops.quantize(torch.nn.Linear(2, 2), "int8")
    with pytest.raises(TypeError, match="expected output_dtype"):
        recsys_ops.quantize(ebc, "int8", output_dtype=torch.float64)
    odd = EmbeddingBagCollection([TableConfig("even", 3, 4), TableConfig("user", 3, 5)])
    with pytest.raises(ValueError, match="expected an even embedding_dim for int4, got 5 of table 'user'"):
        recsys_ops.quantize(odd, "int4")
    assert recsys_ops.quantize(odd, "int8")(torch.tensor([0, 0]), torch.tensor([0, 1, 2])).shape == (1, 9)
