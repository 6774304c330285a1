"""A page: figures and tables that follow one slider over the bounds, in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from vllm_adainfer.offline.reports.views import View


@dataclass(frozen=True)
class Panel:
    """A figure, and what it shows at each bound.

    Attributes:
        name: of its place in the page, a word.
        title: in words.
        figure: as at the bound that the page opens with.
        chosen: index of the trace that moves with the slider; None if nothing moves.
        points: by level, the x and y of that trace.

    """

    name: str
    title: str
    figure: Figure
    chosen: int | None = None
    points: Sequence[tuple[Sequence[Any], Sequence[Any]]] = ()


@dataclass(frozen=True)
class Changed:
    """A prompt whose answer differs from full depth's at some bound.

    Attributes:
        level: index of the bound.
        place: of the row in the data.
        prompt: its text.
        full: the answer at full depth.
        early: the other one.
        views: what the policy saw; empty for generated text.

    """

    level: int
    place: str
    prompt: str
    full: str
    early: str
    views: Sequence[View] = ()


@dataclass(frozen=True)
class Page:
    """All that a page shows.

    Attributes:
        title: its heading.
        subtitle: a line below it.
        levels: the bounds in words, strictest first.
        opens_with: index of the level that the slider stands at first.
        numbers: by level, names and values of what is measured there.
        panels: the figures.
        changed: prompts with other answers, for all levels; None where they are left out.
        notes: sentences below the prompts.
        provenance: of the measurement.

    """

    title: str
    subtitle: str
    levels: Sequence[str]
    opens_with: int
    numbers: Sequence[Mapping[str, str]]
    panels: Sequence[Panel]
    changed: Sequence[Changed] | None
    provenance: Mapping[str, Any]
    notes: Sequence[str] = ()

    def html(self) -> bytes:
        """The file, which loads nothing from elsewhere."""
        folder = files(__package__)
        environment = Environment(autoescape=True, undefined=StrictUndefined)
        environment.policies["json.dumps_kwargs"] = {}  # in the order of the page
        template = environment.from_string(folder.joinpath("page.html.j2").read_text())
        shown = {
            "levels": [
                {"name": name, "numbers": dict(numbers)}
                for name, numbers in zip(self.levels, self.numbers, strict=True)
            ],
            "panels": [
                {
                    "name": panel.name,
                    "figure": panel.figure.to_plotly_json(),
                    "chosen": panel.chosen,
                    "points": [{"x": list(x), "y": list(y)} for x, y in panel.points],
                }
                for panel in self.panels
            ],
        }
        return template.render(
            page=self,
            shown=shown,
            plotly=Markup(get_plotlyjs()),
            style=Markup(folder.joinpath("page.css").read_text()),
            script=Markup(folder.joinpath("page.js").read_text()),
        ).encode()
