"""``vllm-adainfer serve``, ``bench`` and ``run-batch``: vLLM's own commands, with policies."""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_adainfer.cli.app import app, errors_as_sentences
from vllm_adainfer.errors import AdaInferError

THEIR_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="Directory or hub id of an artifact, or NAME=DIR; repeat the option for several "
        "tasks.",
    ),
]
Epsilon = Annotated[
    float | None,
    typer.Option(help="Bound to serve with; by default the artifact's own. 0 never exits."),
]


@app.command(context_settings=THEIR_ARGUMENTS)
@errors_as_sentences
def serve(context: typer.Context, policy: Policies = None, epsilon: Epsilon = None) -> None:
    """Serve MODEL with policies; all other arguments are those of vllm serve."""
    _hand_over("serve", context, policy, epsilon)


@app.command(context_settings=THEIR_ARGUMENTS)
@errors_as_sentences
def bench(context: typer.Context, policy: Policies = None, epsilon: Epsilon = None) -> None:
    """Run vllm bench, such as bench throughput --model MODEL, with policies."""
    _hand_over("bench", context, policy, epsilon)


@app.command(context_settings=THEIR_ARGUMENTS)
@errors_as_sentences
def run_batch(context: typer.Context, policy: Policies = None, epsilon: Epsilon = None) -> None:
    """Run vllm run-batch with policies."""
    _hand_over("run-batch", context, policy, epsilon)


def _hand_over(
    command: str, context: typer.Context, policies: list[str] | None, epsilon: float | None
) -> None:
    from vllm_adainfer.offline.launch import run_vllm, with_switch

    arguments = context.args
    if command == "bench" and arguments[:1] == ["serve"]:  # a client, without an engine
        if policies or epsilon is not None:
            raise AdaInferError(
                "bench serve measures a running server: give --policy and --epsilon to "
                "vllm-adainfer serve"
            )
    else:
        arguments = with_switch(arguments, policies or [], epsilon)
    run_vllm([command, *arguments])
