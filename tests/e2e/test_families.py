"""Every family in the table: vLLM's own answers where nobody exits, the oracle's where some do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import SamplingParams
from vllm.distributed import parallel_state
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from benchmarks.offline.scripted_requests import scripted_request
from tests.conftest import tiny_engine
from tests.delta_net import allow_fp32
from tests.e2e.asking import ask
from tests.e2e.oracle import continuation, head_inputs, same
from tests.e2e.patterns import Request, drawn_pattern, drive, wrong
from tests.e2e.recorded import taken_from
from tests.e2e.scripted import FULL, drawn, parts
from tests.e2e.test_equal_to_stock import PROMPTS, answer
from tests.families import FAMILIES, tiny_checkpoint, transformers_class
from tests.full import needed
from tests.tiny import FROM_ZERO, LAYERS, served_fingerprint
from vllm_adainfer import stats
from vllm_adainfer.policy.script import SCRIPT_LABELS
from vllm_adainfer.settings.instruments import ROW_ARG

SMALL = {
    "max_model_len": 320,
    "num_gpu_blocks_override": 24,
    "kv_cache_memory_bytes": 8 << 20,
    "language_model_only": True,
}
SWITCH = {"exit_script": list(FROM_ZERO)}
# Of each way to read a state: norms, a soft cap, a narrower head, inputs of each layer's own.
READ_OTHERWISE = (
    *("llama", "gemma2", "gemma4-multimodal", "gpt-oss", "opt", "opt-350m"),
    "qwen3.5-multimodal",
)
# Of each way to run layers; the others have the decoder and the layers of one of these.
RUN_OTHERWISE = (
    *READ_OTHERWISE,
    *("ernie4.5", "gemma4-large", "glm4-moe", "granite", "mixtral", "olmoe", "qwen3"),
    *("qwen3.5", "qwen3-next"),
)
AMX_ROUNDING = 2**-5  # two steps between logits of 2 to 4 in bfloat16


@dataclass
class Served:
    """A family's tiny model, in an engine with exits and in transformers."""

    directory: Path
    switch: dict[str, Any]
    llm: Any
    reference: Any


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory: pytest.TempPathFactory) -> Served:
    allow_fp32()
    directory = tiny_checkpoint(request.param, tmp_path_factory.mktemp("family") / request.param)
    if parallel_state._EP is None:
        # vLLM makes this group for mixtures alone, and with the first engine of a process.
        parallel_state._EP = parallel_state._TP
    return Served(
        directory,
        SWITCH,
        llm=tiny_engine(directory, SWITCH, **SMALL),
        reference=transformers_model(directory),
    )


def transformers_model(directory: Path) -> Any:
    """With eager attention, because others leave out Gemma 2's cap.

    Of a multimodal model, its language model.
    """
    config = AutoConfig.from_pretrained(directory)
    model = transformers_class(config).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    if model.config.get_text_config() is not model.config:
        text = AutoModelForCausalLM.from_config(
            model.config.get_text_config(), attn_implementation="eager"
        )
        text.model, text.lm_head = model.model.language_model, model.lm_head
        model = text
    return model.eval()


def prompts_of(seed: int, count: int = 14) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    lengths = generator.choice([1, 2, 9, 31, 33, 64, 100, 170, 300], count)
    return [generator.integers(5, 1000, length).tolist() for length in lengths]


def scores(llm: Any) -> list[list[dict[int, float]]]:
    """Log-probabilities at five tokens of each of some prompts; nobody asks to exit."""
    prompts = prompts_of(seed=0)
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, ignore_eos=True)
    return [
        [{token: entry.logprob for token, entry in at.items()} for at in output.logprobs]
        for output in ask(llm, prompts, [params] * len(prompts))
    ]


def flat(scores: list[list[dict[int, float]]]) -> dict[tuple[int, int, int], float]:
    """By prompt, place and token."""
    return {
        (prompt, place, token): logprob
        for prompt, places in enumerate(scores)
        for place, logprobs in enumerate(places)
        for token, logprob in logprobs.items()
    }


