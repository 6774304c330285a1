"""Quantised layers pass through the exit loop untouched; a quantised LM head is read, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from tests.conftest import tiny_engine
from tests.e2e.asking import ask
from tests.e2e.oracle import head_inputs
from tests.e2e.scripted import EXIT_AT, FULL, drawn, parts
from tests.e2e.test_families import SMALL, Served, prompts_of, scores
from tests.families import tiny_checkpoint
from tests.quantised import SCHEMES, quantise
from tests.tiny import EXIT_POINTS, LAYERS
from vllm_adainfer.engine.model import model_head

CASES = [*((scheme, False) for scheme in SCHEMES), ("gptq", True)]
SWITCH = {"exit_script": list(EXIT_POINTS)}


def skip_what_vllm_cannot_do_here(scheme: str) -> None:
    """For processors with AVX2 alone its build has no 4-bit layers, and its int8 sums overflow.

    Without VNNI a product of two int8 pairs is summed in 16 bits and saturates (oneDNN, "Nuances of
    int8 computations"): full depth of stock vLLM itself is then far from transformers.
    """
    if "fp8" in scheme:
        return
    if "int8" in scheme:
        if "vnni" not in Path("/proc/cpuinfo").read_text():
            pytest.skip("this processor has no VNNI: int8 sums saturate in stock vLLM, too")
    elif not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM has no 4-bit layers for this processor")


@pytest.fixture(scope="module", params=CASES, ids=[s + ", head too" * head for s, head in CASES])
def served(request, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A quantised model, in an engine with exits, and in transformers what it stands for."""
    skip_what_vllm_cannot_do_here(request.param[0])
    directory = tmp_path_factory.mktemp("quantised")
    model = tiny_checkpoint("llama", directory / "model")
    quantised, plain = quantise(model, *request.param, directory)
    return Served(
        quantised,
        SWITCH,
        llm=tiny_engine(quantised, SWITCH, dtype="bfloat16", **SMALL),
        reference=AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval(),
    )


def test_never_exiting_is_stock_bit_for_bit(served):
    stock = tiny_engine(served.directory, None, dtype="bfloat16", **SMALL)
    assert scores(served.llm) == scores(stock)


def test_requests_leave_with_the_state_of_the_depth_they_leave_at(served):
    """Activations of 8 bits round much away, not the difference of two depths."""
    prompts = prompts_of(seed=1)
    exits = [(place % 4) - 1 for place in range(len(prompts))]
    params = [SamplingParams(temperature=0, max_tokens=1, extra_args={EXIT_AT: at}) for at in exits]
    depths = [*EXIT_POINTS, LAYERS]
    with drawn(served.llm, draw=lambda at, _position, _points: at) as ran:
        ask(served.llm, prompts, params)
    states = [parts[-1].state.float() for _, parts in sorted(ran.items(), key=lambda i: int(i[0]))]
    assert len(states) == len(prompts)
    for prompt, at, state in zip(prompts, exits, states, strict=True):
        expected = [head_inputs(served.reference, prompt, depth)[-1] for depth in depths]
        apart = [float((state - other).norm()) for other in expected]
        assert depths[apart.index(min(apart))] == (LAYERS if at == FULL else EXIT_POINTS[at])


def test_a_probe_reads_the_head_as_it_is_served_and_says_if_that_takes_a_copy(served, monkeypatch):
    model, _, _ = parts(served.llm)
    said: list[str] = []
    monkeypatch.setattr(model_head.logger, "warning", lambda text, *what: said.append(text % what))
    read = model.logit_lens().head.weight
    expected = served.reference.lm_head.weight.data
    torch.testing.assert_close(read, expected.bfloat16(), rtol=0.01, atol=1e-3)
    is_plain = hasattr(model.lm_head, "weight")
    assert [text[:25] for text in said] == ([] if is_plain else ["the LM head is quantised "])
