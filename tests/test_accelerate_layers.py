"""Layers of Meta's that ``accelerate`` finds by their names, swaps as a whole, and puts back."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from accelerate_model import reason, results, status, timed, types
from meta_layers import SequentialTransductionUnitJagged, STULayer, unit_with_bias
from torch import Tensor, nn

import recsys_ops
from recsys_ops.hstu_attention import meta_modules

SIZE = 7


class Sequences(nn.Module):
    """A bag and layers of both kinds, on sequences of given lengths."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(20, 6)
        self.stu = STULayer(**options)
        self.unit = unit_with_bias(SIZE)
        self.bare = SequentialTransductionUnitJagged(concat_ua=True)
        self.register_buffer("future", torch.ones(SIZE, SIZE).triu(1))

    def forward(self, ids: Tensor, lengths: Tensor, times: Tensor, targets: Tensor) -> Tensor:
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
        x = self.items(ids)
        x = self.stu(
            x=x,
            x_lengths=lengths,
            x_offsets=offsets,
            max_seq_len=SIZE,
            num_targets=targets,
            kv_caching_lengths=None,
        )
        x, _ = self.unit(x, offsets, times, 1.0 - self.future)
        return self.bare(x, offsets, None, 1.0 - self.future)[0]


LAYERS = ("stu", "unit", "bare")


@pytest.fixture
def sequences() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([7, 0, 2, 5])
    times = torch.randint(0, 10**6, (4, SIZE), generator=generator).sort(1)[0]
    return torch.randint(0, 20, (14,), generator=generator), lengths, times, torch.tensor([2, 0, 1, 0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_attn_len": 2, "use_group_norm": True},
        {"contextual_seq_len": 3},  # more than one of the sequences has beside its target
        {"contextual_seq_len": 2, "target_aware": False},
    ],
)
def test_proves_and_swaps_both_kinds(sequences: tuple[Tensor, ...], options: Any) -> None:
    model = Sequences(**options)
    before, plain = results(model, sequences), types(model)
    report = recsys_ops.accelerate(model, sequences, measure=timed(2))
    assert report.accelerated == LAYERS and report.agrees, report
    kinds = {m.name: m.kind for m in report.modules}
    assert kinds == {"items": "Embedding", "stu": "STU layer", "unit": "HSTU layer", "bare": "HSTU layer"}
    assert "3 of 4 lookups and layers swapped" in str(report)
    assert isinstance(model.stu, STULayer) and type(model.stu) is not STULayer
    torch.testing.assert_close(results(model, sequences), before, rtol=1e-4, atol=1e-4)
    assert types(recsys_ops.restore(model)) == plain


def test_proves_in_half_precision(sequences: tuple[Tensor, ...]) -> None:
    model = Sequences().bfloat16()
    report = recsys_ops.accelerate(model, sequences, measure=timed(2))
    assert report.accelerated == LAYERS and report.agrees, report


