"""The switch at config time: what it selects, and what it refuses."""

from __future__ import annotations

from contextlib import nullcontext
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
from vllm_adainfer.engine.classes import CPU_WORKER, GPU_WORKER, SCHEDULER
from vllm_adainfer.engine.compat.config import engine_options_of
from vllm_adainfer.engine.scheduler.scheduler import build_scheduler
from vllm_adainfer.engine.startup.configure import configure
from vllm_adainfer.engine.startup.refusals import refuse_unsupported
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Settings

LLAMA = "LlamaForSequenceClassification"


def engine_config(model: Path, adainfer: Any = None, **settings: Any) -> Any:
    additional = {} if adainfer is None else {"adainfer": adainfer}
    settings = {"dtype": "float32", **settings}
    return EngineArgs(
        model=str(model), additional_config=additional, **settings
    ).create_engine_config()


def test_vllm_loads_the_plugin_by_its_entry_point():
    load_general_plugins()
    assert "AdaInferLlamaForCausalLM" in ModelRegistry.get_supported_archs()


def test_registering_again_changes_nothing():
    plugin.register()
    once = dict(model_hooks.MODELS_CONFIG_MAP)
    plugin.register()
    assert once == model_hooks.MODELS_CONFIG_MAP


def test_the_switch_selects_model_worker_and_scheduler(tiny_model, tiny_policy):
    config = engine_config(tiny_model, {"artifact": str(tiny_policy)})
    assert config.model_config.hf_config.architectures == ["AdaInferLlamaForCausalLM"]
    assert config.parallel_config.worker_cls == CPU_WORKER
    assert config.scheduler_config.scheduler_cls == SCHEDULER


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


@pytest.mark.parametrize("how", ["not configured", "not enabled", "kill switch"])
def test_without_the_switch_everything_is_vllms_own(tiny_model, tiny_policy, monkeypatch, how):
    adainfer: dict[str, Any] | None = {"artifact": str(tiny_policy)}
    if how == "not configured":
        adainfer = None
    elif how == "not enabled":
        adainfer = {"artifact": str(tiny_policy), "enabled": False}
    else:
        monkeypatch.setenv("VLLM_ADAINFER", "0")
    config = engine_config(tiny_model, adainfer)
    assert config.model_config.hf_config.architectures == ["LlamaForCausalLM"]
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.scheduler_config.scheduler_cls is None


@pytest.mark.parametrize("settings", [{}, {"enable_lora": True}, {"pipeline_parallel_size": 2}])
def test_capture_alone_selects_only_a_scheduler_and_refuses_nothing_else(
    tiny_model, tmp_path, settings
):
    capture = {"directory": str(tmp_path / "requests")}
    config = engine_config(tiny_model, {"capture": capture}, **settings)
    assert config.model_config.hf_config.architectures == ["LlamaForCausalLM"]
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert not config.model_config.logits_processors


def test_an_architecture_without_exit_points_can_be_captured(tiny_model, tmp_path):
    FalconConfig(architectures=["FalconForCausalLM"]).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    config = engine_config(tmp_path, {"capture": {"directory": str(tmp_path / "requests")}})
    assert config.model_config.hf_config.architectures == ["FalconForCausalLM"]
    assert config.scheduler_config.scheduler_cls == SCHEDULER


def test_capture_beside_an_artifact_leaves_the_exits_as_they_are(tiny_model, tiny_policy, tmp_path):
    capture = {"directory": str(tmp_path)}
    config = engine_config(tiny_model, {"artifact": str(tiny_policy), "capture": capture})
    assert config.model_config.hf_config.architectures == ["AdaInferLlamaForCausalLM"]
    assert config.parallel_config.worker_cls == CPU_WORKER


@pytest.mark.parametrize("how", ["not enabled", "kill switch"])
def test_what_turns_the_plugin_off_turns_capture_off(tiny_model, tmp_path, monkeypatch, how):
    adainfer = {"capture": {"directory": str(tmp_path / "requests")}}
    if how == "not enabled":
        adainfer["enabled"] = False
    else:
        monkeypatch.setenv("VLLM_ADAINFER", "0")
    assert engine_config(tiny_model, adainfer).scheduler_config.scheduler_cls is None
    assert not (tmp_path / "requests").exists()


@pytest.mark.parametrize(
    ("directory", "settings", "sentence"),
    [
        ("/proc/requests", {}, "cannot write to /proc/requests .*: name a directory"),
        ("", {"scheduler_cls": "some.Scheduler"}, "custom --scheduler-cls .*: drop it, or"),
        ("", {"hf_overrides": {"canvas_length": 8}}, "a diffusion model has a scheduler of its"),
    ],
)
def test_an_engine_that_cannot_capture_does_not_start(
    tiny_model, tmp_path, directory, settings, sentence
):
    capture = {"directory": directory or str(tmp_path)}
    with pytest.raises(ValueError, match=sentence):
        engine_config(tiny_model, {"capture": capture}, **settings)


