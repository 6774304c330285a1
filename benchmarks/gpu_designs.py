"""Steps of stock vLLM, of the exit loop as it was, is and might become, on the two queues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.gpu_costs import Counted, Llama, number, us
from benchmarks.gpu_queue import Queues, steady

POINTS = 4  # exit points, after a fifth of the layers each
LEAVE_AT = 2  # the exit point after three fifths, where all or half of a decode batch leave
CONTEXT = 512  # tokens that each request of a decode step attends to


@dataclass(frozen=True)
class Design:
    """How exits are decided.

    Attributes:
        name: in tables.
        scheduled: a decode step asks at one exit point only, where most can be saved.
        polls: the host waits for pinned memory, not for a copy to memory that is not.
        in_graph: readout and threshold are the tail of a segment's graph. While the host waits, it
            prepares the case that nobody leaves, and describes and stages the next step, most
            likely of the same requests.
        padded: after a cut, prompts go on in static buffers padded to a captured size.
        on_device: graphs branch by the flags: no read. If only some of a decode batch leave, all
            run on; prompts are compacted to a size that the device chooses.
        schedules_apart: vLLM's scheduler is in another process, as with several ranks.

    """

    name: str
    scheduled: bool = False
    polls: bool = False
    in_graph: bool = False
    padded: bool = False
    on_device: bool = False
    schedules_apart: bool = False


BUILT = Design("b", scheduled=True, polls=True, padded=True)
DESIGNS = (
    Design("a"),
    BUILT,
    replace(BUILT, name="c", in_graph=True),
    replace(BUILT, name="d", in_graph=True, on_device=True),
    replace(BUILT, name="e", in_graph=True, schedules_apart=True),
)


@dataclass(frozen=True)
class Step:
    """A step of so many requests with so many new tokens each, which attend to some more."""

    model: Llama
    counted: Counted
    design: Design | None  # None: stock
    requests: int
    tokens: int = 1
    slower: float = 1.0  # what the host's times are multiplied with

    @property
    def _decodes(self) -> bool:
        return self.tokens == 1

    def seconds(self, leaving: float, asked: bool = True) -> float:
        """Where it follows many like it.

        Args:
            leaving: which share leaves: of a decode step at `LEAVE_AT`, of prompts at each point.
            asked: False if nobody may exit.

        """
        step = partial(self._run, leaving=leaving, asked=asked)
        return steady(step, us("us from a launch to its start"), self.slower)

    def _run(self, queues: Queues, *, leaving: float, asked: bool) -> None:
        layers, left = self.model.layers, float(self.requests)
        self._begin(queues)
        cuts = [round(layers * (point + 1) / (POINTS + 1)) for point in range(POINTS)]
        spans = list(zip([0, *cuts], [*cuts, layers], strict=True))
        is_cut = False
        for point, (first, last) in enumerate(spans if self.design else [(0, layers)]):
            self._segment(queues, last - first, left, is_cut)
            if point == POINTS or not self.design or not asked:
                continue
            if self._decodes and self.design.scheduled and point != LEAVE_AT:
                continue
            leave = leaving * self.requests if not self._decodes or point == LEAVE_AT else 0
            stays_whole = self._decodes and self.design.on_device and leave < left
            self._ask(queues, is_cut, left, 0 if stays_whole else leave)
            if leave and not stays_whole:
                is_cut, left = True, left - leave
                if not left:
                    break
        if is_cut:
            queues.work(us("host us of answers after a cut"))
        head = self.model.head(left) if left else 0.0
        sampling = us("us of the device's work on inputs and samples") / 2
        queues.launch(head + sampling, us("host us of logits and samples"))

    def _begin(self, queues: Queues) -> None:
        """Schedule and describe the step, and enqueue its inputs."""
        design = self.design
        if self.model.ranks > 1 or (design and design.schedules_apart):  # meanwhile
            queues.work(us("host us of a message to ranks"))
        else:
            queues.work(us("host us of the scheduler and of outputs"))
            queues.work(self.requests * us("the same for each request"))
        queues.work(us("host us of inputs") + self.requests * us("inputs, for each request"))
        queues.launch(us("us of the device's work on inputs and samples") / 2)
        if design:
            if not self._is_described_ahead:
                queues.work(self._describing)
            if self._decodes:
                queues.launch(self.counted.staging)

    @property
    def _is_described_ahead(self) -> bool:
        """Whether the step was described while the host waited in the one before."""
        design = self.design
        return design is not None and design.in_graph and not design.on_device and self._decodes

    @property
    def _describing(self) -> float:
        """Host seconds of describing and staging a step."""
        seconds = us("host us of describing a step")
        seconds += self.requests * us("describing, for each request")
        if self._decodes:
            seconds += us("host us of a decode batch put into the graphs' buffers")
        return seconds

    def _segment(self, queues: Queues, layers: int, left: float, is_cut: bool) -> None:
        """Layers for the requests that are left, piece by piece unless a graph holds them."""
        rows, attended = left * self.tokens, self.tokens / 2 if not self._decodes else CONTEXT
        kernel = us("us of a kernel inside a graph, beside its work")
        boundary = 2 * kernel if self.design else 0.0  # states are stored
        if self._decodes:
            seconds = layers * self.model.layer(rows, attended, left)
            queues.launch(seconds + boundary, us("host us of a graph's launch"))
            return
        captured = self._has_graphs(rows, is_cut)
        if captured and is_cut:
            size = number("rows between captured sizes")
            rows = -(-rows // size) * size
        kind = "between piecewise graphs" if captured else "outside graphs"
        for _ in range(layers):
            queues.launch(self.model.layer(rows, attended, left), us(f"host us of a layer {kind}"))

    def _has_graphs(self, rows: float, is_cut: bool) -> bool:
        may = not is_cut or (self.design is not None and self.design.padded)
        return self._decodes or (may and rows <= number("rows of the largest captured graph"))

    def _ask(self, queues: Queues, is_cut: bool, left: float, leave: float) -> None:
        """The readout, what waits for it, and the cut if some leave."""
        counted, design, model = self.counted, self.design, self.model
        assert design
        in_graph = design.in_graph and self._has_graphs(left * self.tokens, is_cut)
        kernel = us("us of a kernel inside a graph, beside its work")
        readout = 2 * kernel if in_graph else counted.question
        readout += model.collectives(1, 1)
        if design.on_device:
            queues.launch(readout + us("us of a branch in a graph, decided on the device"))
            if 0 < leave < left:
                self._cut(queues, left - leave)
            return
        queues.work(0 if in_graph else counted.ask)
        queues.launch(readout)
        is_prepared = design.in_graph and not leave
        if self._is_described_ahead:  # a decode step then asks once
            queues.work(self._describing)
        if is_prepared:
            queues.work(counted.decide)
        if design.polls:
            queues.read(us("us of the same if the host polls pinned memory"))
        else:
            queues.read(us("us of a read, once the device has come there"))
        if not is_prepared:
            queues.work(counted.decide)
        if 0 < leave < left:
            self._cut(queues, left - leave)

    def _cut(self, queues: Queues, stay: float) -> None:
        """New rows, and attention metadata for them."""
        if self._decodes:
            device = self.counted.cut + self.counted.staging
            queues.launch(device, us("host us of a cut of a decode batch"))
            return
        host = us("host us of a cut of prompts")
        host += stay * self.tokens / 1000 * us("the same for 1000 rows")
        assert self.design
        queues.launch(self.counted.cut + self.counted.tables, 0 if self.design.on_device else host)


def break_even(stock: float, none: float, all_leave: float, saved: float) -> float | None:
    """The share of the layers that must be saved on average before exits pay, None if never.

    In some steps all requests leave and save `saved` of the layers, in the others nobody does.
    """
    if all_leave >= stock:
        return None
    return max(none - stock, 0.0) / (none - all_leave) * saved


def decoding(step: Callable[[Design | None], Step]) -> dict[str, dict[str, float | None]]:
    """Milliseconds of a decode step, for stock and each design."""
    stock = step(None).seconds(0)
    model = step(None).model
    saved = 1 - round(model.layers * (LEAVE_AT + 1) / (POINTS + 1)) / model.layers
    table: dict[str, dict[str, float | None]] = {"stock": {"none": 1e3 * stock}}
    for design in DESIGNS:
        of = step(design)
        none, half, whole = of.seconds(0), of.seconds(0.5), of.seconds(1)
        table[design.name] = {
            "nobody may exit": 1e3 * of.seconds(0, asked=False),
            "none": 1e3 * none,
            "half": 1e3 * half,
            "all": 1e3 * whole,
            "breaks even at": break_even(stock, none, whole, saved),
        }
    return table


def prompts(step: Callable[[Design | None], Step]) -> dict[str, dict[str, float | None]]:
    """Milliseconds of a step of prompts, for stock and each design."""
    table: dict[str, dict[str, float | None]] = {"stock": {"none": 1e3 * step(None).seconds(0)}}
    for design in DESIGNS:
        of, share = step(design), 1 / (POINTS + 1)
        table[design.name] = {"none": 1e3 * of.seconds(0), "fifths": 1e3 * of.seconds(share)}
    return table