def test_swapped_layers_run_as_ours(sequences: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = Sequences(), []
    recsys_ops.accelerate(model, sequences, measure=timed(2))
    ours = meta_modules.hstu_layer
    monkeypatch.setattr(meta_modules, "hstu_layer", lambda *a, **k: calls.append(1) or ours(*a, **k))
    model(*sequences)
    assert len(calls) == 3


def test_dropout_is_no_difference(sequences: tuple[Tensor, ...]) -> None:
    model = Sequences(output_dropout_ratio=0.5)
    report = recsys_ops.accelerate(model, sequences, measure=timed(2))
    assert report.accelerated == LAYERS
    assert model.stu._output_dropout_ratio == 0.5
    torch.manual_seed(0)
    dropped = model(*sequences)
    assert not torch.allclose(dropped, model(*sequences))
    model.eval()
    torch.testing.assert_close(model(*sequences), recsys_ops.restore(model)(*sequences))


def test_slower_layers_are_put_back(sequences: tuple[Tensor, ...]) -> None:
    model = Sequences()
    plain = types(model)
    report = recsys_ops.accelerate(model, sequences, measure=timed(0.5))
    assert report.accelerated == () and types(model) == plain
    assert reason(report, "stu") == "not faster in fwd + bwd"


class Changed(STULayer):
    """Keeps the forward, and does something else in it."""

    def _seen(self, length: int, size: int, targets: int | None) -> Tensor:
        return super()._seen(length, size, None)


def test_a_layer_that_differs_is_put_back(sequences: tuple[Tensor, ...]) -> None:
    model = Sequences()
    model.stu = Changed()
    report = recsys_ops.accelerate(model, sequences, measure=timed(2))
    assert report.accelerated == ("unit", "bare") and not report.agrees
    assert reason(report, "stu").startswith("it differs: ")
    assert type(model.stu) is Changed


def test_a_name_alone_is_no_proof(sequences: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sequences()
    report = recsys_ops.accelerate(model)
    assert report.accelerated == ()
    assert reason(report, "stu") == (
        "its STULayer is not generative_recommenders.modules.stu's: to be proved with sample_inputs"
    )
    expected = model(*sequences)
    monkeypatch.setattr(STULayer, "__module__", "generative_recommenders.modules.stu")
    assert recsys_ops.accelerate(model).accelerated == ("stu",)
    torch.testing.assert_close(model(*sequences), expected)


class OwnForward(STULayer):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


def test_declines_what_it_would_not_keep(sequences: tuple[Tensor, ...]) -> None:
    model = Sequences()
    model.stu = OwnForward()
    model.unit._normalization = "softmax_rel_bias"
    model.bare._o.register_forward_hook(lambda *args: None)
    report = recsys_ops.accelerate(model, None)
    assert reason(report, "stu") == "OwnForward has a forward of its own"
    assert reason(report, "unit") == "it has _normalization='softmax_rel_bias'"
    assert reason(report, "bare") == "its parts have hooks"
    assert reason(recsys_ops.accelerate(Sequences().double(), sequences), "stu") == (
        "it is float64, and nothing more exact is at hand to judge it"
    )
    model = Sequences()
    nn.utils.parametrizations.weight_norm(model.bare._o)
    assert reason(recsys_ops.accelerate(model), "bare") == "its parameters are parametrized"


def test_a_second_call_finds_nothing_left(sequences: tuple[Tensor, ...]) -> None:
    model = Sequences()
    recsys_ops.accelerate(model, sequences, measure=timed(2))
    report = recsys_ops.accelerate(model, sequences, measure=timed(2))
    assert {status(report)[name] for name in LAYERS} == {"declined"}
    assert {reason(report, name) for name in LAYERS} == {"already accelerated"}


@pytest.mark.parametrize("way", ["deepcopy", "save"])
def test_copies_and_checkpoints(sequences: tuple[Tensor, ...], way: str) -> None:
    model = Sequences()
    model.unit = SequentialTransductionUnitJagged()
    plain = types(model)
    keys = list(model.state_dict())
    inputs = (*sequences[:2], None, sequences[3])
    recsys_ops.accelerate(model, inputs, measure=timed(2))
    assert list(model.state_dict()) == keys
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert types(copied) == types(model)
    torch.testing.assert_close(copied(*inputs), model(*inputs), rtol=0, atol=0)
    assert types(recsys_ops.restore(copied)) == plain
    fresh = Sequences()
    fresh.unit = SequentialTransductionUnitJagged()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(*inputs), model(*inputs))


def test_calls_that_ours_does_not_serve_go_to_theirs(sequences: tuple[Tensor, ...]) -> None:
    model = Sequences()
    recsys_ops.accelerate(model, sequences, measure=timed(2))
    ids, lengths, times, targets = sequences
    offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
    x = model.items(ids)
    plain = copy.deepcopy(model)
    recsys_ops.restore(plain)
    mask = torch.ones(SIZE, SIZE).tril(-1)
    torch.testing.assert_close(model.unit(x, offsets, times, mask), plain.unit(x, offsets, times, mask))
    with_states = model.unit(x, offsets, times, 1.0 - model.future, return_cache_states=True)
    torch.testing.assert_close(with_states, plain.unit(x, offsets, times, 1.0 - model.future))
    cached = model.stu(x, lengths, offsets, SIZE, targets, 0, lengths)
    torch.testing.assert_close(cached, plain.stu(x, lengths, offsets, SIZE, targets, 0, lengths))
