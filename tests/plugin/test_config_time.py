"""The switch at config time: what it selects, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.model_executor.models.config as model_hooks
from transformers import (
    AutoTokenizer,
    FalconConfig,
    JambaConfig,
    MambaConfig,
    MixtralConfig,
    OlmoeConfig,
)
from vllm import ModelRegistry
from vllm.config import CUDAGraphMode, KVTransferConfig, ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from tests.families import FAMILIES, SHAPE
from tests.quantised import quantise
from tests.tiny import tiny_artifact
from vllm_adainfer import plugin
from vllm_adainfer.engine.classes import CPU_WORKER, DRAFTING_CPU_WORKER, GPU_WORKER, SCHEDULER
from vllm_adainfer.engine.compat.config import engine_options_of
from vllm_adainfer.engine.scheduler.scheduler import build_scheduler
from vllm_adainfer.engine.startup.configure import configure
from vllm_adainfer.engine.startup.refusals import refuse_unsupported
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Settings

POLICY, SCRIPT, CAPTURE, DRAFTS = (
    {"artifact": "POLICY"},
    {"exit_script": [2]},
    {"capture": {"directory": "HERE"}},
    {"draft_structure": True},
)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
}
# Models without weights, which config time does not read: what makes the config, the architecture.
CHECKPOINTS: dict[str, tuple[Any, str]] = {
    "qwen3.5": (FAMILIES["qwen3.5"], "Qwen3_5ForCausalLM"),
    "multimodal": (FAMILIES["gemma4-multimodal"], "Gemma4ForConditionalGeneration"),
    "classifier": (FAMILIES["llama"], "LlamaForSequenceClassification"),
    "qwen3 classifier": (FAMILIES["qwen3"], "Qwen3ForSequenceClassification"),
    "qwen3 embeddings": (FAMILIES["qwen3"], "Qwen3Model"),
    "qwen3-vl classifier": (FAMILIES["qwen3"], "Qwen3VLForSequenceClassification"),
    "falcon": (lambda **_: FalconConfig(), "FalconForCausalLM"),
    "mamba": (lambda **_: MambaConfig(), "MambaForCausalLM"),
    "jamba": (lambda **_: JambaConfig(**SMALL), "JambaForCausalLM"),
    "mixtral": (lambda **_: MixtralConfig(**SMALL), "MixtralForCausalLM"),
    "olmoe": (lambda **_: OlmoeConfig(**SMALL), "OlmoeForCausalLM"),
}


def engine_config(model: Path, adainfer: Any = None, **settings: Any) -> Any:
    additional = {} if adainfer is None else {"adainfer": adainfer}
    settings = {"dtype": "float32", **settings}
    return EngineArgs(
        model=str(model), additional_config=additional, **settings
    ).create_engine_config()


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Callable[[str], Path]:
    """The directory of one of `CHECKPOINTS`, or of a Llama."""

    @cache
    def directory(name: str) -> Path:
        if name == "llama":
            return tiny_model
        make, architecture = CHECKPOINTS[name]
        config, found = make(**SHAPE), tmp_path_factory.mktemp("model")
        config.architectures = [architecture]
        config.save_pretrained(found)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(found)
        return found

    return directory


@pytest.fixture
def filled(tiny_policy, tmp_path) -> Callable[[Any], Any]:
    """A switch with directories in place of their names."""

    def fill(switch: Any) -> Any:
        text = json.dumps(switch).replace("POLICY", str(tiny_policy))
        return json.loads(text.replace("HERE", str(tmp_path / "here")))

    return fill


def test_vllm_loads_the_plugin_by_its_entry_point():
    load_general_plugins()
    assert "AdaInferLlamaForCausalLM" in ModelRegistry.get_supported_archs()


def test_registering_again_changes_nothing():
    plugin.register()
    once = dict(model_hooks.MODELS_CONFIG_MAP)
    plugin.register()
    assert once == model_hooks.MODELS_CONFIG_MAP


@pytest.mark.parametrize(
    ("switch", "variables", "served"),
    [
        (None, {}, True),
        ({"enabled": False}, {}, False),
        ({"draft_structure": True}, {}, False),
        (None, {"VLLM_ADAINFER": "0"}, False),
    ],
)
def test_a_policy_beside_the_weights_is_served_without_a_flag(
    tiny_model, tiny_policy, tmp_path, monkeypatch, switch, variables, served
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tiny_policy, tmp_path / "adainfer")
    config = engine_config(tmp_path, switch)
    architectures = config.model_config.hf_config.architectures
    assert (architectures == ["AdaInferLlamaForCausalLM"]) == served
    named = config.additional_config.get("adainfer", {}).get("artifact")
    assert named == (str(tmp_path / "adainfer") if served else None)


def test_a_policy_beside_the_weights_that_does_not_fit_them_is_refused(
    tiny_model, tiny_policy, tmp_path
):
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tiny_policy, tmp_path / "adainfer")
    (tmp_path / "adainfer" / "policy.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no policy.safetensors"):
        engine_config(tmp_path)


OURS = "AdaInferLlamaForCausalLM", CPU_WORKER, SCHEDULER
STOCK = "LlamaForCausalLM", "vllm.v1.worker.cpu_worker.CPUWorker", None
OBSERVED = *STOCK[:2], SCHEDULER
OFF = {"VLLM_ADAINFER": "0"}


@pytest.mark.parametrize(
    ("of", "switch", "settings", "variables", "selected"),
    [
        ("llama", POLICY, {}, {}, OURS),
        ("llama", {**POLICY, **CAPTURE}, {}, {}, OURS),
        ("llama", None, {}, {}, STOCK),
        ("llama", {**POLICY, "enabled": False}, {}, {}, STOCK),
        ("llama", POLICY, {}, OFF, STOCK),
        ("llama", {**CAPTURE, "enabled": False}, {}, {}, STOCK),
        ("llama", CAPTURE, {}, OFF, STOCK),
        ("llama", CAPTURE, {}, {}, OBSERVED),
        ("llama", CAPTURE, {"enable_lora": True}, {}, OBSERVED),
        ("llama", CAPTURE, {"pipeline_parallel_size": 2}, {}, OBSERVED),
        ("falcon", CAPTURE, {}, {}, ("FalconForCausalLM", *OBSERVED[1:])),
        ("llama", DRAFTS, {}, {}, (STOCK[0], DRAFTING_CPU_WORKER, SCHEDULER)),
        ("falcon", DRAFTS, {}, {}, ("FalconForCausalLM", DRAFTING_CPU_WORKER, SCHEDULER)),
        ("llama", DRAFTS, {}, OFF, STOCK),
    ],
)
def test_the_switch_selects_model_worker_and_scheduler(
    checkpoint, filled, monkeypatch, tmp_path, of, switch, settings, variables, selected
):
    """Without it all is vLLM's own; capture alone needs a scheduler, and refuses nothing else."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = engine_config(checkpoint(of), filled(switch), **settings)
    [architecture] = config.model_config.hf_config.architectures
    worker, scheduler = config.parallel_config.worker_cls, config.scheduler_config.scheduler_cls
    assert (architecture, worker, scheduler) == selected
    assert bool(config.model_config.logits_processors) == (selected == OURS), "checks requests"
    if selected == STOCK:
        assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"repetition_penalty": 1.05}, "repetition_penalty=1.05"),
        ({"min_p": 0.1, "temperature": 0.7}, "min_p=0.1"),
        ({"repetition_penalty": 1.0, "temperature": 0.7, "top_k": 20}, None),
        ({}, None),
    ],
)
def test_a_models_own_penalty_which_keeps_all_answers_from_drafts_is_told(
    tiny_model, caplog_vllm, given, name
):
    engine_config(tiny_model, DRAFTS, override_generation_config=given)
    told = [line for line in caplog_vllm.messages if "not drafted" in line]
    assert [name in line for line in told] == ([] if name is None else [True])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, CUDAGraphMode.PIECEWISE),
        (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.PIECEWISE),
        (CUDAGraphMode.PIECEWISE, CUDAGraphMode.PIECEWISE),
        (CUDAGraphMode.NONE, CUDAGraphMode.NONE),
    ],
)
def test_on_a_gpu_full_graphs_are_left_to_the_segments(tiny_model, monkeypatch, before, after):
    vllm_config = engine_config(tiny_model, None)
    vllm_config.compilation_config.cudagraph_mode = before
    vllm_config.parallel_config.worker_cls = "auto"  # as it is when the hook runs
    monkeypatch.setattr(
        "vllm.platforms.current_platform",
        SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True),
    )
    monkeypatch.setattr(type(vllm_config), "use_v2_model_runner", True)
    configure(vllm_config, Settings(exit_script=(2,)), "AdaInferLlamaForCausalLM")
    assert vllm_config.compilation_config.cudagraph_mode == after
    assert vllm_config.parallel_config.worker_cls == GPU_WORKER


