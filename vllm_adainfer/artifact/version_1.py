"""Configs of version 1, in which a promise and an output were fields beside all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS = (
    *("risk", "tolerance", "gates", "top_k", "label_mass"),
    *("candidates", "labels", "score_head", "label_pool", "choices", "undecided"),
)


def tagged(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config of version 2 that says the same; one that says two things at once is refused.

    A ValueError if it is no config of version 1.
    """
    kept = {name: value for name, value in values.items() if name not in FIELDS}
    flat = {name: values.get(name) for name in FIELDS}
    try:
        found = {"promise": _promise(flat), "output": _output(flat)}
    except (TypeError, KeyError) as error:
        raise ValueError(f"it is not of version 1 ({error!r})") from None
    return {**kept, "schema_version": 2, **found}


def _promise(flat: Mapping[str, Any]) -> dict[str, Any]:
    risk = flat["risk"] or "disagreement"
    own = {name: flat[name] for name in ("tolerance", "gates", "top_k") if flat[name]}
    if len(own) != (risk == "probability"):
        raise ValueError(
            'risk = "probability" needs a tolerance, gates or top_k, and one of them alone'
        )
    if flat["label_mass"] and "tolerance" not in own:
        raise ValueError("label_mass needs a tolerance")
    if "gates" in own:
        return {"kind": "gates", **own}
    if "top_k" in own:
        return {"kind": "first-documents", **dict(own["top_k"])}
    if own:
        return {"kind": "tolerance", **own, "label_mass": bool(flat["label_mass"])}
    return {"kind": "changed" if risk == "disagreement" else risk}


def _output(flat: Mapping[str, Any]) -> dict[str, Any]:
    labels, choices, head = flat["labels"] or (), flat["choices"], flat["score_head"]
    if bool(labels) != (flat["candidates"] == "labels"):
        raise ValueError('labels and candidates = "labels" need each other')
    if bool(choices) + bool(head) + bool(flat["label_pool"]) > 1:
        raise ValueError("choices, score_head and label_pool rule each other out")
    if flat["undecided"] and not choices:
        raise ValueError("undecided needs choices")
    ids = [dict(label)["token_id"] for label in labels]
    if choices:
        undecided = flat["undecided"] or ()
        columns = [*(dict(choice)["first_tokens"] for choice in choices), undecided]
        if ids != [column[0] for column in columns if column]:
            raise ValueError(
                "labels must be the first of the choices' first tokens, in their order"
            )
        return {"kind": "choices", "choices": choices, "undecided": undecided}
    if head:
        if ids != list(range(len(ids))):
            raise ValueError("labels of a score_head are its columns, in order")
        classes = [dict(label)["name"] for label in labels]
        return {"kind": "scores", "score_head": head, "classes": classes}
    if not labels:
        return {"kind": "tokens", "candidates": flat["candidates"]}
    return {"kind": "label-pool" if flat["label_pool"] else "labels", "labels": labels}