@pytest.mark.parametrize("served", needed(RUN_OTHERWISE, of=FAMILIES), indirect=True)
def test_never_exiting_is_stock_bit_for_bit(served, monkeypatch):
    """In bfloat16: an fp32 product of few rows may sum in another order than one of many.

    With AMX, one in bfloat16 may, too, and rows are spared the last layer.
    """
    # Engines of a process share rotary embeddings, and one turns its table into its own dtype.
    monkeypatch.setattr("vllm.model_executor.layers.rotary_embedding._ROPE_DICT", {})
    stock, ours = (
        tiny_engine(served.directory, switch, dtype="bfloat16", **SMALL)
        for switch in (None, served.switch)
    )
    expected, found = scores(stock), scores(ours)
    if torch.cpu.get_capabilities().get("amx_tile"):
        assert flat(found) == pytest.approx(flat(expected), abs=AMX_ROUNDING)
        model, _, _ = parts(ours)
        monkeypatch.setattr(model.loop, "_compaction_cost", 1 << 30)  # nor spare the last layer
        ours.reset_prefix_cache()
        found = scores(ours)
    assert found == expected


@pytest.mark.parametrize("seed", needed(1, of=range(2)))
def test_drawn_exits_at_every_token_reproduce_the_oracle(served, seed):
    pattern, ran = drawn_pattern(served.llm, seed)
    assert wrong(served.reference, pattern, ran) == []


@pytest.mark.parametrize("served", needed(RUN_OTHERWISE, of=FAMILIES), indirect=True)
def test_requests_leave_where_the_script_says(served, monkeypatch):
    """Benchmarks rely on it. The weights that an engine has loaded are those of the checkpoint."""
    assert parts(served.llm)[0].fingerprint == served_fingerprint(served.directory)
    prompts = [prompt[:20] for prompt in PROMPTS]  # of one step
    exits = [FROM_ZERO[0], None, FROM_ZERO[1], FROM_ZERO[0], FROM_ZERO[1]]
    params = [scripted_request(layer, 1) for layer in exits]
    monkeypatch.setattr(parts(served.llm)[0].loop, "_min_rows_saved", 1)
    served.llm.reset_prefix_cache()
    before = stats(served.llm)
    found = ask(served.llm, prompts, params)
    after, depths = stats(served.llm), [LAYERS if layer is None else layer for layer in exits]
    left = Counter(after["exit_histogram"]) - Counter(before["exit_histogram"])
    assert left == Counter(depths)
    assert after["layers_run"] - before["layers_run"] == sum(
        depth * len(prompt) for depth, prompt in zip(depths, prompts, strict=True)
    )
    assert all(output.token_ids[0] in SCRIPT_LABELS for output in found)


@pytest.mark.parametrize("served", ["gemma4-multimodal", "qwen3.5-multimodal"], indirect=True)
def test_a_picture_is_refused(served):
    """Exits are for text alone."""
    picture = {"image": Image.new("RGB", (8, 8))}
    with pytest.raises(ValueError, match="not available for text-only models"):
        served.llm.generate({"prompt_token_ids": [5, 6], "multi_modal_data": picture})


