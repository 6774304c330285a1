"""The stack is cut where it is to be, and compiled code is found by name."""

from __future__ import annotations

from vllm_adainfer.models.segments import last_segment_class, segment_class


def test_segments_that_compile_differently_are_named_differently():
    inner = [(0, 3, 6), (3, 5, 6), (0, 5, 6), (3, 5, 7)]
    classes = [segment_class(*cut) for cut in inner]
    classes += [last_segment_class(*kind) for kind in [(6, 0), (6, 1), (7, 1)]]
    assert len({kind.forward.__qualname__ for kind in classes}) == len(classes)
