"""The module of many tables: what it takes, gives, refuses and learns, by loops over PyTorch's own lookup."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from recsys_ops.nn import EmbeddingBagCollection, TableConfig
from recsys_ops.optim import SGD, Adagrad, Adam, RowOptimizer

ROWS = 9
TABLES = (
    TableConfig("user", ROWS, 4),
    TableConfig("item", ROWS, 8, ["clicked", "bought"], "mean"),
    TableConfig("brand", ROWS, 3, ["clicked"]),
)
backends = pytest.mark.parametrize("backend", [None, "reference"])


def make(
    tables: Sequence[TableConfig] = TABLES, optimizer: RowOptimizer | None = None, **options: Any
) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    return EmbeddingBagCollection(tables, optimizer, **options)


def bags(*batch_sizes: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Bags of 0 to 4 ids for features of these batch sizes."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (sum(batch_sizes),), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.randint(0, ROWS, (int(offsets[-1]),), generator=generator)
    return values.to(dtype), offsets.to(dtype)


def by_torch(
    ebc: EmbeddingBagCollection,
    values: Tensor,
    offsets: Tensor,
    batch_sizes: Sequence[int],
    weights: Sequence[Tensor] | None = None,
    factors: Tensor | None = None,
) -> list[Tensor]:
    """What each lookup gives, one after the other."""
    first = {f: sum(batch_sizes[:i]) for i, f in enumerate(ebc.features)}
    result = []
    for table, weight in zip(ebc.tables, weights or ebc.weights, strict=True):
        for f in table.features:
            starts = offsets[first[f] : first[f] + batch_sizes[ebc.features.index(f)] + 1]
            ids = values[starts[0] : starts[-1]]
            if table.pooling == "none":
                result.append(weight[ids])
                continue
            of_ids = None if factors is None else factors[starts[0] : starts[-1]]
            result.append(
                embedding_bag(
                    ids,
                    weight,
                    starts - starts[0],
                    mode=table.pooling,
                    per_sample_weights=of_ids,
                    include_last_offset=True,
                )
            )
    return result


def square_sum(result: Tensor) -> Tensor:
    return (result - 0.3).square().sum()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": ""}, ValueError, "a name without dots, got ''"),
        ({"name": "a.b"}, ValueError, "a name without dots, got 'a.b'"),
        ({"num_embeddings": -1}, ValueError, "'t': expected num_embeddings of at least 0, got -1"),
        ({"embedding_dim": 0}, ValueError, "'t': expected embedding_dim of at least 1, got 0"),
        ({"features": "clicked"}, TypeError, "'t': expected a list of features, got 'clicked'"),
        ({"pooling": "average"}, ValueError, "'t': expected pooling to be one of .*, got 'average'"),
        ({"dtype": torch.int64}, TypeError, "'t': expected dtype to be one of .*, got torch.int64"),
    ],
)
def test_tables_that_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TableConfig(**{"name": "t", "num_embeddings": 3, "embedding_dim": 2, **arguments})


TABLE, LARGEST = TableConfig("t", 3, 2), TableConfig("t", 3, 2, pooling="max")
WIDE = TableConfig("wide", 3, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("tables", "options", "error", "message"),
    [
        ([], {}, ValueError, "tables of different names, got "),
        ([TABLE, TABLE], {}, ValueError, r"tables of different names, got \['t', 't'\]"),
        ([TABLE], {"bounds": "wrap"}, ValueError, "bounds to be one of .*, got 'wrap'"),
        ([LARGEST], {"sparse": True}, ValueError, "sparse=False with pooling 'max'"),
        ([TABLE], {"sparse": True, "optimizer": SGD()}, ValueError, "sparse=False with an optimizer"),
        ([TABLE], {"output_dtype": torch.float64}, TypeError, "output_dtype .*, got float64"),
        ([WIDE], {"output_dtype": torch.float32}, TypeError, "output_dtype .*, got float32"),
        ([TABLE], {"output_dtype": torch.int64}, TypeError, "output_dtype .*, got int64"),
        ([LARGEST], {"is_weighted": True}, NotImplementedError, "with pooling 'max'"),
    ],
)
def test_collections_that_are_refused(
    tables: list[TableConfig], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        EmbeddingBagCollection(tables, **options)


def test_names() -> None:
    ebc = make()
    assert ebc.features == ("user", "clicked", "bought")
    assert ebc.embedding_names == ["user", "clicked@item", "bought", "clicked@brand"]
    assert list(ebc.state_dict()) == [f"embedding_bags.{t.name}.weight" for t in TABLES]
    assert "9, 8, mean, float32, features=['clicked', 'bought']" in repr(ebc)


def test_initial_weights() -> None:
    bound = ROWS**-0.5
    assert all(-bound <= w.min() < w.max() <= bound for w in make().weights)
    filled = TableConfig("t", 3, 2, init=lambda weight: weight.fill_(7.0))
    assert make([filled]).weights[0].tolist() == [[7.0, 7.0]] * 3


@backends
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_plain_input(backend: str | None, dtype: torch.dtype) -> None:
    ebc = make(backend=backend)
    values, offsets = bags(5, 5, 5, dtype=dtype)
    expected = torch.cat(by_torch(ebc, values, offsets, [5] * 3), 1)
    torch.testing.assert_close(ebc(values, offsets), expected)
    mixed = ebc(values, offsets.long())
    torch.testing.assert_close(mixed, expected)


@backends
def test_factors_of_samples_and_their_gradients(backend: str | None) -> None:
    ebc = make(TABLES[::2], backend=backend)
    values, offsets = bags(4, 4)
    one = torch.rand(len(values), generator=torch.Generator().manual_seed(1)).requires_grad_()
    other = one.detach().clone().requires_grad_()
    result = ebc(values, offsets, one)
    expected = torch.cat(by_torch(ebc, values, offsets, [4, 4], factors=other), 1)
    torch.testing.assert_close(result, expected)
    square_sum(result).backward()
    square_sum(expected).backward()
    torch.testing.assert_close(one.grad, other.grad)


@backends
@pytest.mark.parametrize("batch_sizes", [(5, 2, 3), (0, 4, 1), (0, 0, 0)])
def test_features_of_different_batch_sizes(backend: str | None, batch_sizes: tuple[int, ...]) -> None:
    ebc = make(backend=backend)
    values, offsets = bags(*batch_sizes)
    result = ebc(values, offsets, batch_sizes=batch_sizes)
    torch.testing.assert_close(result, by_torch(ebc, values, offsets, batch_sizes))


@pytest.mark.parametrize("batch_sizes", [(5, 2), (5, 2, 4), (12, -1, -1)])
def test_batch_sizes_must_add_up(batch_sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="batch_sizes of 3 features that add up to the 10 bags"):
        make()(*bags(10), batch_sizes=batch_sizes)


@backends
@pytest.mark.parametrize("batch_sizes", [None, (5, 5, 5), (2, 4, 3)])
def test_sequences_beside_pooled_features(backend: str | None, batch_sizes: tuple[int, ...] | None) -> None:
    tables = [*TABLES[:2], TableConfig("words", ROWS, 5, ["clicked", "user"], "none")]
    ebc = make(tables, backend=backend)
    sizes = batch_sizes or (5, 5, 5)
    values, offsets = bags(*sizes)
    pooled, sequences = ebc(values, offsets, batch_sizes=batch_sizes)
    user, clicked, bought, *rows = by_torch(ebc, values, offsets, sizes)
    expected: Any = [user, clicked, bought]
    torch.testing.assert_close(pooled, expected if batch_sizes else torch.cat(expected, 1))
    assert list(sequences) == ["clicked@words", "user@words"]
    torch.testing.assert_close(list(sequences.values()), rows)
    square_sum(sequences["user@words"]).backward()
    (gradient,) = torch.autograd.grad(square_sum(rows[1]), ebc.weights[2])
    torch.testing.assert_close(ebc.weights[2].grad, gradient)


@backends
def test_maxima(backend: str | None) -> None:
    ebc = make([TableConfig("t", ROWS, 4, pooling="max")], backend=backend)
    values, offsets = bags(6)
    (expected,) = by_torch(ebc, values, offsets, [6])
    result = ebc(values, offsets)
    assert torch.equal(result, expected)
    (gradient,) = torch.autograd.grad(square_sum(expected), ebc.weights)
    square_sum(result).backward()
    torch.testing.assert_close(ebc.weights[0].grad, gradient)


@backends
@pytest.mark.parametrize("fused", [False, True])
def test_out_is_filled_and_given_back(backend: str | None, fused: bool) -> None:
    ebc = make(optimizer=SGD() if fused else None, backend=backend)
    values, offsets = bags(5, 5, 5)
    out = torch.full((5, 23), torch.nan)
    with torch.no_grad():
        expected = ebc(values, offsets)
        result = ebc(values, offsets, out=out)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)
    before = [weight.detach().clone() for weight in ebc.weights]
    with pytest.raises(RuntimeError, match="out=None where gradients are wanted"):
        ebc(values, offsets, out=out)
    assert all(torch.equal(a, b) for a, b in zip(before, ebc.weights, strict=True))
    with torch.no_grad(), pytest.raises(ValueError, match="of 115 elements"):
        ebc(values, offsets, out=out[:4])
    with torch.no_grad(), pytest.raises(TypeError, match="out of dtype float32, got float64"):
        ebc(values, offsets, out=out.double())


@backends
@pytest.mark.parametrize("fused", [False, True])
def test_dropped_ids_stay_as_they_are(backend: str | None, fused: bool) -> None:
    table = TableConfig("t", ROWS, 4, pooling="mean")
    ebc = make([table], SGD(lr=1.0) if fused else None, bounds="drop", backend=backend)
    values, offsets = torch.tensor([ROWS, 3, -1, 2**40, 5]), torch.tensor([0, 3, 4, 5])
    given = values.clone()
    kept, at = torch.tensor([3, 5]), torch.tensor([0, 1, 1, 2])
    weight = ebc.weights[0].detach().clone().requires_grad_()
    expected = embedding_bag(kept, weight, at, mode="mean", include_last_offset=True)
    square_sum(expected).backward()
    result = ebc(values, offsets)
    torch.testing.assert_close(result, expected)
    square_sum(result).backward()
    assert torch.equal(values, given)
    learnt = weight - ebc.weights[0] if fused else ebc.weights[0].grad
    torch.testing.assert_close(learnt, weight.grad)
    strict = make([table], SGD(lr=1.0) if fused else None, backend=backend)
    with pytest.raises(RuntimeError, match=r"values in \[0, 9\)"):
        strict(values, offsets)
    assert torch.equal(values, given)


@backends
@pytest.mark.parametrize("output_dtype", [None, torch.bfloat16])
def test_tables_of_different_dtypes(backend: str | None, output_dtype: torch.dtype | None) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    tables = [TableConfig(f"t{i}", ROWS, 4, dtype=dtype) for i, dtype in enumerate(dtypes)]
    ebc = make(tables, output_dtype=output_dtype, backend=backend)
    values, offsets = bags(5, 5, 5)
    result = ebc(values, offsets)
    assert result.dtype == (output_dtype or torch.float32)
    wide = [weight.float() for weight in ebc.weights]
    expected = torch.cat(by_torch(ebc, values, offsets, [5] * 3, wide), 1)
    torch.testing.assert_close(result, expected.to(result.dtype))
    square_sum(result).backward()
    assert [weight.grad.dtype for weight in ebc.weights if weight.grad is not None] == list(dtypes)


def test_fp64_tables_and_no_others() -> None:
    ebc = make([TableConfig(t.name, ROWS, 4, t.features, dtype=torch.float64) for t in TABLES])
    values, offsets = bags(5, 5, 5)
    result = ebc(values, offsets)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, torch.cat(by_torch(ebc, values, offsets, [5] * 3), 1))
    with pytest.raises(TypeError, match="all weights or none to be float64"):
        EmbeddingBagCollection([TABLE, WIDE])


def test_a_model_may_be_made_fp64_and_back() -> None:
    ebc = make()
    values, offsets = bags(5, 5, 5)
    before = ebc(values, offsets)
    wide = ebc.double()(values, offsets)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), before)
    assert torch.equal(ebc.float()(values, offsets), before)


@backends
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients(backend: str | None, sparse: bool) -> None:
    ebc = make(sparse=sparse, backend=backend)
    values, offsets = bags(5, 5, 5)
    expected = torch.autograd.grad(
        square_sum(torch.cat(by_torch(ebc, values, offsets, [5] * 3), 1)), ebc.weights
    )
    square_sum(ebc(values, offsets)).backward()
    for weight, gradient in zip(ebc.weights, expected, strict=True):
        assert weight.grad is not None
        assert weight.grad.is_sparse == sparse
        if sparse:
            assert weight.grad.is_coalesced()
            rows = weight.grad.indices()[0]
            assert rows.tolist() == sorted(set(rows.tolist()))
        torch.testing.assert_close(weight.grad.to_dense(), gradient)


def test_sparse_adam_takes_the_gradients() -> None:
    ebc, other = make(sparse=True), make()
    ours = torch.optim.SparseAdam(ebc.parameters(), lr=0.1)
    theirs = torch.optim.SparseAdam(other.parameters(), lr=0.1)
    for step in range(3):
        values, offsets = bags(5, 5, 5, seed=step)
        square_sum(ebc(values, offsets)).backward()
        square_sum(torch.cat(by_torch(other, values, offsets, [5] * 3), 1)).backward()
        for weight in other.weights:
            assert weight.grad is not None
            weight.grad = weight.grad.to_sparse(1)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ebc.state_dict(), other.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_who_trains_the_tables(fused: bool) -> None:
    ebc = make(optimizer=SGD() if fused else None)
    assert [weight.requires_grad for weight in ebc.weights] == [not fused] * 3
    assert (ebc.fused_optimizer is not None) == fused
    square_sum(ebc(*bags(5, 5, 5))).backward()
    assert [weight.grad is None for weight in ebc.weights] == [fused] * 3


def test_frozen_tables_get_no_gradients() -> None:
    ebc = make()
    ebc.weights[1].requires_grad_(False)
    square_sum(ebc(*bags(5, 5, 5))).backward()
    assert [weight.grad is None for weight in ebc.weights] == [False, True, False]


def pickled(ebc: EmbeddingBagCollection) -> EmbeddingBagCollection:
    buffer = io.BytesIO()
    torch.save(ebc, buffer)
    buffer.seek(0)
    loaded: EmbeddingBagCollection = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("optimizer", [None, SGD(lr=0.1), Adam(lr=0.1)], ids=repr)
def test_a_copy_goes_on_by_itself(copied: Any, optimizer: RowOptimizer | None) -> None:
    ebc = make(optimizer=optimizer)
    square_sum(ebc(*bags(5, 5, 5))).backward()
    ebc.zero_grad()
    other = copied(ebc)
    before = copy.deepcopy(ebc.state_dict())
    for step in (1, 2):
        square_sum(other(*bags(5, 5, 5, seed=step))).backward()
    assert all(torch.equal(value, ebc.state_dict()[name]) for name, value in before.items())
    for step in (1, 2):
        square_sum(ebc(*bags(5, 5, 5, seed=step))).backward()
    for one, two in zip(ebc.weights, other.weights, strict=True):
        assert torch.equal(one, two)
        assert one.grad is two.grad is None or torch.equal(one.grad, two.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", [None, Adagrad()])
def test_meta_tables_are_allocated_later(optimizer: RowOptimizer | None) -> None:
    ebc = make(optimizer=optimizer, device="meta")
    values, offsets = bags(5, 5, 5)
    assert ebc(values.to("meta"), offsets.to("meta")).shape == (5, 23)
    ebc.to_empty(device="cpu").reset_parameters()
    bound = ROWS**-0.5
    assert all(-bound <= w.min() < w.max() <= bound for w in ebc.weights)
    square_sum(ebc(values, offsets)).backward()
    if ebc.fused_optimizer is not None:
        assert all(ebc.fused_optimizer.state[w]["sum"].any() for w in ebc.weights)
        assert all(ebc.fused_optimizer.state[w]["sum"].is_meta for w in ebc.to("meta").weights)
    assert all(weight.is_meta for weight in ebc.to("meta").weights)


@pytest.mark.parametrize("optimizer", [None, Adam(lr=0.1)], ids=repr)
def test_a_backward_in_another_thread(optimizer: RowOptimizer | None) -> None:
    here, there = make(optimizer=optimizer), make(optimizer=optimizer)
    square_sum(here(*bags(5, 5, 5))).backward()
    loss = square_sum(there(*bags(5, 5, 5)))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for one, two in zip(here.weights, there.weights, strict=True):
        assert torch.equal(one, two)
        assert one.grad is two.grad is None or torch.equal(one.grad, two.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_trains_nothing(grad: bool) -> None:
    ebc = make(optimizer=Adam()).eval()
    before = [weight.detach().clone() for weight in ebc.weights]
    with torch.set_grad_enabled(grad):
        result = ebc(*bags(5, 5, 5))
    assert result.requires_grad == grad
    with torch.inference_mode():
        assert torch.equal(ebc(*bags(5, 5, 5)), result)
    assert ebc.fused_optimizer is not None
    assert int(ebc.fused_optimizer.count) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, ebc.weights, strict=True))


@pytest.mark.parametrize("sparse", [False, True])
def test_compiled_in_one_graph(sparse: bool) -> None:
    ebc, eager = make(sparse=sparse), make(sparse=sparse)
    compiled = torch.compile(ebc, backend="aot_eager", fullgraph=True)
    for step in range(2):
        arguments = bags(5, 5, 5, seed=step)
        result = compiled(*arguments)
        assert torch.equal(result, eager(*arguments))
        square_sum(result).backward()
        square_sum(eager(*arguments)).backward()
    for one, two in zip(ebc.weights, eager.weights, strict=True):
        assert one.grad is not None and two.grad is not None
        torch.testing.assert_close(one.grad.to_dense(), two.grad.to_dense())


def test_a_fused_optimizer_breaks_the_graph_and_trains_alike() -> None:
    ebc, eager = make(optimizer=Adam(lr=0.1)), make(optimizer=Adam(lr=0.1))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *bags: square_sum(ebc(*bags)), backend="aot_eager")
    for step in range(3):
        for collection, loss_of in ((ebc, compiled), (eager, lambda *bags: square_sum(eager(*bags)))):
            loss_of(*bags(5, 5, 5, seed=step)).backward()
            assert collection.fused_optimizer is not None
            assert int(collection.fused_optimizer.count) == step + 1
            collection.fused_optimizer.param_groups[0]["lr"] /= 2
    assert all(torch.equal(one, two) for one, two in zip(ebc.weights, eager.weights, strict=True))
    with torch.no_grad():
        torch.compile(ebc, backend="aot_eager", fullgraph=True)(*bags(5, 5, 5))
