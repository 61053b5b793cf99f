"""Meta's layers and ours compute the same from the same weights, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from meta_layers import (
    SequentialTransductionUnitJagged,
    STULayer,
    log_buckets,
    padded,
    sqrt_buckets,
    unit_with_bias,
)
from torch import Tensor, nn

from recsys_ops import HSTUMask
from recsys_ops.hstu_attention import meta_modules
from recsys_ops.nn import HSTULayer

SIZE = 8
OFFSETS = torch.tensor([0, 5, 5, 6, 14])
LENGTHS = OFFSETS.diff()
TARGETS = torch.tensor([2, 0, 1, 3])
TIMES = torch.tensor([3, 10, 11, 50, 50, 7, 1, 2, 90, 1000, 1000, 4000, 9000, 9001])
REQUESTS = torch.tensor([70, 5, 8, 9001])  # of a sequence of SIZE tokens, its last's own
CAUSAL = torch.ones(SIZE, SIZE).tril()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(14, 6, generator=torch.Generator().manual_seed(1)).double().requires_grad_()


def stu_layer(**options: Any) -> STULayer:
    torch.manual_seed(0)
    return STULayer(**options).double()


def unit(**options: Any) -> SequentialTransductionUnitJagged:
    torch.manual_seed(0)
    return unit_with_bias(SIZE, **options).double()


def all_timestamps() -> Tensor:
    """Of each sequence, and what comes after them."""
    result = padded(TIMES, OFFSETS, SIZE)
    for b, length in enumerate(LENGTHS.tolist()):
        result[b, length:] = REQUESTS[b]
    return result


def gradients(output: Tensor, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(output, [x, *parameters], cotangent)
    return dict(zip(("x", *names), found, strict=True))


def assert_same(
    kind: meta_modules.Kind, theirs: Any, ours: HSTULayer, wanted: Tensor, found: Tensor, x: Tensor
) -> None:
    torch.testing.assert_close(found, wanted)
    of_theirs, of_ours = gradients(wanted, theirs, x), gradients(found, ours, x)
    torch.testing.assert_close(of_ours["x"], of_theirs["x"])
    assert len(of_ours) == len(of_theirs)
    for name, path in kind.names.items():
        if name in of_ours:
            grad = of_theirs[path.removesuffix("^T")]
            torch.testing.assert_close(of_ours[name], grad.t() if path.endswith("^T") else grad)


@pytest.mark.parametrize("group_norm", [False, True])
@pytest.mark.parametrize(("window", "prefix"), [(0, 0), (2, 0), (0, 2), (3, 1)])
def test_stu_layer(x: Tensor, group_norm: bool, window: int, prefix: int) -> None:
    theirs = stu_layer(use_group_norm=group_norm, max_attn_len=window, contextual_seq_len=prefix)
    ours = HSTULayer.from_stu_layer(theirs, scale=1 / SIZE)
    targets = TARGETS if prefix < 2 else torch.tensor([2, 0, 0, 3])
    # A sequence of one token, without room for the prefix, is another matter.
    mask = HSTUMask(window=window or None, num_contextual=prefix, num_targets=targets)
    wanted, found = theirs(x, LENGTHS, OFFSETS, SIZE, targets), ours(x, OFFSETS, mask=mask)
    if prefix:
        long = torch.tensor([0, 1, 2, 3, 4, *range(6, 14)])
        wanted, found = wanted[long], found[long]
    assert_same(meta_modules.STU_LAYER, theirs, ours, wanted, found, x)


@pytest.mark.parametrize("concat_ua", [False, True])
@pytest.mark.parametrize("buckets", [log_buckets, sqrt_buckets])
def test_sequential_transduction_unit(x: Tensor, concat_ua: bool, buckets: Any) -> None:
    theirs = unit(concat_ua=concat_ua)
    theirs._rel_attn_bias._bucketization_fn = buckets  # type: ignore[union-attr, assignment]
    ours = HSTULayer.from_sequential_transduction_unit(theirs, scale=1 / SIZE)
    wanted = theirs(x, OFFSETS, all_timestamps(), CAUSAL)[0]
    found = ours(x, OFFSETS, timestamps=TIMES, request_timestamps=REQUESTS)
    assert_same(meta_modules.TRANSDUCTION_UNIT, theirs, ours, wanted, found, x)


def test_unit_without_bias(x: Tensor) -> None:
    theirs = SequentialTransductionUnitJagged().double()
    ours = HSTULayer.from_sequential_transduction_unit(theirs)
    torch.testing.assert_close(ours(x, OFFSETS, scale=1 / SIZE), theirs(x, OFFSETS, None, CAUSAL)[0])


def test_weights_go_back(x: Tensor) -> None:
    theirs, other = stu_layer(), STULayer().double()
    ours = HSTULayer.from_stu_layer(theirs)
    ours.to_stu_layer(other)
    assert ours.uvqk_weight.data_ptr() != theirs._uvqk_weight.data_ptr()
    torch.testing.assert_close(other.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    their_unit, other_unit = unit(), unit_with_bias(SIZE).double()
    HSTULayer.from_sequential_transduction_unit(their_unit).to_sequential_transduction_unit(other_unit)
    torch.testing.assert_close(other_unit.state_dict(), their_unit.state_dict(), rtol=0, atol=0)


def test_keeps_mode_dtype_and_what_is_dropped() -> None:
    theirs = STULayer(output_dropout_ratio=0.3).eval()
    ours = HSTULayer.from_stu_layer(theirs, recompute=())
    assert not ours.training and ours.output_dropout == 0.3 and ours.recompute == ()
    assert ours.uvqk_weight.dtype == torch.float32
    assert HSTULayer.from_stu_layer(theirs).recompute == ("normed_x", "uvqk", "y")


def test_boundaries_are_those_that_their_function_rounds_to() -> None:
    bias = unit_with_bias(SIZE, 128)._rel_attn_bias
    boundaries = meta_modules._boundaries(bias)
    assert boundaries is not None and boundaries.shape == (128,)
    times = torch.cat([boundaries, boundaries - 1])
    expected = log_buckets(times).clamp(0, 128)
    assert torch.equal(torch.searchsorted(boundaries, times, right=True), expected)


def test_refuses_what_is_not_the_same() -> None:
    with pytest.raises(
        ValueError, match="expected a STULayer that does what ours does, got a Linear: it has no"
    ):
        HSTULayer.from_stu_layer(nn.Linear(2, 2))
    theirs = unit()
    for name, value in (("_normalization", "softmax_rel_bias"), ("_linear_activation", "none")):
        changed = unit()
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=f"it has {name}={value!r}"):
            HSTULayer.from_sequential_transduction_unit(changed)
    theirs._rel_attn_bias._bucketization_fn = lambda dt: (dt % 5).long()  # type: ignore[union-attr, assignment]
    with pytest.raises(ValueError, match="its buckets of times are not ascending ranges"):
        HSTULayer.from_sequential_transduction_unit(theirs)
    with pytest.raises(ValueError, match=r"expected a STULayer with weights .*, got"):
        HSTULayer.from_stu_layer(stu_layer()).to_stu_layer(STULayer(embedding_dim=8))
