"""A page: facts and figures in a single HTML file; a slider over bounds moves some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from vllm_adainfer.offline.facts.document import Block, Facts
from vllm_adainfer.offline.reports.figures import Panel
from vllm_adainfer.offline.reports.views import View


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
class Section:
    """A part of a page that does not follow the slider.

    Attributes:
        title: its heading.
        blocks: what it says.
        panels: its figures.

    """

    title: str
    blocks: Sequence[Block] = ()
    panels: Sequence[Panel] = ()


@dataclass(frozen=True)
class Page:
    """The content of a page.

    Attributes:
        title: the heading.
        subtitle: the line below the heading.
        sections: what does not follow the slider, last.
        levels: for each bound, strictest first: its name, and its facts; none without a slider.
        opens_with: index of the bound at which the slider starts.
        panels: the figures that follow the slider.
        changed: prompts whose answers changed, for all bounds; None leaves the table out.
        notes: sentences below the prompts.

    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    levels: Sequence[tuple[str, Facts]] = ()
    opens_with: int = 0
    panels: Sequence[Panel] = ()
    changed: Sequence[Changed] | None = None
    notes: Sequence[str] = ()

    def html(self) -> str:
        """The HTML file, which loads nothing from elsewhere."""
        folder = files(__package__)
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        environment.policies["json.dumps_kwargs"] = {}  # keep the order of keys
        template = environment.from_string(folder.joinpath("page.html.j2").read_text())
        panels = chain(self.panels, *(section.panels for section in self.sections))
        return template.render(
            page=self,
            data={"levels": self.levels, "panels": [vars(panel) for panel in panels]},
            plotly=Markup(get_plotlyjs()),
            style=Markup(folder.joinpath("page.css").read_text()),
            script=Markup(folder.joinpath("page.js").read_text()),
        )


def provenance_section(provenance: Mapping[str, Any]) -> Section:
    """Where results come from, see `offline.provenance`."""
    return Section("Provenance", [{name: _spelled(value) for name, value in provenance.items()}])


def _spelled(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return " ".join(value) if isinstance(value, list | tuple) else str(value)
