"""What ``accelerate`` did to a model, as numbers and as a table."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import TYPE_CHECKING, Any

from recsys_ops.acceleration.checks import Parity
from recsys_ops.timing import Ratio

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SWAPPED, KEPT, PUT_BACK, DECLINED, JOINED = "swapped", "kept", "put back", "declined", "joined"
_STYLES = {SWAPPED: "green", KEPT: "green", PUT_BACK: "yellow", DECLINED: "dim", JOINED: "green"}


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """What happened to one lookup or layer.

    Attributes:
        name: qualified name of the module.
        kind: what it computes, for example ``"EmbeddingBag sum"``, ``"Embedding + mean"``, or of many
            tables ``"collection of 26"``, ``"fused collection of 26"``, ``"loop of 26 bags"``, or of
            Meta's layers ``"STU layer"`` and ``"HSTU layer"``.
        status: ``"swapped"`` without a check, for lack of sample inputs; ``"kept"``: swapped, proved and
            faster; ``"put back"``: swapped, then found wrong, not faster, or not reached by the samples;
            ``"declined"``: never swapped; ``"joined"``: one of the lookups of a collection that is
            swapped, which ``reason`` names.
        reason: why.
        forward: how many times faster its forward became, or None where not measured.
        step: the same for forward + backward, until sparse gradients are coalesced as optimizers
            need them; None where nothing is trained.
        parity: how far its results moved against how far they may, or None where not compared.
    """

    name: str
    kind: str
    status: str
    reason: str = ""
    forward: Ratio | None = None
    step: Ratio | None = None
    parity: Parity | None = None


@dataclasses.dataclass(frozen=True)
class AccelerateReport:
    """What ``accelerate`` did to a model; ``str()`` gives a table.

    Attributes:
        modules: one entry per lookup or layer, in the order of ``named_modules``.
        forward, step, parity: as in ``ModuleReport``, of the whole model with the swaps that it ended up
            with; None where it ended up with none or had no sample inputs.
    """

    modules: tuple[ModuleReport, ...]
    forward: Ratio | None = None
    step: Ratio | None = None
    parity: Parity | None = None

    @property
    def accelerated(self) -> tuple[str, ...]:
        """The names of the modules that are swapped now."""
        return tuple(m.name for m in self.modules if m.status in (SWAPPED, KEPT))

    @property
    def agrees(self) -> bool:
        """Whether every comparison made stayed within its budget."""
        parities = [self.parity, *(m.parity for m in self.modules)]
        return all(parity is None or parity.holds for parity in parities)

    def to_dict(self) -> dict[str, Any]:
        """The report in numbers, strings, lists and dicts, ready for ``json.dumps``."""
        return {
            **_plain(dataclasses.asdict(self)),
            "accelerated": list(self.accelerated),
            "agrees": self.agrees,
        }

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=100, color_system=None).print(self)
        return text.getvalue().rstrip("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        if not self.modules:
            yield Text("No lookups found: no EmbeddingBag, no Embedding, and no layer of HSTU.")
            return
        measured = any(m.forward or m.parity for m in self.modules)
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("module", max_width=26, overflow="fold")
        table.add_column("lookup", max_width=16)
        table.add_column("status", no_wrap=True)
        if measured:
            table.add_column("forward", no_wrap=True)
            table.add_column("fwd + bwd", no_wrap=True)
            table.add_column("error /\nbudget", justify="right", no_wrap=True)
        table.add_column("why", overflow="fold")
        for m in self.modules:
            numbers = [_ratio(m.forward), _ratio(m.step), _share(m.parity)] if measured else []
            status = Text(m.status, style=_STYLES[m.status])
            table.add_row(Text(m.name or "(model)"), Text(m.kind), status, *numbers, Text(m.reason))
        yield table
        yield Text(self._summary())

    def _summary(self) -> str:
        alone = [m for m in self.modules if m.status != JOINED]
        what = "lookups and layers" if any(m.kind.endswith(" layer") for m in alone) else "lookups"
        lines = [f"\n{len(self.accelerated)} of {len(alone)} {what} swapped."]
        if not self.agrees:
            lines.append("What moved further than its budget was put back.")
        elif self.parity is not None:
            lines.append(f"Whole model, closest to its budget: {self.parity.detail}")
        elif self.accelerated:
            lines.append("Not compared and not measured: that needs sample_inputs.")
        for name, ratio in (("forward", self.forward), ("forward + backward", self.step)):
            if ratio is not None:
                lines.append(f"Whole model, {name}: {ratio}")
        return "\n".join(lines)


def _ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.value:.2f}x\n({ratio.low:.2f}-{ratio.high:.2f})"


def _share(parity: Parity | None) -> str:
    if parity is None:
        return ""
    if not parity.holds:
        return "fails"
    return f"{parity.error / parity.budget:.2f}" if parity.budget else "0.00"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