@pytest.mark.parametrize(
    ("switch", "sentence"),
    [
        ({"artefact": "x"}, "adainfer.artefact is not a known key; known keys: artifact"),
        ({}, 'give "artifact", the directory that .* this model has none'),
        ("x", "must be an object"),
        ({"artifact": "x", "epsilon": -1}, "adainfer.epsilon"),
        ({"artifact": "x", "requests": "some"}, "adainfer.requests"),
        ({"artifact": "x", "kv": "zeros"}, "adainfer.kv: .* 'exact'"),
        ({"artifact": "x", "kv": "propagate"}, "no bound covered them: drop the key"),
        ({"artifact": "x", "shadow_rate": -0.1}, "adainfer.shadow_rate: .* greater than or equal"),
        ({"artifact": "x", "shadow_rate": 1.5}, "adainfer.shadow_rate: .* less than or equal to 1"),
        ({"artifact": "x", "shadow_rate": "often"}, "adainfer.shadow_rate: .* valid number"),
        ({"artifact": "no/such"}, "neither a directory nor a hub id"),
        ({"artifact": "."}, "has no config.json"),
        ({"artifact": "x", "exit_script": [2]}, 'give "artifact"'),
        ({**SCRIPT, "epsilon": 0.1}, "go with .artifact., not .exit_script."),
        ({**SCRIPT, "shadow_rate": 0.1}, "go with .artifact., not .exit_script."),
        ({"exit_script": []}, "exit_script must ascend between 0 and 5, got \\[\\]"),
        ({"exit_script": [-1, 3]}, "exit_script must ascend between 0 and 5"),
        ({"exit_script": [3, 2]}, "exit_script must ascend between 0 and 5"),
        ({"exit_script": [2, 2]}, "exit_script must ascend between 0 and 5"),
        ({"exit_script": [2, 6]}, "exit_script must ascend between 0 and 5"),
        ({"exit_points": [2]}, "start with --enable-lora"),
        ({**POLICY, "epsilon": 0.001}, "stricter than the artifact's strictest certified bound"),
        ({"capture": {"directory": "/proc/requests"}}, "cannot write to /proc/requests .*: name a"),
    ],
)
def test_bad_values_of_the_switch_are_named(tiny_model, filled, switch, sentence):
    with pytest.raises(ValueError, match=sentence):
        engine_config(tiny_model, filled(switch))


CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
RECURRENT_END = {"layer_types": [*["full_attention"] * 5, "linear_attention"]}
UNSUPPORTED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("llama", POLICY, {"pipeline_parallel_size": 2}, "pipeline parallelism cannot drop rows"),
    ("llama", POLICY, {"prefill_context_parallel_size": 2}, "context parallelism splits a request"),
    ("llama", POLICY, {"enable_batch_sharded_sampling": True}, "batch-sharded sampling bypasses"),
    ("llama", POLICY, {"runner": "pooling"}, "of the pooling models only classifiers have an"),
    ("llama", POLICY, {"convert": "classify"}, "policy default decides tokens, and this engine"),
    ("llama", POLICY, {"enable_prompt_embeds": True}, "prompt embeddings enter below"),
    ("llama", POLICY, {"kv_offloading_size": 1.0}, "a KV connector would send incomplete blocks"),
    ("llama", POLICY, {"kv_transfer_config": CONNECTOR}, "a KV connector would send incomplete"),
    ("llama", POLICY, {"offload_group_size": 2}, "set --offload-group-size 0"),
    (
        *("llama", POLICY, {"weight_transfer_config": {"backend": "sparse_nccl"}}),
        "set the backend of --weight-transfer-config to nccl or ipc",
    ),
    ("llama", POLICY, {"enable_return_routed_experts": True}, "the experts of rows that have"),
    ("llama", POLICY, {"logits_processors": ["some.module:Class"]}, "custom logits processors"),
    ("llama", POLICY, {"model_impl": "transformers"}, "--model-impl transformers builds another"),
    (
        *("llama", POLICY, {"hf_overrides": {"dual_chunk_attention_config": {"chunk_size": 64}}}),
        "dual chunk attention is not supported",
    ),
    ("llama", POLICY, {"worker_cls": "some.Worker"}, "custom --worker-cls"),
    ("llama", POLICY, {"scheduler_cls": "some.Scheduler"}, "custom --scheduler-cls"),
    (
        *(
            "llama",
            POLICY,
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        ),
        "speculative decoding reads the hidden states",
    ),
    ("llama", CAPTURE, {"scheduler_cls": "some.Scheduler"}, "custom --scheduler-cls .*: drop it"),
    ("llama", CAPTURE, {"hf_overrides": {"canvas_length": 8}}, "a diffusion model has a scheduler"),
    (
        "llama",
        {"record": [2]},
        {"tensor_parallel_size": 2},
        "calibrate with --tensor-parallel-size",
    ),
    ("qwen3.5", SCRIPT, {"enable_lora": True}, "no adapters for layers with a recurrent state on"),
    ("qwen3.5", SCRIPT, {"hf_overrides": RECURRENT_END}, "the last layer keeps a recurrent state"),
    ("falcon", POLICY, {}, "FalconForCausalLM has no exit points yet: serve one of"),
    ("mamba", POLICY, {}, "MambaForCausalLM keeps a recurrent state"),
    ("jamba", POLICY, {}, "JambaForCausalLM keeps a recurrent state"),
    ("qwen3 embeddings", SCRIPT, {}, "of the pooling models only classifiers"),
    ("qwen3-vl classifier", SCRIPT, {}, "has no exit points yet"),
    ("classifier", SCRIPT, {"pooler_config": {"task": "token_classify"}}, "reads all tokens: set"),
    ("classifier", SCRIPT, {"pooler_config": {"seq_pooling_type": "MEAN"}}, "set seq_pooling_type"),
    ("classifier", SCRIPT, {"pooler_config": {"logit_mean": 0.5}}, "drop logit_mean and logit_sig"),
    ("classifier", SCRIPT, {"enable_lora": True}, "adapters replace a classifier's head"),
    ("classifier", SCRIPT, {"hf_overrides": {"is_causal": False}}, "bidirectional attention needs"),
    ("multimodal", SCRIPT, {}, "serve text alone with --language-model-only"),
    ("multimodal", SCRIPT, {"limit_mm_per_prompt": {"image": 0}}, "serve text alone with"),
]


