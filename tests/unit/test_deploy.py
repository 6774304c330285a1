"""What is deployed sets what the plugin reads, and restarts as docs/operating.md says."""

from __future__ import annotations

import configparser
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from typer.main import get_command

from vllm_adainfer.cli import app
from vllm_adainfer.settings.engine import CONFIG_KEY, read_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
OPTION = "--additional-config="


def documents(name: str) -> list[Any]:
    return [*yaml.safe_load_all((DEPLOY / name).read_text())]


def arguments(name: str) -> list[str]:
    """The arguments of the server that a file starts."""
    first = documents(name)[0]
    if first.get("kind") == "Deployment":
        [container] = first["spec"]["template"]["spec"]["containers"]
        return [str(argument) for argument in container["args"]]
    if first.get("kind") == "InferenceService":
        [container] = first["spec"]["predictor"]["containers"]
        return [str(argument) for argument in container["args"]]
    [model] = first["servingEngineSpec"]["modelSpec"]
    return [str(argument) for argument in model["vllmConfig"]["extraArgs"]]


@pytest.mark.parametrize("name", ["kubernetes.yaml", "production-stack.yaml", "kserve.yaml"])
def test_the_engine_switch_is_one_that_the_plugin_reads(name):
    [given] = [one for one in arguments(name) if one.startswith(OPTION)]
    config = json.loads(given.removeprefix(OPTION))
    settings = read_settings(config)
    assert settings is not None
    assert settings.artifacts
    assert config.keys() == {CONFIG_KEY}


def test_the_service_finds_the_pods_and_the_probes_their_port():
    deployment, service, claim = documents("kubernetes.yaml")
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    [container] = pod["spec"]["containers"]
    [port] = container["ports"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    volumes = {one["name"] for one in pod["spec"]["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == volumes
    assert (
        claim["metadata"]["name"] == pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    )


def test_kserve_finds_the_server_at_the_port_that_it_listens_on():
    [service] = documents("kserve.yaml")
    [container] = service["spec"]["predictor"]["containers"]
    [port] = container["ports"]
    assert f"--port={port['containerPort']}" in arguments("kserve.yaml")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["containerPort"]}
    annotations = service["metadata"]["annotations"]
    assert annotations["prometheus.kserve.io/port"] == str(port["containerPort"])
    volumes = {one["name"] for one in service["spec"]["predictor"]["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == volumes


def test_systemd_always_restarts_a_command_that_exists():
    unit = configparser.ConfigParser(strict=False)
    unit.read(DEPLOY / "vllm-adainfer.service")
    service = unit["Service"]
    assert service["Restart"] == "always"
    command, *given = service["ExecStart"].split()
    assert Path(command).name == "vllm-adainfer"
    assert given[0] in get_command(app).commands  # type: ignore[attr-defined]


def test_the_image_has_the_version_of_vllm_that_is_supported():
    text = (DEPLOY / "Dockerfile").read_text()
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    [supported] = [Requirement(one) for one in project["optional-dependencies"]["cpu"]]
    [version] = re.findall(r"vllm-openai:v([\d.]+)", text)
    assert version in supported.specifier
