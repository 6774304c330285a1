"""Upload an artifact to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.source import CARD_FILE, FILES, STUDENT_FILES
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.write.card import SERVE
from vllm_adainfer.offline.served_model import HUB_ID

TRANSPORTS = ("httpx", "httpx2", "requests")  # what versions of huggingface_hub connect with


def push(directory: Path, repo: str, private: bool, base_model: str = "") -> str:
    """Upload an artifact, in one commit, and create the repository if there is none.

    Other files of the repository stay. `base_model` is the hub id of the model that the policy is
    for; empty takes that of the artifact's card, if it is a hub id.

    Returns:
        the id with the commit, which `--policy` takes: ``org/name@commit``.

    Raises:
        AdaInferError: it is no artifact, the id is none, or the hub refuses it.

    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if not directory.is_dir():
        raise AdaInferError(f"{directory} is not a directory: give what `calibrate` wrote")
    if not HUB_ID.fullmatch(repo):
        raise AdaInferError(f"{repo!r} is no hub id: give one such as org/name")
    load_artifact(str(directory))
    paths = [name for name in (*FILES, *STUDENT_FILES) if (directory / name).is_file()]
    content: dict[str, Path | bytes] = {name: directory / name for name in paths}
    if CARD_FILE in content:
        content[CARD_FILE] = card_for_hub(
            (directory / CARD_FILE).read_text(encoding="utf-8"), base_model, repo
        )
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(name, part) for name, part in content.items()],
            commit_message="Upload an early-exit policy",
        )
    except LocalTokenNotFoundError:
        raise AdaInferError("the hub needs a token: run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        fix = "check the token's rights and the name" if status in (401, 403) else "try again"
        raise AdaInferError(f"the hub refused {repo} with status {status}: {fix}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in TRANSPORTS:
            raise
        raise AdaInferError(
            f"the hub cannot be reached ({type(error).__name__}): try again"
        ) from None
    return f"{repo}@{commit.oid}"


def card_for_hub(card: str, base_model: str, repo: str) -> bytes:
    """A model card whose commands name `repo`, and whose base model is a hub id or not named.

    The hub takes no other base model.
    """
    from huggingface_hub import ModelCard

    changed = ModelCard(card)
    named = base_model or changed.data.get("base_model")
    is_hub_id = isinstance(named, str) and HUB_ID.fullmatch(named)
    changed.data["base_model"] = named if is_hub_id else None
    return str(changed).replace(SERVE, SERVE.replace("DIR", repo)).encode()