@pytest.mark.parametrize(("of", "switch", "settings", "sentence"), UNSUPPORTED)
def test_what_cannot_be_served_is_refused_with_what_to_set(
    checkpoint, filled, of, switch, settings, sentence
):
    with pytest.raises(ValueError, match=sentence) as refusal:
        engine_config(checkpoint(of), filled(switch), **settings)
    if switch == POLICY and settings:
        assert "additional_config" in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quantization": "fp8"}, "without --quantization; the server has --quantization fp8: "),
        (
            {"quantization": "online", "quantization_config": {"linear": "fp8_per_block"}},
            "without --quantization; the server has --quantization online: calibrate with it",
        ),
        ({"kv_cache_dtype": "fp8"}, "the server has --kv-cache-dtype fp8: calibrate with it, or"),
        ({"kv_cache_dtype": "bfloat16"}, None),
        ({"hf_overrides": {"head_dtype": "float32"}}, "the server.* --hf-overrides.* serve with"),
        ({"hf_overrides": {"eos_token_id": 7}}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("made", ["before options were kept", "by an engine without options"])
def test_a_policy_is_for_the_options_that_it_was_calibrated_with(
    tiny_model, tiny_policy, tmp_path, made, settings, sentence
):
    settings = {"dtype": "bfloat16", **settings}
    plain = engine_options_of(engine_config(tiny_model))
    if made == "by an engine without options":
        tiny_policy = tiny_artifact(tiny_model, tmp_path / "policy", engine_options=plain)
    switch = {"artifact": str(tiny_policy)}
    if sentence is None:
        engine_config(tiny_model, switch, **settings)
        return
    with pytest.raises(ValueError, match=sentence):
        engine_config(tiny_model, switch, **settings)
    asked = engine_options_of(engine_config(tiny_model, **settings))
    with_them = tiny_artifact(tiny_model, tmp_path / "with them", engine_options=asked)
    engine_config(tiny_model, {"artifact": str(with_them)}, **settings)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [("auto", "bfloat16"), ("half", "float16"), ("float", "float32")],
)
def test_the_dtype_of_a_checkpoint_of_fp32_is_kept(tiny_model, asked, kept):
    """vLLM converts it by itself, so even its own dtype takes an option."""
    assert engine_options_of(engine_config(tiny_model, dtype=asked)).dtype == kept


