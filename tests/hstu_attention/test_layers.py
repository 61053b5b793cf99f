"""Layers against the same formula in plain PyTorch, in every variant, and what surrounds them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import recsys_ops
from recsys_ops import HSTUMask
from recsys_ops.hstu_attention import autograd
from recsys_ops.hstu_attention.api import choose
from recsys_ops.hstu_attention.layer_autograd import RECOMPUTABLE
from recsys_ops.nn import HSTU, HSTULayer

OFFSETS = torch.tensor([0, 5, 5, 6, 13])
TARGETS = torch.tensor([2, 0, 1, 3])
ROWS = torch.tensor([3, 4, 5, 10, 11, 12])
TIMES = torch.tensor([3, 10, 11, 50, 50, 7, 1, 2, 90, 1000, 1000, 4000, 9000])
MASK = HSTUMask(window=3, num_targets=TARGETS)
EVERY = [
    dict(variant="stu"),
    dict(variant="stu", group_norm=True),
    dict(variant="stu", alpha=0.5, max_seq_len=4),
    dict(variant="paper", max_seq_len=6, num_buckets=5),
    dict(variant="paper", concat_ua=True, num_buckets=5),
]
RECOMPUTED = [(), ("normed_x", "y"), ("uvqk",), RECOMPUTABLE]


def layer_of(dtype: torch.dtype = torch.float64, **options: Any) -> HSTULayer:
    torch.manual_seed(1)
    layer = HSTULayer(6, 2, 4, 3, scale=0.25, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():  # none of them 0 or 1 as they begin
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def x_of(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(13, 6, dtype=dtype, requires_grad=True)


def plain(layer: HSTULayer, x: Tensor, mask: HSTUMask = MASK, scale: Any = None) -> Tensor:
    """The formulas of ``HSTULayer``'s docstring, one after the other."""
    stu = layer.variant == "stu"
    normed = F.layer_norm(x, x.shape[1:], layer.input_norm_weight, layer.input_norm_bias, layer.eps)
    uvqk = normed @ layer.uvqk_weight
    uvqk = uvqk + layer.uvqk_bias if stu else F.silu(uvqk)
    hidden, attention = 2 * layer.linear_hidden_dim, 2 * layer.attention_dim
    u, v, q, k = uvqk.split([hidden, hidden, attention, attention], 1)
    u = F.silu(u) if stu else u
    bias = None
    if layer.position_weight is not None or layer.time_weight is not None:
        times = None if layer.time_weight is None else TIMES
        bias = recsys_ops.RelativeBias(layer.position_weight, layer.time_weight, times)
    attended = recsys_ops.hstu_attention(
        *(part.unflatten(1, (2, -1)) for part in (q, k, v)),
        OFFSETS,
        scale=0.25 if scale is None else scale,
        alpha=layer.alpha,
        mask=mask,
        bias=bias,
        dropout=layer.attention_dropout if layer.training else 0.0,
    ).flatten(1)
    if layer.group_norm:
        weights = layer.output_norm_weight, layer.output_norm_bias
        normed = F.group_norm(attended.unflatten(1, (2, -1)), 2, *weights, layer.eps).flatten(1)
    else:
        shape = attended.shape[1:]
        normed = F.layer_norm(attended, shape, layer.output_norm_weight, layer.output_norm_bias, layer.eps)
    y = u * normed
    if stu or layer.concat_ua:
        y = torch.cat([u, attended if stu else normed, y], 1)
    if layer.output_dropout and layer.training:
        y = torch.native_dropout(y, layer.output_dropout, True)[0]
    output = x + y @ layer.output_weight
    return output if layer.output_bias is None else output + layer.output_bias


def times_of(layer: HSTULayer) -> Tensor | None:
    return None if layer.time_weight is None else TIMES


