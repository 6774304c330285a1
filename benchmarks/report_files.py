"""The files of a result: JSON, the same as a Markdown table, and perhaps a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from vllm_adainfer.offline.evaluation.report import write_whole


def write_report(output: Path, report: Any, table: str, plot: bytes | None = None) -> None:
    """Write `report` to `output`, `table` and `plot` (PNG) beside it, and print the table."""
    write_whole(output, (json.dumps(report, indent=2) + "\n").encode())
    write_whole(output.with_suffix(".md"), table.encode())
    if plot is not None:
        write_whole(output.with_suffix(".png"), plot)
    typer.echo(table)
