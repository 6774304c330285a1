"""The tables of `gpu_model.py`, in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu_designs import BUILT, CONTEXT, DESIGNS, LEAVE_AT, POINTS
from vllm_adainfer.offline.facts.document import markdown_grid

Case = dict[str, dict[str, float | None]]  # of stock and of each design, see `gpu_designs.py`
EVEN = "breaks even at"
NAMES = [design.name for design in DESIGNS]
# At 64 rows in the desk check: stock; asked, none leaves; with exits.
CHECKED = (
    ("llama-1b", "decode", "1.65", "2.6-3.2", "2.0-2.6"),
    ("llama-8b", "decode", "7.7", "8.4-8.9", "5.8-6.3"),
    ("llama-1b", "64 x 16", "4", "5-5.5", "3.9-4.6"),
    ("llama-1b", "64 x 128", "25", "26.5", "17-18"),
    ("llama-8b", "64 x 128", "180", "182", "112-116"),
)


def tables(report: dict[str, Any]) -> str:
    """The whole text."""
    microseconds = report["counted_us"]
    return TEXT.format(
        context=CONTEXT,
        points=POINTS,
        leave_at=LEAVE_AT + 1,
        today=_decoding(
            report,
            ["stock", "nobody may exit", "asked, none leaves", "all leave", "half leave", EVEN],
            lambda case: [
                _time(case["stock"]["none"]),
                *(
                    _time(case[BUILT.name][column])
                    for column in ("nobody may exit", "none", "all", "half")
                ),
                _share(case[BUILT.name][EVEN]),
            ],
        ),
        none=_by_design(report, "none"),
        all=_by_design(report, "all"),
        half=_by_design(report, "half"),
        even=_decoding(
            report,
            NAMES,
            lambda case: [_share(case[name][EVEN]) for name in NAMES],
        ),
        prompts=_prompts(report["prompts"]),
        checked=_checked(report),
        batch=report["slower_host"]["batch"],
        slower=_slower(report["slower_host"]["decoding"]),
        ask=microseconds["ask"],
        decide=microseconds["decide"],
        cpu=report["provenance"]["cpu"],
        device="; ".join(
            f"{name} {microseconds[name]:.0f} us"
            for name in ("staging", "question", "cut", "tables")
        ),
        assumed=markdown_grid(
            ["assumed", "value", "from"],
            [[name, f"{value:g}", source] for name, (value, source) in report["assumed"].items()],
        ),
    )


def _decoding(
    report: dict[str, Any], columns: list[str], cells: Callable[[Case], list[str]]
) -> str:
    rows = [
        [name, str(batch), *cells(case)]
        for name, cases in report["decoding"].items()
        for batch, case in cases.items()
    ]
    return markdown_grid(["model", "batch", *columns], rows)


def _by_design(report: dict[str, Any], column: str) -> str:
    return _decoding(
        report,
        ["stock", *NAMES],
        lambda case: [
            _time(case["stock"]["none"]),
            *(_time(case[name][column]) for name in NAMES),
        ],
    )


def _prompts(cases: dict[str, dict[str, Any]]) -> str:
    rows = []
    for model, shapes in cases.items():
        for shape, case in shapes.items():
            stock = case["stock"]["none"]
            exits = [case[name]["fifths"] for name in NAMES]
            shown = [f"{_time(seconds)} ({stock / seconds:.2f}x)" for seconds in exits]
            rows.append([model, shape, _time(stock), _time(case["a"]["none"]), *shown])
    return markdown_grid(["model", "prompts", "stock", "a, none leaves", *NAMES], rows)


def _checked(report: dict[str, Any]) -> str:
    rows = []
    for model, shape, *theirs in CHECKED:
        is_decode = shape == "decode"
        case = report["decoding"][model][64] if is_decode else report["prompts"][model][shape]
        ours = case["stock"], case["a"], case["a"]
        columns = "none", "none", "all" if is_decode else "fifths"
        cells = [
            f"{_time(mine[column])} ({other})"
            for mine, column, other in zip(ours, columns, theirs, strict=True)
        ]
        rows.append([model, shape, *cells])
    return markdown_grid(["model", "step", "stock", "asked, none leaves", "with exits"], rows)


def _slower(models: dict[str, dict[str, Case]]) -> str:
    rows = [
        [model, times, _time(case["stock"]["none"])]
        + [_time(case["a"][column]) for column in ("none", "all")]
        + [_share(case[name][EVEN]) for name in NAMES]
        for model, cases in models.items()
        for times, case in cases.items()
    ]
    columns = ["stock", "a, none leaves", "a, all leave", *NAMES]
    return markdown_grid(["model", "host's times", *columns], rows)


def _time(milliseconds: float | None) -> str:
    assert milliseconds is not None
    return f"{milliseconds:.{2 if milliseconds < 10 else 1}f}"


def _share(share: float | None) -> str:
    return "never" if share is None else f"{share:.1%}"


TEXT = """# What exits should cost and save on an H100

**Predicted, not measured** (`benchmarks/gpu_model.py`): host and device are two queues. The host
runs ahead of the device by a step, as with vLLM's asynchronous scheduling, so in stock its work is
hidden behind a slower device. A read within a step takes that away.

## Decode steps as they are, milliseconds

{context} tokens of context, label heads at {points} exit points, a fifth of the layers apart. "All
leave" and "half leave": together, at exit point {leave_at} after three fifths of the layers; the
others run all layers. The last column is the share of the layers that must be saved on average
before exits pay, where in some steps all leave there and in the others nobody.

{today}

## Designs

- a: as it was. Each exit point asks, and the host waits for a copy to memory that is not pinned.
- b: as it is. A decode step asks at one exit point only, here where requests leave, and the host
  waits for pinned memory. After a cut, prompts go on in static buffers, padded to a captured size,
  so that piecewise graphs are replayed if few enough rows are left.
- c: b, with readout and threshold in the tail of the segment's graph. While the host waits, it has
  prepared the case that nobody leaves, and described and staged the next step.
- d: graphs that branch by the flags on the device, without a read. Then a decode step is cut short
  only if all leave. An outlook: for prompts it assumes that the device can choose their number.
- e: c, and vLLM's scheduler works in another process, as with several ranks.

Where exits do not pay, as on 1B, b asks in one of 128 steps only: then a step takes what it takes
where nobody may exit. The tables show steps that do ask.

### Decode steps where none leaves, milliseconds

{none}

### Decode steps where all leave, milliseconds

{all}

### Decode steps where half leave, milliseconds

{half}

### Breaks even at

{even}

### Steps of prompts, milliseconds

Requests x tokens, answered with labels. A fifth leaves at each exit point, so that 40 % of the
layers are saved. Steps follow one another without pause.

{prompts}

## Beside the desk check

Design a; in brackets what the desk check expected by hand.

{checked}

It expects questions to cost more. Here most Python of a question runs before the read, while the
device still runs the segment, and the last fifth of 8B's layers hides nearly all that the host does
between two steps. How much depends on the host's times, at batch {batch} (milliseconds; and where
each design breaks even):

{slower}

## Assumptions

Counted for our own code, on the device: {device}.
Its Python takes {ask:.0f} us before a read and {decide:.0f} us after it, timed on {cpu}.
That prompts run the last layer only for rows that somebody reads is not counted.

{assumed}
"""