@pytest.mark.parametrize("served", ["mixtral"], indirect=True)
def test_experts_pass_over_padding_and_over_no_row_of_a_request(served, monkeypatch):
    """Steps are padded to four rows, as for CUDA graphs; exits make batches of other rows.

    Routers read the first entries of a mask. A CPU's do not, so this looks at it in their place.
    """
    _, runner, _ = parts(served.llm)
    pad, run_experts = runner._determine_batch_execution_and_padding, MoERunner._forward_impl
    masked = set()

    def padded(*args: Any, **settings: Any) -> Any:
        mode, batch, *rest = pad(*args, **settings)
        return mode, replace(batch, num_tokens=-(-batch.num_tokens // 4) * 4), *rest

    def looking(layer: Any, hidden: torch.Tensor, *args: Any, **settings: Any) -> Any:
        context = get_forward_context()
        real = next(iter(context.attn_metadata.values())).num_actual_tokens
        if context.is_padding is not None:
            assert context.is_padding.tolist() == [row >= real for row in range(len(hidden))]
            masked.add(len(hidden) - real)
        return run_experts(layer, hidden, *args, **settings)

    monkeypatch.setattr(runner, "_determine_batch_execution_and_padding", padded)
    monkeypatch.setattr(MoERunner, "_forward_impl", looking)
    pattern, ran = drawn_pattern(served.llm, seed=0)
    assert wrong(served.reference, pattern, ran) == []
    assert masked >= {1, 2, 3}


@pytest.mark.parametrize("served", needed(READ_OTHERWISE, of=FAMILIES), indirect=True)
def test_what_calibration_learns_from_reads_as_the_model_does(served, tmp_path):
    """States and the logit lens as they are recorded: before all layers, inside, after the last."""
    llm = tiny_engine(served.directory, {"record": [0, 3, LAYERS]}, **SMALL)
    prompts = prompts_of(seed=3)
    params = [
        SamplingParams(temperature=0, max_tokens=1, extra_args={ROW_ARG: row})
        for row in range(len(prompts))
    ]
    ask(llm, prompts, params)
    rows, lens = taken_from(llm, tmp_path)
    torch.testing.assert_close(lens.head.weight, served.reference.lm_head.weight.data)
    for depth in (0, 3, LAYERS):
        read = lens.readout(rows["final" if depth == LAYERS else f"layer.{depth}"])
        expected = [head_inputs(served.reference, prompt, depth)[-1] for prompt in prompts]
        torch.testing.assert_close(read, torch.stack(expected), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("switch", [SWITCH, {}], ids=["with exits", "without a policy"])
@pytest.mark.parametrize("served", ["gemma4-multimodal"], indirect=True)
def test_rows_that_decide_nothing_stop_where_layers_share_keys(served, switch):
    """Four of six layers write keys; a chunk has up to 128 rows, and one of them goes on."""
    prompts = [prompt for prompt in prompts_of(seed=5, count=40) if len(prompt) >= 100]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    llm = served.llm if switch else tiny_engine(served.directory, switch, **SMALL)
    before = stats(llm)
    found = ask(llm, prompts, [params] * len(prompts))
    ran, possible = (stats(llm)[key] - before[key] for key in ("layers_run", "layers_possible"))
    for prompt, output in zip(prompts, found, strict=True):
        assert same(list(output.token_ids), continuation(served.reference, prompt, 1, LAYERS))
    assert 4 / LAYERS <= ran / possible < 4.1 / LAYERS


@pytest.mark.parametrize("served", ["mistral", "gemma2", "gemma3"], indirect=True)
@pytest.mark.parametrize("seed", needed(1, of=range(2)))
def test_rows_that_wait_beyond_a_sliding_window_find_what_they_attend_to(served, seed):
    """vLLM frees what a window has passed; only every fortieth token runs at full depth here."""
    generator = np.random.default_rng(1 + seed)
    requests = [
        Request(
            prompt=generator.integers(5, 1000, generator.integers(2, 30)).tolist(),
            max_tokens=int(generator.integers(100, 200)),
            seed=0,
            arrives=int(generator.integers(100)),
        )
        for _ in range(8)
    ]

    def draw(_seed: int, position: int, _points: int) -> int:
        return FULL if position % 40 == 39 else 0

    with drawn(served.llm, draw=draw) as ran:
        pattern = drive(served.llm, requests)
    assert wrong(served.reference, pattern, ran) == []
    assert any(part.layers < LAYERS for parts in ran.values() for part in parts)


@pytest.mark.full  # Llama compiled is in test_equal_to_stock
@pytest.mark.parametrize("family", ["opt", "gemma3", "ernie4.5", "gemma4"])
def test_compiled_segments_give_the_same_tokens(family, tmp_path):
    """One family for each way to call a layer, and one that vLLM compiles by another class.

    Gemma 4 has inputs of each layer's own, and a tail; mixtures and recurrent layers run in
    `bench_families`.
    """
    model = tiny_checkpoint(family, tmp_path / family)
    leaves = {"temperature": 0, "max_tokens": 1, "allowed_token_ids": [0, 1]}
    leaves["extra_args"] = {"adainfer_exit": FROM_ZERO[0]}
    stays = {"temperature": 0, "max_tokens": 4}
    params = [leaves, stays, leaves, stays, leaves]
    found = answer(
        model,
        params,
        {},
        dtype="float32",
        additional_config={"adainfer": {**SWITCH, "min_rows_saved": 1}},
    )
    reference = transformers_model(model)
    for prompt, asked, given in zip(PROMPTS, params, found["answers"], strict=True):
        if asked is stays:
            assert same(given["tokens"], continuation(reference, prompt, 4, LAYERS))
    assert found["stats"]["exit_histogram"][str(FROM_ZERO[0])] == 3
    assert found["stats"]["layers_run"] < found["stats"]["layers_possible"]
