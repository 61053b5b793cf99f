"""The commands of ``recsys-ops``: arguments and their checks. The work is done where each imports it from."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from recsys_ops import __version__
from recsys_ops._output import write_json

app = typer.Typer(
    name="recsys-ops",
    help="Fused operators for PyTorch recommenders: check this machine, verify, measure, swap them in.",
    epilog="Exit codes: 0 all is well, 1 a finding, 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _known_op(value: str | None) -> str | None:
    from recsys_ops.backends import operators

    return _one_of(operators(), value)


def _known_backend(value: str | None) -> str | None:
    from recsys_ops.backends import BACKENDS

    return _one_of(BACKENDS, value)


def _one_of(known: Iterable[str], value: str | None) -> str | None:
    if value is not None and value not in known:
        raise typer.BadParameter(f"expected one of {', '.join(known)}, got {value!r}")
    return value


def _known_device(value: str) -> str:
    import torch

    try:
        return torch.device(value).type
    except RuntimeError:
        raise typer.BadParameter(f"expected a device such as cpu or cuda:0, got {value!r}") from None


def _known_dtype(value: str) -> str | None:
    return _one_of(("float32", "float16", "bfloat16", "float64"), value)


def _in_a_folder(value: str | None) -> str | None:
    if value not in (None, "-") and not Path(value).absolute().parent.is_dir():
        raise typer.BadParameter(f"expected a file in a folder that exists, got {value!r}")
    return value


Op = Annotated[str | None, typer.Option(callback=_known_op, help="Only this operator.")]
Backend = Annotated[str | None, typer.Option(callback=_known_backend, help="Only this backend.")]
Device = Annotated[
    str, typer.Option(callback=_known_device, help="Where the call's tensors are, such as cpu or cuda.")
]
DType = Annotated[str, typer.Option(callback=_known_dtype, help="The dtype of the call's weights.")]
JsonPath = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="PATH",
        callback=_in_a_folder,
        help="Also write the result as JSON; '-' is standard output, and the rest goes to standard error.",
    ),
]


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if problem := _wrong_environment():
        _fail(problem, 2)


def _wrong_environment() -> str | None:
    """What is wrong with a variable that every operator reads."""
    if not any(os.environ.get(name) for name in ("RECSYS_OPS_BACKEND", "RECSYS_OPS_SIMD")):
        return None
    from recsys_ops import _extension, backends

    backend = os.environ.get(backends.ENVIRONMENT_VARIABLE)
    if backend and backend not in backends.BACKENDS:
        known = ", ".join(backends.BACKENDS)
        return f"expected {backends.ENVIRONMENT_VARIABLE} to be one of {known}, got {backend!r}"
    try:
        if not _extension.missing():
            _extension.module().simd_level()
    except RuntimeError as error:
        return str(error)
    return None


@app.command("doctor", context_settings={"ignore_unknown_options": True}, add_help_option=False)
def _doctor(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    """Say what this machine and this installation can do, and what to mend."""
    from recsys_ops import doctor

    raise typer.Exit(doctor.main(arguments or []))


@app.command("ops", epilog="Example: recsys-ops ops --device cuda --dtype float16")
def _ops(device: Device = "cpu", dtype: DType = "float32", json_path: JsonPath = None) -> None:
    """List the operators, and for each backend whether it can serve here, or why not."""
    import torch

    from recsys_ops.backends import Call, survey

    operators = survey(Call(device, getattr(torch, dtype)))
    with _output(json_path) as (console, json_file):
        table = Table(title=f"Operators on {device}, {dtype}", title_justify="left")
        for heading in ("operator", "backend", "can serve"):
            table.add_column(heading)
        for name, backends in operators.items():
            for backend, reason in backends.items():
                table.add_row(name, backend, "yes" if reason is None else f"no: {reason}")
            table.add_section()
        console.print(table)
        _write(json_file, {"device": device, "dtype": dtype, "rejections": operators})


@app.command("explain", epilog="Example: recsys-ops explain embedding_bag --dtype bfloat16")
def _explain(
    op: Annotated[str, typer.Argument(callback=_known_op, help="An operator's name; see recsys-ops ops.")],
    device: Device = "cpu",
    dtype: DType = "float32",
    backend: Annotated[
        str | None, typer.Option(callback=_known_backend, help="Ask for this backend, as backend= does.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Tell which backend serves a call of an operator, and why the others do not."""
    import torch

    from recsys_ops.backends import Call, explain_call

    try:
        explanation = explain_call(op, Call(device, getattr(torch, dtype)), backend)
    except RuntimeError as error:
        _fail(str(error), 1)
    with _output(json_path) as (console, json_file):
        console.print(str(explanation), markup=False, highlight=False, soft_wrap=True)
        content = {
            "operator": explanation.operator,
            "device": device,
            "dtype": dtype,
            "chosen": explanation.chosen,
            "because": explanation.because,
            "rejected": explanation.rejected,
            "configuration": explanation.configuration,
        }
        _write(json_file, content)


@app.command("verify", epilog="Example: recsys-ops verify --op embedding_bag --backend native")
def _verify(
    op: Op = None,
    backend: Backend = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases, for a first look.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the work.")] = 1,
    json_path: JsonPath = None,
) -> None:
    """Check every operator on this machine against its reference; exits 1 where one is wrong."""
    from recsys_ops.testing.verify import run_verify

    with _output(json_path) as (console, json_file):
        raise typer.Exit(run_verify(op, backend, json_file, console, quick, jobs))


