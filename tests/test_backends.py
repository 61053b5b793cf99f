"""The choice of a backend: its order, its overrides, and what it says about them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch

import recsys_ops
from recsys_ops import backends
from recsys_ops.backends import Call, Implementation, Operator, use_backend

CALL = Call("cpu", torch.float32)
MakeOperator = Callable[..., Operator]


@pytest.fixture
def make_operator(monkeypatch: pytest.MonkeyPatch) -> MakeOperator:
    """Makes an operator of three backends, all present, that reject calls for the reasons given."""

    def make(**reasons: str) -> Operator:
        def implementation(name: str) -> Implementation:
            return Implementation(name, lambda: None, lambda call: reasons.get(name))

        implementations = [implementation(name) for name in ("reference", "triton", "native")]
        return Operator("some_op", implementations, lambda *args, **kwargs: CALL)

    for name in ("native", "triton", "reference"):
        monkeypatch.setitem(backends.BACKENDS, name, lambda: None)
    monkeypatch.setattr(backends, "_from_environment", None)
    return make


def test_the_first_in_order_of_preference_serves(make_operator: MakeOperator) -> None:
    decision = make_operator().decide(CALL)
    assert decision.implementation.backend == "native"
    assert decision.rejected == {"triton": "native is preferred", "reference": "native is preferred"}


def test_an_automatic_choice_moves_on(make_operator: MakeOperator) -> None:
    operator = make_operator(native="wrong phase of the moon")
    decision = operator.decide(CALL)
    assert decision.implementation.backend == operator.choose(CALL).backend == "triton"
    assert decision.rejected == {"native": "wrong phase of the moon", "reference": "triton is preferred"}


def test_a_backend_absent_from_the_machine_serves_nothing(
    make_operator: MakeOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "native", lambda: "not built")
    operator = make_operator()
    assert operator.choose(CALL).backend == "triton"
    assert operator.rejection("native", CALL) == "not built"
    assert operator.rejection("triton", CALL) is None


def test_the_choice_depends_on_the_call(make_operator: MakeOperator) -> None:
    operator = make_operator()
    wide = Implementation(
        "native", lambda: None, lambda call: "too wide" if call.dtype.itemsize > 4 else None
    )
    operator.implementations["native"] = wide
    assert operator.choose(Call("cpu", torch.float64)).backend == "triton"
    assert operator.choose(Call("cpu", torch.float32)).backend == "native"


def test_no_backend_left_raises_all_reasons(make_operator: MakeOperator) -> None:
    with pytest.raises(RuntimeError, match=r"some_op: no backend can serve .*red.*green.*blue"):
        make_operator(native="red", triton="green", reference="blue").choose(CALL)


def test_the_innermost_use_backend_wins(make_operator: MakeOperator) -> None:
    operator = make_operator()
    chosen = [operator.choose(CALL).backend]
    with use_backend("triton"):
        chosen.append(operator.choose(CALL).backend)
        with use_backend("reference"):
            chosen.append(operator.choose(CALL).backend)
        chosen.append(operator.choose(CALL).backend)
    chosen.append(operator.choose(CALL).backend)
    assert chosen == ["native", "triton", "reference", "triton", "native"]


def test_use_backend_ends_with_an_exception(make_operator: MakeOperator) -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert make_operator().choose(CALL).backend == "native"


def test_use_backend_holds_for_its_own_thread(make_operator: MakeOperator) -> None:
    operator, chosen = make_operator(), []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: chosen.append(operator.choose(CALL).backend))
        thread.start()
        thread.join()
    assert chosen == ["native"]


def test_the_argument_wins_over_use_backend(make_operator: MakeOperator) -> None:
    with use_backend("triton"):
        decision = make_operator().decide(CALL, "reference")
    assert decision.implementation.backend == "reference"
    assert decision.because == "the backend= argument"


def test_an_explicit_choice_that_cannot_serve_raises(make_operator: MakeOperator) -> None:
    operator = make_operator(triton="no GPU")
    assert operator.choose(CALL).backend == "native"
    with pytest.raises(RuntimeError, match=r"some_op: backend 'triton' \(the backend= argument\).*: no GPU"):
        operator.choose(CALL, "triton")
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' \(use_backend\).*: no GPU"):
        operator.choose(CALL)


def test_an_operator_raises_for_a_backend_that_cannot_serve() -> None:
    operator = backends.operators()["embedding_bag"]
    with pytest.raises(RuntimeError, match=r"embedding_bag: backend 'triton' .* cannot serve this call"):
        operator.choose(Call("xpu", torch.float32), "triton")


@pytest.mark.parametrize("name", ["cudnn", ""])
def test_an_unknown_backend_raises(make_operator: MakeOperator, name: str) -> None:
    operator = make_operator()
    operator.choose(CALL)
    with pytest.raises(ValueError, match=f"backend: expected one of .*'reference'.*, got '{name}'"):
        operator.choose(CALL, name)
    with (
        pytest.raises(ValueError, match=f"use_backend: name: expected one of .*, got '{name}'"),
        use_backend(name),
    ):
        pass
    with pytest.raises(ValueError, match=r"some_op: unknown backends \['cudnn'\]"):
        Operator("some_op", [Implementation("cudnn", lambda: None, lambda call: None)], lambda: CALL)


def test_a_backend_that_the_operator_lacks_raises() -> None:
    operator = Operator(
        "small_op", [Implementation("reference", lambda: None, lambda call: None)], lambda: CALL
    )
    with pytest.raises(
        ValueError, match=r"small_op: expected backend to be one of \['reference'\], got 'native'"
    ):
        operator.choose(CALL, "native")


def test_each_rejected_backend_is_logged_once(
    make_operator: MakeOperator, caplog: pytest.LogCaptureFixture
) -> None:
    operator = make_operator(native="not built", triton="no GPU")
    with caplog.at_level(logging.DEBUG, "recsys_ops"):
        for _ in range(3):
            assert operator.choose(CALL).backend == "reference"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "some_op: reference serves float32 calls on cpu; not native: not built"),
        ("INFO", "some_op: reference serves float32 calls on cpu; not triton: no GPU"),
    ]


def test_a_choice_that_the_user_made_is_not_logged(
    make_operator: MakeOperator, caplog: pytest.LogCaptureFixture
) -> None:
    operator = make_operator()
    with caplog.at_level(logging.DEBUG, "recsys_ops"), use_backend("reference"):
        operator.choose(CALL)
        operator.choose(CALL, "triton")
    with caplog.at_level(logging.DEBUG, "recsys_ops"):
        operator.choose(CALL)
    assert caplog.records == []


def test_explain_takes_a_name_or_a_function() -> None:
    ids, weight = torch.tensor([[0, 1]]), torch.ones(4, 2, dtype=torch.float64)
    explanation = recsys_ops.explain("embedding_bag", ids, weight, mode="sum", backend="reference")
    assert explanation == recsys_ops.explain(recsys_ops.embedding_bag, ids, weight, backend="reference")
    assert explanation.call == Call("cpu", torch.float64)
    assert (explanation.chosen, explanation.because) == ("reference", "the backend= argument")


def test_explain_prints_the_choice_and_every_rejection() -> None:
    with use_backend("reference"):
        text = str(recsys_ops.explain("embedding_bag", torch.tensor([[0]]), torch.ones(4, 2)))
    assert text.splitlines()[0] == "embedding_bag on cpu, float32: reference"
    for name in ("native", "triton"):
        assert f"rejected   {name}: not asked for (use_backend)" in text


def test_explain_says_what_a_call_does() -> None:
    operator = backends.operators()["embedding_bag"]
    explanation = recsys_ops.explain("embedding_bag", torch.tensor([[0]]), torch.ones(4, 2))
    assert explanation.chosen == operator.choose(explanation.call).backend
    assert {explanation.chosen, *explanation.rejected} == set(operator.implementations)


def test_explain_refuses_an_unknown_operator() -> None:
    with pytest.raises(
        ValueError, match=r"explain: expected op to be one of \['embedding_bag'.*, got 'softmax'"
    ):
        recsys_ops.explain("softmax")


def test_survey_agrees_with_the_operators() -> None:
    call = Call("xpu", torch.float32)
    survey = backends.survey(call)
    assert set(survey) == set(backends.operators())
    assert survey["embedding_bag"]["reference"] is None
    assert "xpu" in str(survey["embedding_bag"]["triton"])


def _run(code: str, backend: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, backends.ENVIRONMENT_VARIABLE: backend}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_environment_variable_comes_last() -> None:
    done = _run(
        "import torch, recsys_ops\n"
        "call = 'embedding_bag', torch.tensor([[0]]), torch.ones(2, 2)\n"
        "from_environment = recsys_ops.explain(*call)\n"
        "print(from_environment.chosen, from_environment.because)\n"
        "from recsys_ops import backends\n"
        "backends.BACKENDS['native'] = lambda: None\n"
        "with recsys_ops.use_backend('native'):\n"
        "    print(recsys_ops.explain(*call).chosen)\n",
        "reference",
    )
    assert done.stdout.splitlines() == ["reference RECSYS_OPS_BACKEND", "native"], done.stderr


def test_a_wrong_environment_variable_raises_at_the_first_call() -> None:
    done = _run(
        "import torch, recsys_ops\n"
        "try:\n"
        "    recsys_ops.embedding_bag(torch.tensor([[0]]), torch.ones(2, 2))\n"
        "except ValueError as error:\n"
        "    print(error)\n",
        "fast",
    )
    assert done.stdout.startswith("RECSYS_OPS_BACKEND: expected one of "), done.stderr
    assert done.stdout.endswith("got 'fast'\n")
