"""Sums up the audit that a server writes: whose answers came from where."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_adainfer.artifact.kinds import NotCovered
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.facts.document import Table, as_text
from vllm_adainfer.settings.engine import NO_POLICY

SHOWN = 12  # characters of a digest
WHY: dict[NotCovered, str] = {
    "other_prompt": "their prompts lack the tokens that all prompts of its calibration share",
    "unknown_question": "their question is not among those that it knows",
}


class Line(BaseModel):
    """A line of the audit, or of lines that were lost; see `engine/scheduler/audit.py`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    policy: str | None = None
    artifact: str | None = None
    epsilon: float | None = None
    outcomes: dict[str, int] = {}
    layers: dict[int, int] = {}
    depth: int = 0
    ended: str | None = None
    lost: int = 0
    not_covered: NotCovered | None = None


def read_audit(paths: Iterable[Path]) -> Iterator[Line]:
    """The lines of files, or of the files of directories; an AdaInferError if one is no audit's."""
    for path in paths:
        files = sorted(path.glob("audit-*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise AdaInferError(
                f"{path} has no files audit-*.jsonl: name the directory that the engine switch "
                'has under "audit"'
            )
        for file in files:
            yield from _lines_of(file)


def _lines_of(file: Path) -> Iterator[Line]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, text in enumerate(lines, start=1):
                if not text.endswith("\n"):  # still being written, or cut short by a kill
                    return
                try:
                    yield Line.model_validate_json(text)
                except ValidationError:
                    raise AdaInferError(
                        f"{file}, line {number} is not a line of an audit: name a file that a "
                        "server has written"
                    ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise AdaInferError(f"cannot read {file}: {error}") from None


def summed_up(lines: Iterable[Line]) -> str:
    """A row for each policy and bound, then what has no answer."""
    sums: defaultdict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    unanswered: Counter[str] = Counter()
    not_covered: Counter[NotCovered] = Counter()
    lost = 0
    for line in lines:
        lost += line.lost
        if line.lost:
            continue
        if not line.outcomes:
            unanswered[line.ended or "running"] += 1
            continue
        if line.not_covered is not None:
            not_covered[line.not_covered] += 1
        name = line.policy or NO_POLICY
        epsilon = "-" if line.epsilon is None else f"{line.epsilon:g}"
        found = sums[name, (line.artifact or "-")[:SHOWN], epsilon]
        found.update(line.outcomes)
        found["requests"] += 1
        found["run"] += sum(layers * count for layers, count in line.layers.items())
        found["possible"] += line.depth * sum(line.layers.values())
    rows = [
        {
            **dict(zip(("policy", "artifact", "epsilon"), key, strict=True)),
            "requests": str(found["requests"]),
            "tokens, early": str(found["early"]),
            "full depth": str(found["full_depth"]),
            "shadow": str(found["shadow"]),
            "layers saved, last token": f"{1 - found['run'] / max(1, found['possible']):.1%}",
        }
        for key, found in sorted(sums.items())
    ]
    parts = [as_text([Table(rows, 2)]) if rows else "no request has ended with an answer"]
    parts += [
        f"{count} requests ended without an answer ({reason})"
        for reason, count in sorted(unanswered.items())
    ]
    parts += [
        f"{count} requests for a policy's output ran at full depth, because {WHY[reason]}"
        for reason, count in sorted(not_covered.items())
    ]
    if lost:
        parts.append(f"{lost} lines were lost: they came faster than the disk took them")
    return "\n".join(parts)