def gradients(output: Tensor, layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
    return torch.autograd.grad(output, [x, *layer.parameters()], cotangent)


@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("options", EVERY)
@pytest.mark.parametrize("targets_only", [False, True])
def test_is_the_plain_formula(options: Any, recompute: tuple[str, ...], targets_only: bool) -> None:
    layer, x = layer_of(recompute=recompute, **options), x_of()
    expected = plain(layer, x)
    expected = expected[ROWS] if targets_only else expected
    found = layer(x, OFFSETS, mask=MASK, timestamps=times_of(layer), targets_only=targets_only)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = gradients(expected, layer, x)
    torch.testing.assert_close(gradients(found, layer, x), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("options", EVERY[::3])
def test_dropout_drops_the_same_forward_and_backward(options: Any, recompute: tuple[str, ...]) -> None:
    layer = layer_of(recompute=recompute, output_dropout=0.4, attention_dropout=0.3, **options)
    x, results = x_of(), []
    calls: list[Callable[[], Tensor]] = [
        lambda: plain(layer, x),
        lambda: layer(x, OFFSETS, mask=MASK, timestamps=times_of(layer)),
    ]
    for call in calls:
        torch.manual_seed(5)
        output = call()
        results.append((output, *gradients(output, layer, x)))
    torch.testing.assert_close(*results)
    layer.eval()
    torch.testing.assert_close(calls[1](), plain(layer, x))
    assert not torch.allclose(results[0][0], calls[1]())


@pytest.mark.parametrize("options", EVERY)
@pytest.mark.parametrize("targets_only", [False, True])
def test_numerical_gradients(options: Any, targets_only: bool) -> None:
    torch.manual_seed(0)
    layer = layer_of(**options)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    arguments = dict(mask=HSTUMask(num_targets=1), timestamps=None, targets_only=targets_only)
    if layer.time_weight is not None:
        arguments["timestamps"] = TIMES[:3]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, given, (x, torch.tensor([0, 1, 3])), arguments)

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("options", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errs_no_more_than_twice_the_plain_formula(options: Any, dtype: torch.dtype) -> None:
    exact_layer = layer_of(dtype=torch.float32, **options).to(dtype).double()
    exact_x = x_of().detach().to(dtype).double().requires_grad_()
    layer = copy.deepcopy(exact_layer).to(dtype)
    x = exact_x.detach().to(dtype).requires_grad_()

    def results(layer: HSTULayer, x: Tensor, ours: bool) -> list[Tensor]:
        output = layer(x, OFFSETS, mask=MASK, timestamps=times_of(layer)) if ours else plain(layer, x)
        assert output.dtype == x.dtype
        return [output, *gradients(output, layer, x)]

    exact, eager = results(exact_layer, exact_x, False), results(layer, x, False)
    for mine, theirs, true in zip(results(layer, x, True), eager, exact, strict=True):
        assert mine.dtype == dtype
        size = true.abs().max()
        error, allowed = (mine.double() - true).abs().max(), (theirs.double() - true).abs().max()
        assert error <= 2 * allowed + 2 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("options", EVERY)
def test_autocast_computes_low_and_adds_high(options: Any) -> None:
    layer, x = layer_of(dtype=torch.float32, **options), x_of(torch.float32)
    expected = plain(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x, OFFSETS, mask=MASK, timestamps=times_of(layer))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert not torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    got = gradients(found, layer, x)
    assert all(g.dtype == torch.float32 for g in got)
    for one, other in zip(got, gradients(expected, layer, x), strict=True):
        assert (one - other).norm() <= 0.05 * other.norm()


def test_weights_follow_the_dtype_of_x() -> None:
    layer, x = layer_of(dtype=torch.float32), x_of(torch.bfloat16)
    found = layer(x, OFFSETS, mask=MASK)
    assert found.dtype == torch.bfloat16
    low = copy.deepcopy(layer).bfloat16()
    torch.testing.assert_close(found, low(x, OFFSETS, mask=MASK), rtol=0.03, atol=0.03)
    found.float().sum().backward()
    assert layer.uvqk_weight.grad is not None and layer.uvqk_weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", EVERY)
@pytest.mark.parametrize("targets_only", [False, True])
def test_compiles_as_one_graph(options: Any, targets_only: bool) -> None:
    torch.compiler.reset()
    layer, x = layer_of(**options), x_of()

    def call(x: Tensor) -> Tensor:
        total = {"targets_only": True, "total_targets": 6} if targets_only else {}
        return layer(x, OFFSETS, mask=MASK, timestamps=times_of(layer), **total)

    expected, found = call(x), torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, layer, x), gradients(expected, layer, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", EVERY[::3])
def test_exports(options: Any) -> None:
    layer, x = layer_of(**options).eval(), x_of().detach()
    times = {} if layer.time_weight is None else {"timestamps": TIMES}
    exported = torch.export.export(layer, (x, OFFSETS), times).module()
    torch.testing.assert_close(exported(x, OFFSETS, **times), layer(x, OFFSETS, **times))


def kept_bytes(recompute: tuple[str, ...]) -> int:
    layer, x = HSTULayer(32, 2, 16, 16, scale=1.0, recompute=recompute), torch.randn(64, 32)
    weights = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and len(tensor) == 64:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x, torch.tensor([0, 64]))
    assert output.requires_grad
    return sum(kept.values()) // (64 * 4)


def test_keeps_only_what_is_not_recomputed() -> None:
    least = kept_bytes(RECOMPUTABLE)
    assert least == 32  # A
    assert kept_bytes(("normed_x", "y")) == least + 4 * 32  # U, V, Q and K
    assert kept_bytes(("uvqk", "y")) == least + 32 + 2  # norm(x), mean and 1 / standard deviation
    assert kept_bytes(("uvqk", "normed_x")) == least + 4 * 32 + 2  # U, A, Y; norm(A) and its statistics


@pytest.mark.parametrize(
    ("options", "targets_only"), [(EVERY[0], False), (EVERY[3], False), (EVERY[0], True)]
)
def test_kernels_read_and_write_views_of_one_projection(
    options: Any, targets_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, ...]] = []
    layer, x = layer_of(**options), x_of()
    kernels = autograd.KERNELS[choose(x, None)]
    plain_backward = kernels.hstu_attention_backward

    def backward(*arguments: Any) -> Any:
        seen.append(arguments)
        return plain_backward(*arguments)

    monkeypatch.setattr(kernels, "hstu_attention_backward", backward)
    layer(x, OFFSETS, mask=MASK, timestamps=times_of(layer), targets_only=targets_only).sum().backward()
    ((grad_q, grad_k, grad_v, _, q, k, v, *_),) = seen
    for of_q, of_k, of_v in ((grad_q, grad_k, grad_v), (q, k, v)):
        memory = [part.untyped_storage().data_ptr() for part in (of_q, of_k, of_v)]
        assert memory[1] == memory[2] and (memory[0] == memory[1]) is not targets_only
        assert not of_q.is_contiguous()
    assert len(q) == (6 if targets_only else 13)