@pytest.mark.parametrize(
    ("adainfer", "sentence"),
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
        ({"exit_script": [2], "epsilon": 0.1}, "go with .artifact., not .exit_script."),
        ({"exit_script": [2], "shadow_rate": 0.1}, "go with .artifact., not .exit_script."),
        ({"exit_script": []}, "exit_script must ascend between 0 and 5, got \\[\\]"),
        ({"exit_script": [-1, 3]}, "exit_script must ascend between 0 and 5"),
        ({"exit_script": [3, 2]}, "exit_script must ascend between 0 and 5"),
        ({"exit_script": [2, 2]}, "exit_script must ascend between 0 and 5"),
        ({"exit_script": [2, 6]}, "exit_script must ascend between 0 and 5"),
        ({"exit_points": [2]}, "start with --enable-lora"),
    ],
)
def test_bad_values_of_the_switch_are_named(tiny_model, adainfer, sentence):
    with pytest.raises(ValueError, match=sentence):
        engine_config(tiny_model, adainfer)


def test_an_epsilon_that_was_not_certified_is_refused(tiny_model, tiny_policy):
    with pytest.raises(ValueError, match="stricter than the artifact's strictest certified bound"):
        engine_config(tiny_model, {"artifact": str(tiny_policy), "epsilon": 0.001})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism cannot drop rows"),
        ({"prefill_context_parallel_size": 2}, "context parallelism splits a request's rows"),
        ({"enable_batch_sharded_sampling": True}, "batch-sharded sampling bypasses the logits"),
        ({"runner": "pooling"}, "of the pooling models only classifiers have an answer"),
        ({"convert": "classify"}, "policy default decides tokens, and this engine answers with"),
        ({"enable_prompt_embeds": True}, "prompt embeddings enter below"),
        ({"kv_offloading_size": 1.0}, "a KV connector would send incomplete blocks"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "a KV connector would send incomplete blocks",
        ),
        ({"offload_group_size": 2}, "set --offload-group-size 0"),
        (
            {"weight_transfer_config": {"backend": "sparse_nccl"}},
            "set the backend of --weight-transfer-config to nccl or ipc",
        ),
        ({"enable_return_routed_experts": True}, "the experts of rows that have moved"),
        ({"logits_processors": ["some.module:Class"]}, "custom logits processors"),
        ({"model_impl": "transformers"}, "--model-impl transformers builds another model class"),
        (
            {"hf_overrides": {"dual_chunk_attention_config": {"chunk_size": 64}}},
            "dual chunk attention is not supported",
        ),
        ({"worker_cls": "some.Worker"}, "custom --worker-cls"),
        ({"scheduler_cls": "some.Scheduler"}, "custom --scheduler-cls"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding reads the hidden states",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_engine_settings_are_refused_with_what_to_set(
    tiny_model, tiny_policy, settings, sentence
):
    with pytest.raises(ValueError, match=sentence) as refusal:
        engine_config(tiny_model, {"artifact": str(tiny_policy)}, **settings)
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


@pytest.mark.parametrize("scheme", ["gptq", "compressed-tensors fp8"])
def test_a_checkpoint_that_is_quantised_itself_needs_no_option(tiny_model, tmp_path, scheme):
    quantised, _ = quantise(tiny_model, scheme, False, tmp_path)
    options = engine_options_of(engine_config(quantised, dtype="bfloat16"))
    assert (options.quantization, options.kv_cache_dtype) == (None, None)


def config_alone(family: str, architecture: str, model: Path, directory: Path) -> Path:
    """Config and tokenizer, without weights, which config time does not read."""
    config = FAMILIES[family](**SHAPE)
    config.architectures = [architecture]
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def recurrent(tiny_model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "qwen3.5"
    return config_alone("qwen3.5", "Qwen3_5ForCausalLM", tiny_model, directory)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, None),
        ({"enable_lora": True}, "no adapters for layers with a recurrent state on a CPU"),
        (
            {"hf_overrides": {"layer_types": [*["full_attention"] * 5, "linear_attention"]}},
            "the last layer keeps a recurrent state",
        ),
    ],
)
def test_what_recurrent_layers_do_not_allow_is_refused(recurrent, settings, sentence):
    refused = nullcontext() if sentence is None else pytest.raises(ValueError, match=sentence)
    with refused:
        config = engine_config(recurrent, {"exit_script": [2]}, **settings)
        assert config.model_config.hf_config.architectures == ["AdaInferQwen3_5ForCausalLM"]


