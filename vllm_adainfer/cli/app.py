"""The command-line application, and what its commands share."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from vllm_adainfer import __version__
from vllm_adainfer.errors import AdaInferError

VLLMS_OWN = ("serve", "bench", "run-batch")
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Early exit for stock vLLM: calibrate a policy, measure it, serve with it.",
)


def errors_as_sentences(command: Callable[..., None]) -> Callable[..., None]:
    """Print an `AdaInferError` as one sentence and exit with 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except AdaInferError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    return run


def command(run: Callable[..., None]) -> Callable[..., None]:
    """Add a command, by the name of its function."""
    return app.command()(errors_as_sentences(run))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Early exit for stock vLLM: calibrate a policy, measure it, serve with it."""
    if context.invoked_subcommand in VLLMS_OWN:
        return
    # Read when torch is imported. On a busy machine, threads that spin while they wait for each
    # other make a fit take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Show the progress bars of vLLM and transformers only on a terminal. vLLM's own commands keep
    # theirs: 0.32 divides by zero if this is set.
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