def test_scale_and_intervals_of_each_row() -> None:
    layer, x = layer_of(), x_of()
    scale = torch.rand(13, dtype=torch.float64)
    intervals = torch.stack([torch.arange(13) % 3, torch.arange(13) % 3 + 4], 1)[:, None]
    mask = HSTUMask(num_targets=TARGETS, intervals=intervals)
    expected = plain(layer, x, mask, scale)
    for targets_only in (False, True):
        found = layer(x, OFFSETS, mask=mask, scale=scale, targets_only=targets_only)
        torch.testing.assert_close(found, expected[ROWS] if targets_only else expected)


def test_nothing_depends_on_others_in_the_batch() -> None:
    layer, x = layer_of(torch.float32, **EVERY[3]), x_of(torch.float32)
    whole = layer(x, OFFSETS, timestamps=TIMES)
    alone = layer(x[6:], torch.tensor([0, 7]), timestamps=TIMES[6:])
    torch.testing.assert_close(alone, whole[6:], rtol=1e-6, atol=1e-6)


def test_empty_batches_and_frozen_weights() -> None:
    for options in EVERY:
        layer = layer_of(**options)
        layer.uvqk_weight.requires_grad_(False)
        x = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
        for offsets in (torch.tensor([0]), torch.tensor([0, 0, 0])):
            times = None if layer.time_weight is None else TIMES[:0]
            output = layer(x, offsets, timestamps=times)
            assert output.shape == (0, 6)
            output.sum().backward()
        assert layer.uvqk_weight.grad is None
        assert layer.output_weight.grad is not None and not layer.output_weight.grad.any()


def test_no_targets_at_all() -> None:
    layer, x = layer_of(), x_of()
    output = layer(
        x, OFFSETS, mask=HSTUMask(num_targets=torch.zeros(4, dtype=torch.int32)), targets_only=True
    )
    assert output.shape == (0, 6)
    output.sum().backward()
    assert x.grad is not None and not x.grad.any()


def test_request_timestamps_are_those_of_a_token_that_comes_next() -> None:
    layer, x = layer_of(**EVERY[3]), x_of()
    requests = torch.tensor([60, 5, 80, 20_000])
    longer, ends = torch.randn(17, 6, dtype=torch.float64), torch.tensor([0, 6, 7, 9, 17])
    first = torch.tensor([i for b in range(4) for i in range(ends[b], ends[b + 1] - 1)])
    times = torch.zeros(17, dtype=torch.int64)
    with torch.no_grad():
        longer[first] = x
    times[first], times[ends[1:] - 1] = TIMES, requests
    expected = layer(longer, ends, timestamps=times)[first]
    found = layer(x, OFFSETS, timestamps=TIMES, request_timestamps=requests)
    torch.testing.assert_close(found, expected)
    without = layer(x, OFFSETS, timestamps=TIMES)
    last = OFFSETS[1:][OFFSETS.diff() > 0] - 1
    differs = (without - found).abs().amax(1) > 1e-6
    assert set(differs.nonzero().flatten().tolist()) <= set(last.tolist()) and differs.any()


def model_of(**options: Any) -> HSTU:
    torch.manual_seed(0)
    sizes = dict(num_layers=2, max_seq_len=8, num_heads=2, linear_hidden_dim=4, attention_dim=3)
    return HSTU(20, 6, dtype=torch.float64, **{**sizes, **options})


IDS = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])