def test_calibration_needs_the_whole_lm_head_on_one_rank(tiny_model):
    with pytest.raises(ValueError, match="calibrate with --tensor-parallel-size 1"):
        engine_config(tiny_model, {"record": [2]}, tensor_parallel_size=2)


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


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FalconConfig(architectures=["FalconForCausalLM"]), "has no exit points yet: serve one of"),
        (MambaConfig(architectures=["MambaForCausalLM"]), "keeps a recurrent state"),
        (JambaConfig(architectures=["JambaForCausalLM"], **SMALL), "keeps a recurrent state"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_an_architecture_without_exit_points_is_refused_not_ignored(
    tiny_model, tiny_policy, tmp_path, config, reason
):
    config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    [architecture] = config.architectures
    with pytest.raises(ValueError, match=f"{architecture} {reason}"):
        engine_config(tmp_path, {"artifact": str(tiny_policy)})


@pytest.mark.parametrize(
    "architecture", ["LlamaForSequenceClassification", "Qwen3ForSequenceClassification"]
)
def test_a_classifier_gets_our_class_of_the_model_that_vllm_makes_it_of(
    tiny_model, tmp_path, architecture
):
    """The second has no entry in vLLM's registry, and a config hook of its own."""
    family = "qwen3" if architecture.startswith("Qwen3") else "llama"
    directory = config_alone(family, architecture, tiny_model, tmp_path)
    config = engine_config(directory, {"exit_script": [2]}).model_config
    causal = architecture.replace("SequenceClassification", "CausalLM")
    assert config.hf_config.architectures == [f"AdaInfer{causal}"]
    assert (config.runner_type, config.convert_type) == ("pooling", "classify")
    assert not config.logits_processors


@pytest.mark.parametrize(
    ("architecture", "settings", "sentence"),
    [
        ("Qwen3Model", {}, "of the pooling models only classifiers"),
        ("Qwen3VLForSequenceClassification", {}, "has no exit points yet"),
        (LLAMA, {"pooler_config": {"task": "token_classify"}}, "reads all tokens: set task to"),
        (LLAMA, {"pooler_config": {"seq_pooling_type": "MEAN"}}, "set seq_pooling_type to LAST"),
        (LLAMA, {"pooler_config": {"logit_mean": 0.5}}, "drop logit_mean and logit_sigma"),
        (LLAMA, {"enable_lora": True}, "adapters replace a classifier's head"),
        (LLAMA, {"hf_overrides": {"is_causal": False}}, "bidirectional attention needs every"),
    ],
)
def test_a_pooling_model_that_cannot_exit_is_refused_not_ignored(
    tiny_model, tmp_path, architecture, settings, sentence
):
    family = "qwen3" if architecture.startswith("Qwen3") else "llama"
    directory = config_alone(family, architecture, tiny_model, tmp_path)
    with pytest.raises(ValueError, match=sentence):
        engine_config(directory, {"exit_script": [2]}, **settings)


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


@pytest.fixture(scope="module")
def multimodal(tiny_model, tmp_path_factory) -> Path:
    name = "gemma4-multimodal"
    directory = tmp_path_factory.mktemp("model") / name
    return config_alone(name, "Gemma4ForConditionalGeneration", tiny_model, directory)


@pytest.mark.parametrize(
    "settings",
    [
        {"language_model_only": True},
        {"limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0}},
    ],
)
def test_a_multimodal_model_is_served_with_text_alone(multimodal, settings):
    config = engine_config(multimodal, {"exit_script": [2]}, **settings)
    ours = "AdaInferGemma4ForConditionalGeneration"
    assert config.model_config.hf_config.architectures == [ours]


@pytest.mark.parametrize("settings", [{}, {"limit_mm_per_prompt": {"image": 0}}])
def test_a_multimodal_model_that_takes_images_or_video_is_refused(multimodal, settings):
    with pytest.raises(ValueError, match="serve text alone with --language-model-only"):
        engine_config(multimodal, {"exit_script": [2]}, **settings)


def test_a_multimodal_model_without_exit_points_is_refused(multimodal):
    with pytest.raises(AdaInferError, match="is multimodal and has no exit points yet"):
        refuse_unsupported(engine_config(multimodal), "", Settings(exit_script=(1,)))


@pytest.mark.parametrize(
    ("mixture", "setting", "value", "sentence"),
    [
        (MixtralConfig, "enable_expert_parallel", True, "drop --enable-expert-parallel"),
        (MixtralConfig, "data_parallel_size", 2, "start one server for each replica"),
        (OlmoeConfig, "tensor_parallel_size", 2, "norms the keys of all heads as one"),
    ],
)
def test_ranks_of_a_mixture_that_would_wait_for_each_other_are_refused(
    tiny_model, tmp_path, mixture, setting, value, sentence
):
    name = mixture.__name__.replace("Config", "ForCausalLM")
    mixture(architectures=[name], **SMALL).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    vllm_config = engine_config(tmp_path)
    setattr(vllm_config.parallel_config, setting, value)
    settings = Settings(exit_script=(1,))
    with pytest.raises(AdaInferError, match=sentence):
        refuse_unsupported(vllm_config, f"AdaInfer{name}", settings)


def test_experts_that_vllm_would_find_by_counting_are_refused(tiny_model, tmp_path, monkeypatch):
    MixtralConfig(architectures=["MixtralForCausalLM"], **SMALL).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    vllm_config = engine_config(tmp_path)
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