@app.command("bench", epilog="Example: recsys-ops bench embedding_bag --html bench.html")
def _bench(
    op: Annotated[str | None, typer.Argument(callback=_known_op, help="Only this operator.")] = None,
    device: Annotated[
        str, typer.Option(callback=_known_device, help="Where to measure: cpu or cuda.")
    ] = "cpu",
    html: Annotated[
        str | None,
        typer.Option(metavar="PATH", callback=_in_a_folder, help="Write a report with plots, in one file."),
    ] = None,
    filter_: Annotated[
        str | None, typer.Option("--filter", help="Only these workloads: a glob, or a part of their names.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer workloads, shorter timings.")] = False,
    check_targets: Annotated[
        bool, typer.Option("--check-targets", help="Also tell which of the targets aimed at were reached.")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """Measure operators against this machine's limits and against what one would use instead."""
    from recsys_ops.benchmarks import run_bench

    with _output(json_path) as (console, json_file):
        code = run_bench(op, json_file, html, filter_, quick, check_targets, console, device)
        for path in (json_path, html) if code != 2 else ():
            if path not in (None, "-"):
                console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(code)


def _known_targets(values: list[str] | None) -> list[str] | None:
    from recsys_ops.inspection import TARGETS

    known = dict.fromkeys(target for targets in TARGETS.values() for target in targets)
    for value in values or ():
        _one_of(known, value)
    return values


def _compiled_backend(value: str | None) -> str | None:
    from recsys_ops.inspection import TARGETS

    return _one_of(TARGETS, value)


@app.command("inspect", epilog="Example: recsys-ops inspect --op embedding_bag --arch sm_90 --arch sm_90a")
def _inspect(
    op: Op = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(callback=_known_targets, help="Only for this GPU, such as sm_90a; may be repeated."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(callback=_compiled_backend, help="Only this backend: triton or cuda.")
    ] = None,
    record: Annotated[bool, typer.Option("--record", help="Expect from now on what is found now.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Compile the GPU kernels, no GPU needed, and tell what became of them; exits 1 where one got worse."""
    from recsys_ops.inspection import TARGETS
    from recsys_ops.inspection.command import run_inspect

    if backend and arch and not set(arch) & set(TARGETS[backend]):
        known = ", ".join(TARGETS[backend])
        raise typer.BadParameter(f"expected --arch to be one of {known} for --backend {backend}")
    with _output(json_path) as (console, json_file):
        try:
            code = run_inspect(op, arch, backend, record, json_file, console)
        except (RuntimeError, OSError) as error:
            _fail(str(error), 1)
        raise typer.Exit(code)


@app.command(
    "accelerate", epilog="Example: recsys-ops accelerate my_model:build_model --inputs my_model:make_inputs"
)
def _accelerate(
    model: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="Returns the model.")],
    inputs: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Returns sample inputs, to measure with."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only modules named so, such as 'bags.*'.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No modules named so.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Swap the slow modules of a model, prove the swaps equal, and keep those that are faster."""
    from recsys_ops.accelerate import run_accelerate

    with _output(json_path) as (console, json_file):
        raise typer.Exit(run_accelerate(model, inputs, include, exclude, json_file, console))


@app.command(
    "demo", epilog="Example: recsys-ops demo --data sales.csv --user customer --item sku --time date"
)
def _demo(
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A CSV file of purchases instead of the built-in ones."),
    ] = None,
    user: Annotated[str, typer.Option(metavar="COLUMN", help="The column that tells who bought.")] = "user",
    item: Annotated[str, typer.Option(metavar="COLUMN", help="The column that tells what.")] = "item",
    time: Annotated[str, typer.Option(metavar="COLUMN", help="The column that tells when.")] = "time",
    quantity: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column that tells how many; without it, 1.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the report goes.")] = Path(
        "demo-report"
    ),
    epochs: Annotated[
        int,
        typer.Option(min=0, help="Of the sequence recommenders, which take most of the time; 0 skips them."),
    ] = 3,
    json_path: JsonPath = None,
) -> None:
    """Train recommenders on real purchases, before and after the swap; writes a report with plots."""
    from recsys_ops.demo import run_demo
    from recsys_ops.demo.tasks import Settings

    settings = Settings(sequence_epochs=epochs)
    with _output(json_path) as (console, json_file):
        raise typer.Exit(run_demo(data, user, item, time, quantity, output, json_file, console, settings))


def _fail(problem: str, code: int) -> NoReturn:
    print(f"recsys-ops: {problem}", file=sys.stderr)
    raise typer.Exit(code)


@contextlib.contextmanager
def _output(json_path: str | None) -> Iterator[tuple[Console, Path | None]]:
    """Where a command prints, and the file for its JSON; for '-' one that ends up on standard output."""
    if json_path != "-":
        yield Console(), None if json_path is None else Path(json_path)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        try:
            yield Console(stderr=True), file
        finally:
            if file.exists():
                sys.stdout.write(file.read_text())


def _write(file: Path | None, content: Any) -> None:
    if file is not None:
        write_json(file, content)
