"""``vllm-adainfer serve``, ``bench`` and ``run-batch``: vLLM's own commands, with policies."""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_adainfer.cli.app import app, errors_as_sentences
from vllm_adainfer.errors import AdaInferError

COMMANDS = {
    "serve": "Serve MODEL with policies, or an artifact with its own model; all other arguments "
    "are those of vllm serve.",
    "bench": "Run vllm bench, such as bench throughput --model MODEL, with policies.",
    "run-batch": "Run vllm run-batch with policies.",
}


@errors_as_sentences
def launch(
    context: typer.Context,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Directory or hub id of an artifact, or NAME=DIR; repeat the option for several "
            "tasks."
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Bound to serve with; by default the artifact's own. 0 never exits."),
    ] = None,
    auto: Annotated[
        str | None,
        typer.Option(
            help="Instead of policies: the directory for policies that the server calibrates on "
            "its own traffic."
        ),
    ] = None,
) -> None:
    """Run the command of vLLM that the user named."""
    from vllm_adainfer.offline.launch import run_vllm, serve_arguments, with_switch

    command, arguments = str(context.info_name), context.args
    if command == "bench" and arguments[:1] == ["serve"]:  # a client, without an engine
        if policy or epsilon is not None or auto is not None:
            raise AdaInferError(
                "bench serve measures a running server: give --policy and --epsilon, or --auto, to "
                "vllm-adainfer serve"
            )
    else:
        prepared = serve_arguments if command == "serve" else with_switch
        arguments = prepared(arguments, policy or [], epsilon, auto)
    run_vllm([command, *arguments])


for name, description in COMMANDS.items():
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name, help=description, context_settings=settings)(launch)