@pytest.mark.parametrize(("asked", "kept"), [("auto", None), ("half", "float16")])
def test_the_dtype_of_a_checkpoint_of_16_bits_is_kept_if_it_was_converted(
    tiny_model, tmp_path, asked, kept
):
    halved = shutil.copytree(tiny_model, tmp_path / "halved")
    config = json.loads((halved / "config.json").read_text())
    (halved / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert engine_options_of(engine_config(halved, dtype=asked)).dtype == kept


@pytest.mark.parametrize("scheme", ["gptq", "compressed-tensors fp8"])
def test_a_checkpoint_that_is_quantised_itself_needs_no_option(tiny_model, tmp_path, scheme):
    quantised, _ = quantise(tiny_model, scheme, False, tmp_path)
    options = engine_options_of(engine_config(quantised, dtype="bfloat16"))
    assert (options.quantization, options.kv_cache_dtype) == (None, None)


NO_MEDIA = {"image": 0, "video": 0, "audio": 0}


@pytest.mark.parametrize(
    ("of", "settings", "ours"),
    [
        ("qwen3.5", {}, "AdaInferQwen3_5ForCausalLM"),
        ("multimodal", {"language_model_only": True}, "AdaInferGemma4ForConditionalGeneration"),
        ("multimodal", {"limit_mm_per_prompt": NO_MEDIA}, "AdaInferGemma4ForConditionalGeneration"),
        ("classifier", {}, "AdaInferLlamaForCausalLM"),
        ("qwen3 classifier", {}, "AdaInferQwen3ForCausalLM"),
    ],
)
def test_a_model_gets_our_class_of_the_model_that_vllm_makes_it_of(checkpoint, of, settings, ours):
    """Qwen3's classifier has no entry in vLLM's registry, and a config hook of its own."""
    config = engine_config(checkpoint(of), SCRIPT, **settings).model_config
    assert config.hf_config.architectures == [ours]
    if "classifier" in of:
        assert not config.logits_processors
        assert (config.runner_type, config.convert_type) == ("pooling", "classify")


@pytest.mark.parametrize(
    ("platform", "sentence"),
    [("is_cuda", "on a GPU exits need Model Runner V2"), ("is_tpu", "only CPUs and NVIDIA GPUs")],
)
def test_other_devices_and_runners_are_refused(
    tiny_model, tiny_policy, monkeypatch, platform, sentence
):
    vllm_config = engine_config(tiny_model, None)
    monkeypatch.setattr(
        "vllm.platforms.current_platform",
        SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: platform == "is_cuda"),
    )
    with pytest.raises(AdaInferError, match=sentence):
        refuse_unsupported(
            vllm_config, "AdaInferLlamaForCausalLM", Settings(artifact=str(tiny_policy))
        )


def test_a_kv_connector_that_vllm_sets_after_its_config_hooks_is_refused(tiny_model, tiny_policy):
    config = engine_config(tiny_model, {"artifact": str(tiny_policy)})
    config.kv_transfer_config = KVTransferConfig(kv_connector="Some", kv_role="kv_both")
    with pytest.raises(AdaInferError, match="a KV connector would send incomplete blocks"):
        build_scheduler(config)


@pytest.mark.parametrize("overridden", ["LlamaForCausalLM", "OPTForCausalLM"])
def test_a_model_class_of_the_users_own_is_not_replaced_in_silence(tiny_model, overridden):
    vllm_config = engine_config(tiny_model)
    vllm_config.parallel_config.worker_cls = "auto"
    vllm_config.model_config.model_class_overrides = {overridden: "some.module:Class"}
    refused = pytest.raises(AdaInferError, match="the class that model_class_overrides names")
    with refused if overridden == "LlamaForCausalLM" else nullcontext():
        refuse_unsupported(vllm_config, "AdaInferLlamaForCausalLM", Settings(exit_script=(1,)))


