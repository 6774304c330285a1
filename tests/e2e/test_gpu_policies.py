"""On a GPU: policies beside label heads, classifiers, and a server that calibrates itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import PoolingParams

from tests import student
from tests.classifier import classifier
from tests.conftest import tiny_engine
from tests.e2e.asking import outputs
from tests.e2e.pooled import KINDS, LEVELS, SOME, expected, mixed_load, part_of, request, traced
from tests.e2e.pooled import thresholds as thresholds_of
from tests.e2e.scripted import parts
from tests.e2e.test_auto import kind_policy
from tests.e2e.test_auto_start import left_behind
from tests.e2e.test_equal_to_stock import answers_of_engines, job
from tests.tiny import tiny_artifact, tiny_config, tiny_tensors
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.engine.self_test.self_test import Outcome, self_test
from vllm_adainfer.settings.engine import NO_POLICY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SERVED: dict[str, Any] = {
    "enforce_eager": False,
    "gpu_memory_utilization": 0.05,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 64 << 20,
}
BATCHES = 300  # it looks for new policies every second
IN_FP32 = {"attention_backend": "TRITON_ATTN"}


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's products of fp32 are TF32 unless it is told otherwise."""
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")


@pytest.mark.usefixtures("exact_products")
def test_students_branches_and_means_of_prompts_decide_as_defined(tiny_model, reference, tmp_path):
    artifacts: dict[str, Artifact] = {}
    sources = {}
    for name in ("whole", "student"):
        config = tiny_config(tiny_model, levels=LEVELS, **KINDS[name])
        thresholds = thresholds_of(config)
        encoder = None if config.student is None else student.encoder()
        whole = Artifact(config, tiny_tensors(config, *thresholds), encoder=encoder)
        artifacts |= whole.parts(name)
        written = tiny_artifact(
            tiny_model, tmp_path / name, *thresholds, levels=LEVELS, **KINDS[name]
        )
        sources[name] = str(written)
    llm = tiny_engine(tiny_model, {"artifact": sources, "min_rows_saved": 1}, **SERVED, **IN_FP32)
    prompts = mixed_load(0)
    kinds = [("whole", "student")[place % 2] for place in range(len(prompts))]
    params = [request(kind, SOME, artifacts) for kind in kinds]
    with traced(llm) as (ran, _):
        found = outputs(llm, prompts, params)
    left = set()
    for output, kind, prompt, asked in zip(found, kinds, prompts, params, strict=True):
        own = ran[output.request_id]
        if own.policy != NO_POLICY:
            assert own.policy == part_of(kind, prompt, output.num_cached_tokens, artifacts)
        wanted = expected(reference, artifacts.get(own.policy), prompt, asked)
        if wanted is not None:
            assert (own.depth, output.outputs[0].token_ids[0]) == wanted
        left.add((own.policy, own.depth))
    assert {("student", 0), ("whole", 2)} & left, "some must leave by a student or a branch"


def test_a_classifier_passes_the_self_test_and_scores(tiny_model, tmp_path):
    model = classifier(tiny_model, tmp_path / "softmax", 3)
    llm = tiny_engine(model, {"exit_script": [2, 4]}, "bfloat16", runner="pooling", **SERVED)
    assert self_test(parts(llm)[1]) == Outcome()
    prompts = [{"prompt_token_ids": list(range(5, 9 + 40 * place))} for place in range(8)]
    params = PoolingParams(task="classify")
    scored = llm.encode(prompts, params, pooling_task="classify", use_tqdm=False)
    assert all(one.outputs.data.isfinite().all() for one in scored)


@pytest.mark.usefixtures("exact_products")
def test_a_server_that_calibrates_itself_starts_again_twice(tiny_model, tmp_path):
    """With a policy in service, which it makes ready while vLLM captures graphs, or after that."""
    directory, labels = AutoDirectory(tmp_path / "auto"), list(tiny_config(tiny_model).label_ids)
    label = {"temperature": 0, "max_tokens": 1, "allowed_token_ids": labels}
    switch = {"adainfer": {"auto": {"directory": str(directory.root)}}}
    settings = {**SERVED, **IN_FP32, "dtype": "float32", "additional_config": switch}
    text = {"temperature": 0, "max_tokens": 1}  # of which it records nothing
    answers_of_engines([job(tiny_model, [[text] * 5], **settings)], {})
    kind = left_behind(directory, tiny_model, labels)
    for _ in range(2):
        [found] = answers_of_engines([job(tiny_model, [[label] * 5] * BATCHES, **settings)], {})
        assert len(found["answers"]) == BATCHES
        assert "quarantined" not in directory.events.read_text()
        assert kind_policy(directory, kind) == 1
