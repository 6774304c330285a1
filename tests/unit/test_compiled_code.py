"""On a CPU, a later start finds the code that an earlier one compiled."""

from __future__ import annotations

import os

import pytest

from vllm_adainfer.engine.compat.compilation import find_compiled_code_again

NAME = "VLLM_USE_AOT_COMPILE"


@pytest.mark.parametrize(
    ("is_cpu", "chosen", "expected"),
    [(True, None, "0"), (True, "1", "1"), (False, None, None)],
    ids=["on a CPU", "the environment decides", "elsewhere vLLM's own way works"],
)
def test_code_is_not_compiled_ahead_where_it_could_not_be_loaded(
    monkeypatch, is_cpu, chosen, expected
):
    from vllm.platforms import current_platform

    environment = {} if chosen is None else {NAME: chosen}
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: is_cpu)
    monkeypatch.setattr(os, "environ", environment)
    find_compiled_code_again()
    assert environment.get(NAME) == expected