def test_a_logits_processor_that_a_package_brings_is_refused(
    tiny_model, tiny_policy, tmp_path, monkeypatch
):
    """VLLM loads it without being asked."""
    package = tmp_path / "some_package-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vllm.logits_processors]\nown = some.module:Class\n")
    monkeypatch.syspath_prepend(tmp_path)
    engine_config(tiny_model)
    with pytest.raises(ValueError, match=r"that packages bring .*uninstall .*some\.module"):
        engine_config(tiny_model, {"artifact": str(tiny_policy)})


@pytest.mark.parametrize("set_by", ["the user", "batch invariance"])
def test_graphs_that_vllm_replays_without_our_model_are_refused(
    tiny_model, tiny_policy, monkeypatch, set_by
):
    vllm_config = engine_config(tiny_model)
    vllm_config.parallel_config.worker_cls = "auto"
    monkeypatch.setattr(
        "vllm.platforms.current_platform",
        SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True),
    )
    monkeypatch.setattr(type(vllm_config), "use_v2_model_runner", True)
    settings = Settings(artifact=str(tiny_policy))
    refuse_unsupported(vllm_config, "AdaInferLlamaForCausalLM", settings)
    by_batch_invariance = "_uses_breakable_cudagraph_for_batch_invariance"
    monkeypatch.setattr(type(vllm_config), by_batch_invariance, lambda _: True)
    if set_by == "the user":
        refuse_unsupported(vllm_config, "AdaInferLlamaForCausalLM", settings)
        monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    else:
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(AdaInferError, match="set VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        refuse_unsupported(vllm_config, "AdaInferLlamaForCausalLM", settings)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    refuse_unsupported(vllm_config, "AdaInferLlamaForCausalLM", settings)


def test_an_encoder_decoder_model_is_refused(tiny_model, monkeypatch):
    """Such models need files that these tests do not make, so a Llama claims to be one."""
    vllm_config = engine_config(tiny_model)
    monkeypatch.setattr(ModelConfig, "is_encoder_decoder", property(lambda _config: True))
    with pytest.raises(AdaInferError, match="LlamaForCausalLM is an encoder-decoder model"):
        refuse_unsupported(vllm_config, "", Settings(exit_script=(1,)))


def test_a_multimodal_model_without_exit_points_is_refused(checkpoint):
    with pytest.raises(AdaInferError, match="is multimodal and has no exit points yet"):
        refuse_unsupported(engine_config(checkpoint("multimodal")), "", Settings(exit_script=(1,)))


@pytest.mark.parametrize(
    ("of", "setting", "value", "sentence"),
    [
        ("mixtral", "enable_expert_parallel", True, "drop --enable-expert-parallel"),
        ("mixtral", "data_parallel_size", 2, "start one server for each replica"),
        ("olmoe", "tensor_parallel_size", 2, "norms the keys of all heads as one"),
    ],
)
def test_ranks_of_a_mixture_that_would_wait_for_each_other_are_refused(
    checkpoint, of, setting, value, sentence
):
    vllm_config = engine_config(checkpoint(of))
    setattr(vllm_config.parallel_config, setting, value)
    ours = f"AdaInfer{CHECKPOINTS[of][1]}"
    with pytest.raises(AdaInferError, match=sentence):
        refuse_unsupported(vllm_config, ours, Settings(exit_script=(1,)))


def test_experts_that_vllm_would_find_by_counting_are_refused(checkpoint, monkeypatch):
    vllm_config = engine_config(checkpoint("mixtral"))
    monkeypatch.setattr("vllm.utils.torch_utils._USE_LAYERNAME", False)
    with pytest.raises(AdaInferError, match="without VLLM_USE_LAYERNAME"):
        refuse_unsupported(vllm_config, "AdaInferMixtralForCausalLM", Settings(exit_script=(1,)))


def test_a_policy_of_whole_prompts_is_refused_where_only_their_last_tokens_go_on(
    tiny_model, tmp_path, monkeypatch
):
    """As in a model whose layers after the fourth share keys and values."""
    monkeypatch.setattr("vllm_adainfer.engine.startup.configure.own_kv_layers", lambda _: 4)
    pooled: dict[str, Any] = {"probe": "pooled-label-head", "pooled_from": 1}
    for points in (0, 4), (0, 4, 5):
        artifact = tiny_artifact(tiny_model, tmp_path / "policy", exit_points=points, **pooled)
        refused = pytest.raises(ValueError, match=r"only the last one goes on after layer 4 .*5")
        with refused if points[-1] > 4 else nullcontext():
            engine_config(tiny_model, {"artifact": str(artifact)})
