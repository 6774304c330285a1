"""The reference pages, generated from the code that they describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.cli import app
from vllm_adainfer.frontend.series import register_series
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.settings.engine import Switch


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


def cli() -> str:
    """All commands with their options."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="vllm-adainfer")
    page: str = get_docs_for_click(
        obj=command, ctx=context, name="vllm-adainfer", title="Command line"
    )
    return page


def settings() -> str:
    """Keys of the engine switch."""
    return (
        '# Engine switch\n\nThe value of `additional_config["adainfer"]`. '
        "[Serving](../serving.md#the-engine-switch) says how to set it.\n\n" + _fields(Switch)
    )


def artifact() -> str:
    """Keys of an artifact's ``config.json``."""
    return (
        "# Artifacts\n\nThe keys of `config.json`; the tensors are in "
        "`policy.safetensors`. [Artifacts are data](../serving.md#artifacts-are-data).\n\n"
        + _fields(ArtifactConfig)
    )


def metrics() -> str:
    """Series on ``/metrics``."""
    rows = []
    for metric in register_series((1,), choices=True, kinds=True, drafts=True).values():
        [family] = metric.describe()
        suffix = "_total" if family.type == "counter" else ""
        labels = ", ".join(f"`{name}`" for name in metric._labelnames)
        rows.append(
            {
                "series": f"`{family.name}{suffix}`",
                "type": family.type,
                "labels": labels,
                "meaning": family.documentation,
            }
        )
    return "# Metrics\n\n" + markdown_table(rows, 4)


def _fields(model: type[BaseModel]) -> str:
    """A table of the fields of `model`, then of the models that they refer to."""
    schema = model.model_json_schema()
    parts = [_table(schema)]
    for name, part in schema.get("$defs", {}).items():
        parts += [f"## {name}", part.get("description", "").split("\n\n")[0], _table(part)]
    return "\n\n".join(parts) + "\n"


def _table(schema: dict[str, Any]) -> str:
    rows = []
    for name, field in schema["properties"].items():
        default = "" if "default" not in field else f"`{field['default']}`"
        if name in schema.get("required", ()):
            default = "required"
        text = field.get("description", "").replace("|", "\\|").replace("\n", " ")
        kind = _type(field)
        rows.append({"key": f"`{name}`", "type": kind, "default": default, "meaning": text})
    return markdown_table(rows, 4)


def _type(field: dict[str, Any]) -> str:
    """A field's type in words."""
    if kinds := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_type(part) for part in kinds if part.get("type") != "null")
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        item = field.get("items") or next(iter(field.get("prefixItems", [{}])))
        return f"list of {_type(item)}"
    if field.get("type") == "object":
        return "object"
    return str(field.get("type", field.get("const", "")))


PAGES: dict[str, Callable[[], str]] = {
    "cli": cli,
    "settings": settings,
    "metrics": metrics,
    "artifact": artifact,
}