@pytest.mark.parametrize("variant", ["paper", "stu"])
def test_stack_computes_targets_alone_and_apart(variant: str) -> None:
    model = model_of(variant=variant)
    expected = model(IDS, OFFSETS, TIMES, mask=MASK)
    found = model(IDS, OFFSETS, TIMES, mask=MASK, targets_only=True)
    torch.testing.assert_close(found, expected[ROWS])
    got, wanted = ([*torch.autograd.grad(o.sum(), [*model.parameters()])] for o in (found, expected[ROWS]))
    torch.testing.assert_close(got, wanted)
    others = IDS.clone()
    others[torch.tensor([4, 11, 12])] = 19
    alone = model(others, OFFSETS, TIMES, mask=MASK, targets_only=True)
    torch.testing.assert_close(alone[[0, 2, 3]], found[[0, 2, 3]])
    assert not torch.allclose(alone[1], found[1])


def test_stack_without_times_and_with_requests() -> None:
    model = model_of(num_buckets=None, relative_positions=False)
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters()} == {
        *("weight", "uvqk_weight", "output_weight", "output_bias")
    }
    assert model(IDS, OFFSETS).shape == (13, 6)
    model = model_of()
    requests = torch.tensor([60, 5, 80, 20_000])
    found = model(IDS, OFFSETS, TIMES, request_timestamps=requests)
    own = model(IDS, OFFSETS, TIMES)
    assert (found != own).any(1).sum() == 3 and found.shape == own.shape
    model.load_state_dict(model_of().state_dict())


def test_stack_trains() -> None:
    torch.manual_seed(0)
    model = HSTU(30, 16, num_layers=2, max_seq_len=8, num_heads=2, linear_hidden_dim=8, attention_dim=8)
    ids = torch.arange(24) % 6 + torch.arange(4).repeat_interleave(6)
    offsets, times = torch.arange(0, 25, 6), torch.arange(24) * 60
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    last = offsets[1:] - 1
    keep = torch.ones(24, dtype=torch.bool)
    keep[last] = False
    losses = []
    for _ in range(40):
        encoded = model(ids, offsets, times)[keep]
        loss = F.cross_entropy(encoded @ model.item_embedding.weight.t(), ids.roll(-1)[keep])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


LAYER, X = HSTULayer(6, 2, 4, 3), torch.zeros(13, 6)
TIMED = HSTULayer(6, 2, 4, 3, variant="paper", num_buckets=4, scale=1.0)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: HSTULayer(6, 2, 4, 3, variant="big"),
        ValueError,
        "variant to be one of .'stu', 'paper'., got 'big'",
    ),
    (lambda: HSTULayer(6, 2, 4, 3, recompute=["x"]), ValueError, "recompute to be one of .*, got 'x'"),
    (lambda: HSTULayer(6, 2, 400, 3), ValueError, "linear_hidden_dim from 1 to 256, got 400"),
    (lambda: HSTULayer(6, 2, 4, 3, output_dropout=1.0), ValueError, r"output_dropout in \[0, 1\), got 1.0"),
    (lambda: HSTULayer(6, 2, 4, 3, concat_ua=True), ValueError, "concat_ua=False in variant 'stu', got True"),
    (lambda: LAYER(X, OFFSETS), ValueError, "expected scale when it is made or called, got None"),
    (lambda: LAYER(X[:, :5], OFFSETS, scale=1.0), ValueError, r"x of shape \[L, 6\], got \[13, 5\]"),
    (lambda: LAYER(X.long(), OFFSETS, scale=1.0), TypeError, "x of dtype float32 or .*, got int64"),
    (lambda: LAYER(X, OFFSETS.float(), scale=1.0), TypeError, "offsets of dtype int64 or int32, got float32"),
    (lambda: LAYER(X, OFFSETS[:3], scale=1.0), RuntimeError, r"expected offsets\[-1\] = 13"),
    (lambda: LAYER(X, OFFSETS, scale=torch.ones(3)), ValueError, r"scale of shape \[13\], .* got \[3\]"),
    (
        lambda: LAYER(X, OFFSETS, scale=1.0, targets_only=True),
        ValueError,
        "expected mask.num_targets with targets_only=True, got None",
    ),
    (lambda: TIMED(X, OFFSETS), ValueError, "expected timestamps for time_weight, got None"),
    (
        lambda: TIMED(X, OFFSETS, timestamps=TIMES, request_timestamps=TIMES[:2]),
        ValueError,
        r"request_timestamps of shape \[4\], got \[2\]",
    ),
    (
        lambda: TIMED(X, OFFSETS, timestamps=TIMES, request_timestamps=TIMES[:4], mask=MASK),
        ValueError,
        "expected a causal mask without prefix, targets or intervals",
    ),
    (lambda: model_of(num_layers=0), ValueError, "HSTU: expected num_layers of at least 1, got 0"),
    (lambda: model_of()(IDS[None], OFFSETS), ValueError, r"HSTU: expected ids of shape \[L\], got \[1, 13\]"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_says_what_is_wrong(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
