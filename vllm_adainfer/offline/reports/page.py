"""A page: facts and figures in a single HTML file; a slider over bounds moves some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from itertools import chain
from typing import Any

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.facts.document import Block, Facts
from vllm_adainfer.offline.reports.figures import Panel

LIBRARIES = "jinja2", "plotly"  # serving does without them
Section = tuple[str, Sequence[Block], Sequence[Panel]]
"""A heading with facts and figures that do not follow the slider."""


def check_installed() -> None:
    """An AdaInferError if a library for HTML pages is missing, before any long work starts."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise AdaInferError(
            f"an HTML page needs {' and '.join(missing)}: pip install 'vllm-adainfer[reports]'"
        )


def html_page(
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    levels: Sequence[tuple[str, Facts]] = (),
    opens_with: int = 0,
    panels: Sequence[Panel] = (),
    changed: Sequence[Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The HTML file, which loads nothing from elsewhere.

    Args:
        title: the heading.
        subtitle: the line below the heading.
        sections: the parts that do not follow the slider, last.
        levels: name and facts of each bound, strictest first; none without a slider.
        opens_with: index of the bound at which the slider starts.
        panels: the figures that follow the slider.
        changed: prompts whose answers changed, see `changed_prompts`; None leaves the table out.
        notes: sentences below the prompts.

    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    folder = files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {}  # keep the order of keys
    template = environment.from_string(folder.joinpath("page.html.j2").read_text())
    return template.render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        levels=levels,
        opens_with=opens_with,
        panels=panels,
        changed=changed,
        notes=notes,
        data={"levels": levels, "panels": [*chain(panels, *(own for _, _, own in sections))]},
        plotly=Markup(get_plotlyjs()),
        style=Markup(folder.joinpath("page.css").read_text()),
        script=Markup(folder.joinpath("page.js").read_text()),
    )
