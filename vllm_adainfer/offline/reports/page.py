"""A page: figures and tables that follow one slider over the bounds, in a single HTML file."""

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

Points = tuple[Sequence[Any], Sequence[Any]]  # x and y


@dataclass(frozen=True)
class Panel:
    """A figure that follows the slider.

    Attributes:
        name: HTML id of the figure.
        title: title above the figure.
        figure: the figure at the bound that the page opens with.
        moving: index of the trace that follows the slider; None if none does.
        points: the points of that trace at each bound.

    """

    name: str
    title: str
    figure: Figure
    moving: int | None = None
    points: Sequence[Points] = ()


@dataclass(frozen=True)
class Changed:
    """A prompt whose answer at some bound differs from full depth.

    Attributes:
        level: index of the bound.
        place: where the row is in the data.
        prompt: text of the prompt.
        full: the answer at full depth.
        early: the answer at this bound.
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
    """The content of a page.

    Attributes:
        title: the heading.
        subtitle: the line below the heading.
        levels: for each bound, strictest first: its name, and the numbers to show by their names.
        opens_with: index of the bound at which the slider starts.
        panels: the figures.
        changed: prompts whose answers changed, for all bounds; None leaves the table out.
        provenance: where the results come from, see `offline.provenance`.
        notes: sentences below the prompts.

    """

    title: str
    subtitle: str
    levels: Sequence[tuple[str, Mapping[str, str]]]
    opens_with: int
    panels: Sequence[Panel]
    changed: Sequence[Changed] | None
    provenance: Mapping[str, Any]
    notes: Sequence[str] = ()

    def html(self) -> bytes:
        """The HTML file, which loads nothing from elsewhere."""
        folder = files(__package__)
        environment = Environment(autoescape=True, undefined=StrictUndefined)
        environment.policies["json.dumps_kwargs"] = {}  # keep the order of keys
        template = environment.from_string(folder.joinpath("page.html.j2").read_text())
        panels = [{**vars(panel), "figure": panel.figure.to_plotly_json()} for panel in self.panels]
        return template.render(
            page=self,
            data={"levels": self.levels, "panels": panels},
            plotly=Markup(get_plotlyjs()),
            style=Markup(folder.joinpath("page.css").read_text()),
            script=Markup(folder.joinpath("page.js").read_text()),
        ).encode()
