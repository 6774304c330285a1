"""vLLM finds compiled code by name, so segments that differ have different names."""

from __future__ import annotations

from vllm_adainfer.engine.segments import segment_class


def test_segments_that_compile_differently_are_named_differently():
    spans = [(0, 3, 6), (3, 5, 6), (0, 5, 6), (3, 5, 7), (5, 6, 6), (6, 6, 6)]
    classes = [segment_class(*span, finishes) for span in spans for finishes in (False, True)]
    assert len({kind.forward.__qualname__ for kind in classes}) == len(classes)
