"""``inspect``, ``push``, ``doctor``, ``explain``, ``audit``: what an artifact is and does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_adainfer.cli.app import command
from vllm_adainfer.cli.arguments import HfOverrides, Lora, Model, Template, overrides_of

if TYPE_CHECKING:
    from vllm_adainfer.offline.doctor.finding import Finding


@command
def inspect(
    artifact: Annotated[str, typer.Argument(help="Directory or hub id of the artifact.")],
    html: Annotated[
        Path | None, typer.Option(help="Also write it here as a single HTML page.")
    ] = None,
) -> None:
    """Print what an artifact is for and what it promises."""
    from vllm_adainfer.artifact.files import load_artifact_config, load_details
    from vllm_adainfer.offline.facts.artifact import artifact_facts
    from vllm_adainfer.offline.facts.document import as_text
    from vllm_adainfer.offline.reports.page import check_installed

    if html is not None:
        check_installed()
    config, details = load_artifact_config(artifact), load_details(artifact)
    if html is not None:
        from vllm_adainfer.offline.evaluation.report import write_whole
        from vllm_adainfer.offline.reports.contents import artifact_page

        write_whole(html, artifact_page(config, details))
    typer.echo(as_text(artifact_facts(config, details)))


@command
def push(
    artifact: Annotated[Path, typer.Argument(help="Directory of the artifact.")],
    repo: Annotated[str, typer.Argument(help="Hub id, such as org/name.")],
    private: Annotated[bool, typer.Option(help="If the repository is created.")] = True,
    base_model: Annotated[
        str, typer.Option(help="Hub id of the model, if it was calibrated from a directory.")
    ] = "",
) -> None:
    """Upload an artifact to the hub; print the id and commit that --policy takes."""
    from vllm_adainfer.offline.push import push as upload

    typer.echo(upload(artifact, repo, private, base_model))


@command
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of the model to serve.")
    ] = None,
    artifact: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub id of its artifact. Given both, doctor starts an engine."
        ),
    ] = None,
    lora: Lora = "",
    hf_overrides: HfOverrides = "",
    auto: Annotated[
        str | None, typer.Option(help="Directory of a server that calibrates itself.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, at the end.")] = False,
) -> None:
    """Check installation, artifact and model, one line per check; exit with 1 if one failed."""
    from vllm_adainfer.offline.adapter import read_adapter
    from vllm_adainfer.offline.doctor.checks import examine

    found = []
    overrides = overrides_of(hf_overrides)
    findings = examine(model, artifact, read_adapter(lora), overrides)
    for finding in chain(findings, _of_auto(auto)):
        found.append(finding)
        if not as_json:
            typer.echo(finding)
    failed = any(finding.failed for finding in found)
    if as_json:
        checks = [finding.as_dict() for finding in found]
        typer.echo(json.dumps({"ok": not failed, "checks": checks}, indent=2))
    if failed:
        raise typer.Exit(1)


def _of_auto(directory: str | None) -> Iterator[Finding]:
    if directory is not None:
        from vllm_adainfer.offline.doctor.auto import examine_auto

        yield from examine_auto(directory)


@command
def explain(
    text: Annotated[str, typer.Argument(help="The prompt; with --template its field 'text'.")],
    model: Model,
    artifact: Annotated[str, typer.Option(help="Directory or hub id of the artifact.")],
    hf_overrides: HfOverrides = "",
    template: Template = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Bound to explain; by default the artifact's own.")
    ] = None,
    lora: Lora = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what the policy sees of one prompt at each exit point, and where it exits."""
    from vllm_adainfer.offline.adapter import read_adapter
    from vllm_adainfer.offline.reports.explain import explain as run

    overrides = overrides_of(hf_overrides)
    found = run(text, model, artifact, template, epsilon, read_adapter(lora), overrides)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    for line in str(found).splitlines():
        exits = line.endswith("exits")
        typer.secho(line, bold=exits, fg=typer.colors.GREEN if exits else None)


@command
def audit(
    paths: Annotated[
        list[Path],
        typer.Argument(help='Files of an audit, or the directory named by "audit" in the switch.'),
    ],
) -> None:
    """Print where the answers of a server came from: by policy and bound, early or not."""
    from vllm_adainfer.offline.reports.audit import read_audit, summed_up

    typer.echo(summed_up(read_audit(paths)))
