"""An artifact goes to a hub and comes back from there, as `--policy` reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub import Hub, hub
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.source import FILES
from vllm_adainfer.offline.calibration.write.card import SERVE

DIGEST = (
    "-c",
    "import sys; from vllm_adainfer.artifact.files import load_artifact; "
    "print(load_artifact(sys.argv[1]).digest)",
)

SERVED = (
    "-c",
    "import sys; from vllm_adainfer.offline.launch import serve_arguments; "
    "print(serve_arguments(sys.argv[1:], [], None)[0])",
)


@pytest.fixture
def command(tmp_path):
    """Run the command line against a hub."""

    def command(
        server: Hub,
        *arguments: str,
        token: str = "secret",
        program: Sequence[str] = ("-m", "vllm_adainfer.cli"),
    ) -> tuple[int, str]:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, *program, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout if done.returncode == 0 else done.stderr

    return command


def test_what_is_pushed_is_what_is_served(command, tiny_policy):
    with hub() as server:
        code, told = command(server, "push", str(tiny_policy), "org/mood", "--base-model", "org/m")
        assert code == 0, told
        source = f"org/mood@{server.commits['org/mood']}"
        assert told.split()[-1] == source
        files = server.files["org/mood"]
        assert files.keys() == {name for name in FILES if (Path(tiny_policy) / name).is_file()}
        assert server.private["org/mood"]
        for name in files.keys() - {"README.md"}:
            assert files[name] == (Path(tiny_policy) / name).read_bytes()
        for served in ("org/mood", source):
            code, found = command(server, served, program=DIGEST)
            assert (code, found.strip()) == (0, load_artifact(str(tiny_policy)).digest)
            assert command(server, served, program=SERVED) == (0, "org/m\n")
        assert command(server, "org/other", program=SERVED) == (0, "org/other\n")


def test_the_card_names_a_model_of_the_hub_or_none(tmp_path):
    from vllm_adainfer.offline.push import card_for_hub

    for named, asked, kept in [
        ("tiny-llama", "", None),
        ("tiny-llama", "org/m", "org/m"),
        ("org/base", "", "org/base"),
    ]:
        card = f"---\nbase_model: {named}\ntags: [vllm]\n---\n\n# Policy\n\n{SERVE}\n"
        found = ModelCard(card_for_hub(card, asked, "org/mood").decode())
        assert (found.data.base_model, found.data.tags) == (kept, ["vllm"])
        assert "# Policy" in found.text
        assert "vllm-adainfer serve org/mood" in found.text


def test_what_cannot_be_pushed_is_refused_with_what_to_do(command, tiny_policy, tmp_path):
    with hub() as server:
        for arguments, said in [
            ((str(tmp_path / "no"), "org/mood"), "is not a directory: give what `calibrate` wrote"),
            ((str(tmp_path), "org/mood"), "has no config.json"),
            ((str(tiny_policy), "not an id"), "is no hub id: give one such as org/name"),
        ]:
            code, told = command(server, "push", *arguments)
            assert (code, said in told) == (1, True), told
        code, told = command(server, "push", str(tiny_policy), "org/mood", token="wrong")
        assert (code, "refused org/mood with status 401" in told) == (1, True), told
        assert server.files == {}
    code, told = command(server, "push", str(tiny_policy), "org/mood")  # it listens no more
    assert (code, "the hub cannot be reached (ConnectError): try again" in told) == (1, True), told
