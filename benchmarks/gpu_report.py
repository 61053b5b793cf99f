"""What ``make gpu`` found: a short table, and the record that is committed."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recsys_ops._output import write_json
from recsys_ops.benchmarks.machine import describe_gpu, versions
from recsys_ops.benchmarks.registry import OURS
from recsys_ops.benchmarks.results import WIDTH, format_seconds

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
Json = dict[str, Any]


def write_report(folder: Path, parts: dict[str, Json]) -> None:
    """Print the tables; write ``<gpu>-<date>.json`` to benchmarks/results and to the folder.

    Args:
        folder: with what the parts have left: verify.json, bench.json.
        parts: how each ended, by name.
    """
    record = make_record(folder, parts)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, WIDTH))
    console.print(_parts_table(parts))
    if record["bench"]["rows"]:
        console.print(_bench_table(record["bench"]["rows"]))
    for verdict in record["bench"]["verdicts"]:
        if verdict["verdict"] == "missed":
            found = verdict["ratio"]["value"]
            line = f"missed: {verdict['workload']} against {verdict['peer']}: "
            console.print(Text(f"{line}{found:.2f}x of {verdict['minimum']:g}x"))
    gpu = re.sub("[^a-z0-9]+", "-", record["device"]["name"].lower()).strip("-")
    name = f"{gpu}-{record['date'][:10]}.json"
    for place in (ROOT / "benchmarks" / "results", folder):
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / name, record)
    console.print(Text(f"wrote benchmarks/results/{name}"))


def make_record(folder: Path, parts: dict[str, Json]) -> Json:
    """Everything that is known of the runs in a folder, and what they ran on."""
    verified, bench = (
        _read(folder / f"{part}.json") if part in parts else {} for part in ("verify", "bench")
    )
    rows = bench.get("rows", [])
    for row in rows:
        if row["figures"]:
            del row["figures"]["samples"]
    return {
        "schema": SCHEMA,
        "device": describe_gpu(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "parts": parts,
        "verify": {
            "complete": verified.get("complete"),
            "counts": {o["operator"]: _counts(o["counts"]) for o in verified.get("operators", [])},
            "failures": [failure["reproduce"] for failure in verified.get("failures", [])],
        },
        "sanitizer": parts.get("sanitize", {}).get("steps", {}),
        "bench": {
            "complete": bench.get("complete"),
            "served_by": bench.get("operators"),
            "ceilings": bench.get("ceilings"),
            "rows": rows,
            "verdicts": bench.get("verdicts") or [],
        },
    }


def _read(path: Path) -> Json:
    content: Json = json.loads(path.read_text()) if path.exists() else {}
    return content


def _counts(counts: list[Json]) -> dict[str, Json]:
    """Passed and failed examples of each target, over all checks."""
    return {
        target: {
            what: sum(cell[what] for cell in counts if cell["target"] == target)
            for what in ("passed", "failed")
        }
        for target in dict.fromkeys(cell["target"] for cell in counts)
    }


def _commit() -> str | None:
    """The commit that is checked out, marked where files differ from it; None outside of git."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _parts_table(parts: dict[str, Json]) -> Table:
    table = Table("part", "outcome", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("seconds", justify="right")
    table.add_column("")
    for name, part in parts.items():
        style = "red" if part["outcome"] in ("failed", "not run") else None
        table.add_row(name, part["outcome"], f"{part['seconds']:.0f}", Text(part["detail"]), style=style)
    return table


def _bench_table(rows: list[Json]) -> Table:
    """For each workload our time, our share of the limit, and how many times faster than each peer we are."""
    peers = list(dict.fromkeys(row["candidate"] for row in rows if row["ours_speedup"]))
    table = Table("workload", box=box.SIMPLE_HEAD, pad_edge=False, title="ours", title_justify="left")
    for heading in ("time", "of the limit", *(f"vs {peer.removeprefix(f'{OURS} ')}" for peer in peers)):
        table.add_column(heading, justify="right")
    for name in dict.fromkeys(row["workload"] for row in rows):
        found = {row["candidate"]: row for row in rows if row["workload"] == name}
        ours = found.get(OURS, {})
        figures = ours.get("figures")
        time = format_seconds(figures["seconds"]) if figures else ours.get("status", "")
        ratios = [found.get(peer, {}).get("ours_speedup") for peer in peers]
        table.add_row(
            name,
            time,
            f"{figures['of_limit']:.0%} {figures['bound_by']}" if figures else "",
            *(f"{ratio['value']:.2f}x" if ratio else "-" for ratio in ratios),
        )
    return table
