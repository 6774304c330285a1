"""A line chart over time, as SVG: no library, so that a server's own processes can draw it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]  # moment in seconds since 1970, and value
WIDTH, HEIGHT = 720, 150
LEFT, RIGHT, TOP, BOTTOM = 60, 10, 24, 20
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df")
MOST_POINTS = 500  # drawn of a line


@dataclass(frozen=True)
class Scale:
    """Where values lie in a chart.

    Attributes:
        start, end: the moments at its left and right.
        most: the value at its top; 0 is at the bottom.

    """

    start: float
    end: float
    most: float

    def x(self, moment: float) -> float:
        """Pixels from the left."""
        share = (moment - self.start) / max(self.end - self.start, 1e-9)
        return round(LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        share = min(1.0, max(0.0, value / max(self.most, 1e-9)))
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def line_chart(
    title: str,
    lines: Mapping[str, Points],
    marks: Sequence[tuple[float, str]],
    span: tuple[float, float],
    percent: bool = False,
) -> str:
    """The chart, as an SVG element.

    Args:
        title: heading.
        lines: points in the order of time, by name.
        marks: moments to mark with a vertical line, and what happened.
        span: the first and the last moment.
        percent: whether values are shares.

    """
    most = max((value for points in lines.values() for _, value in points), default=0.0) or 1.0
    scale = Scale(*span, most)
    top = f"{most:.1%}" if percent else f"{most:,.0f}"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        _text(0, 14, title, weight="600"),
        _text(LEFT - 6, TOP + 4, top, anchor="end"),
        _text(LEFT - 6, HEIGHT - BOTTOM, "0", anchor="end"),
        *(
            f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#d9dde3"/>'
            for y in (TOP, HEIGHT - BOTTOM)
        ),
        _text(LEFT, HEIGHT - 5, _moment(scale.start)),
        _text(WIDTH - RIGHT, HEIGHT - 5, _moment(scale.end), anchor="end"),
    ]
    for moment, what in marks:
        x = scale.x(moment)
        parts.append(
            f'<path d="M{x} {TOP}V{HEIGHT - BOTTOM}" stroke="#9aa4b2" stroke-dasharray="3 3">'
            f"<title>{escape(what)}, {_moment(moment)}</title></path>"
        )
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = " ".join(f"{scale.x(x)},{scale.y(y)}" for x, y in _thinned(points))
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT - 160 * number, 14, name, colour, "end"))
    return "".join([*parts, "</svg>"])


def _thinned(points: Points) -> list[tuple[float, float]]:
    """At most so many points that they can be told apart, the last one among them."""
    step = -(-len(points) // MOST_POINTS) or 1
    return [*points[:-1:step], *points[-1:]]


def _moment(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


def _text(
    x: float,
    y: float,
    text: str,
    colour: str = "#5b6472",
    anchor: str = "start",
    weight: str = "400",
) -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}" '
        f'font-size="11">{escape(text)}</text>'
    )
