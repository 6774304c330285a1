"""A branch reads each token of a prompt: alone or among others, whole or in chunks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adainfer_kernels import Head, rows_to_compile_for
from torch import Tensor

from tests.calibrations import (
    DEPTH,
    EPSILON,
    HF_CONFIG,
    HIDDEN,
    LABEL_IDS,
    cheap_probes_that_learn_fast,
    of_prompts,
    recording_of_prompts,
    states_that_tell,
)
from tests.tiny import tiny_config, tiny_tensors
from tests.unit.test_choose import costs_of, exit_after
from tests.unit.test_pooled_policy import POOLED
from tests.unit.test_pooling import step_of
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.branch_shapes import (
    BRANCH_WIDTH,
    MOST_BRANCH_TOKENS,
    branch_shapes,
)
from vllm_adainfer.artifact.files import load_artifact, save_artifact
from vllm_adainfer.engine.worker.warm_up import warm_up
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.loop.pooling import CarriedPrompts, PooledPrompts
from vllm_adainfer.exits.recording.recorder import StateFiles
from vllm_adainfer.offline.calibration import fit_policy as best
from vllm_adainfer.offline.calibration.fit import branches, cost
from vllm_adainfer.offline.calibration.fit.branches import (
    branches_of,
    promising,
    train_branches,
)
from vllm_adainfer.offline.calibration.fit.calibration import TrainedProbe
from vllm_adainfer.offline.calibration.fit.choose import choose_exits, one_per_layer
from vllm_adainfer.offline.calibration.fit.distil import Taught, distil
from vllm_adainfer.offline.calibration.fit.exits import with_trained
from vllm_adainfer.offline.calibration.fit.training import Lesson
from vllm_adainfer.offline.calibration.fit_policy import fit_policy, with_trained_probes
from vllm_adainfer.offline.calibration.record import collect
from vllm_adainfer.offline.calibration.record.rows import FOLDS, OwnStates, own_states_of
from vllm_adainfer.offline.calibration.write.card import model_card
from vllm_adainfer.offline.calibration.write.policy_artifact import (
    policy_config,
    policy_details,
    policy_tensors,
)
from vllm_adainfer.offline.reports.views import views_of
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.policy.probe import Probe


def random_branch(hidden_size: int = HIDDEN, dtype: torch.dtype = torch.float32) -> Probe:
    torch.manual_seed(0)
    head = Head(torch.randn(2, 2 * BRANCH_WIDTH), torch.zeros(2))
    encoder = StateEncoder(hidden_size).to(dtype).eval().requires_grad_(False)
    return Probe(head, token_ids=LABEL_IDS, encoder=encoder, fused=False)


def prompts_of(*lens: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, HIDDEN, generator=generator) for length in lens]


def scores(branch: Probe, prompts: list[Tensor]) -> Tensor:
    lens = np.array([len(one) for one in prompts])
    return branch.label_scores(branch.project(torch.cat(prompts)), lens=lens)


def definition(branch: Probe, states: Tensor) -> Tensor:
    """One `nn.TransformerEncoderLayer` over the normed states of a prompt."""
    own = branch.encoder
    layer = torch.nn.TransformerEncoderLayer(
        BRANCH_WIDTH, 3, 384, activation="gelu", norm_first=True, batch_first=True
    )
    layer.train()  # whose fast path rounds otherwise
    names = {
        "self_attn.in_proj_weight": own.attention_in.weight,
        "self_attn.in_proj_bias": own.attention_in.bias,
        "self_attn.out_proj.weight": own.attention_out.weight,
        "self_attn.out_proj.bias": own.attention_out.bias,
        "linear1.weight": own.mlp_in.weight,
        "linear1.bias": own.mlp_in.bias,
        "linear2.weight": own.mlp_out.weight,
        "linear2.bias": own.mlp_out.bias,
        "norm1.weight": own.attention_norm.weight,
        "norm1.bias": own.attention_norm.bias,
        "norm2.weight": own.mlp_norm.weight,
        "norm2.bias": own.mlp_norm.bias,
    }
    layer.load_state_dict(names)
    for module in layer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    layer.self_attn.dropout = 0.0
    normed = states / (states.square().mean(1, keepdim=True) + 1e-6).sqrt()
    rows = layer(own.project(normed).unsqueeze(0))[0]
    return branch.head.weight @ torch.cat([rows[-1], rows.mean(0)]) + branch.head.bias


def test_its_scores_are_those_of_a_transformer_layer_over_the_normed_states():
    branch, prompts = random_branch(), prompts_of(1, 7, 3, 30, 7)
    wanted = torch.stack([definition(branch, states) for states in prompts])
    torch.testing.assert_close(scores(branch, prompts), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_is_trained_on_states_of_any_dtype_that_models_run_in(dtype):
    encoder = random_branch().encoder
    prompts = [states.to(dtype) for states in prompts_of(3, 9)]
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(prompts)
    torch.testing.assert_close(
        found, encoder([one.float() for one in prompts]), atol=0.03, rtol=0.01
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_a_prompt_has_the_same_scores_alone_and_among_others(dtype, tolerance):
    branch = random_branch(dtype=dtype)
    prompts = prompts_of(*range(1, 80))
    among = scores(branch, prompts)
    alone = torch.cat([scores(branch, [states]) for states in prompts])
    assert among.dtype == torch.float32
    torch.testing.assert_close(among, alone, rtol=0.01, atol=tolerance)
    backwards = scores(branch, prompts[::-1]).flip(0)
    torch.testing.assert_close(among, backwards, rtol=0.01, atol=tolerance)


def test_an_artifact_names_the_shapes_that_a_branch_has():
    found = {name: tuple(one.shape) for name, one in StateEncoder(48).state_dict().items()}
    assert found == branch_shapes(48)


@pytest.mark.parametrize("seed", range(4))
def test_states_of_prompts_in_any_chunks_are_the_last_ones_of_their_own(seed):
    generator = np.random.default_rng(seed)
    lens = np.array([5, MOST_BRANCH_TOKENS + 90, 2 * MOST_BRANCH_TOKENS, 40])
    pooled_from = [2, 50, 1, 39]
    states = torch.randn(len(lens), lens.max(), HIDDEN)
    carried, done, found = CarriedPrompts(), np.zeros(len(lens), dtype=np.int64), {}
    branch = random_branch()
    while (done < lens).any():
        chunk = np.minimum(generator.integers(1, 700, len(lens)), lens - done)
        done += chunk
        complete = (done == lens) & (chunk > 0)
        step = step_of(chunk.tolist(), done.tolist(), complete.tolist(), pooled_from)
        prompts = PooledPrompts(step, carried)
        rows = [states[one, end - own : end] for one, (own, end) in enumerate(zip(chunk, done))]  # noqa: B905
        order = generator.permutation(np.flatnonzero(complete))
        read, counts = prompts.read_states(
            0, branch.project, order, prompts.chunks, step.layout, HiddenStates(torch.cat(rows))
        )
        found |= dict(zip(order.tolist(), read.split(counts.tolist()), strict=True))
        carried.step_ended(step)
        kept = [one[0] for one in carried.read.values()]
        assert all(one.shape[0] <= MOST_BRANCH_TOKENS for one in kept)
        assert all(one.untyped_storage().nbytes() == one.nbytes for one in kept)
    assert len(found) == len(lens)
    for request, read in found.items():
        own = states[request, pooled_from[request] : lens[request]][-MOST_BRANCH_TOKENS:]
        torch.testing.assert_close(read, branch.project(own), rtol=1e-4, atol=1e-5)


def test_states_are_read_back_from_files_that_are_gone(tmp_path):
    """In the order of the prompts, the second of which had no tokens of its own."""
    files, like = StateFiles(str(tmp_path), (2, 4)), torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    prompts = {tag: states.bfloat16() for tag, states in enumerate(prompts_of(3, 5, 2, 4))}
    for tags in (3, 0), (2,):
        for layer in files.layers:
            files.add(layer, torch.cat([layer * prompts[tag] for tag in tags]))
        files.added(np.array(tags), np.array([len(prompts[tag]) for tag in tags]))
    found = own_states_of(files.by_layer, files.take(), like, prompts=4)
    for path in tmp_path.iterdir():
        path.unlink()
    first, nothing, *others = found.of(4, np.arange(4))
    assert nothing.shape == (0, HIDDEN)
    for states, tag in zip([first, *others], (0, 2, 3), strict=True):
        assert torch.equal(states, 4 * prompts[tag])
    assert own_states_of({}, {}, like, prompts=4) is None
    files = StateFiles(str(tmp_path), (2,))
    files.add(2, like[:0])
    files.added(np.arange(0), np.arange(0))
    empty = own_states_of(files.by_layer, files.take(), like, prompts=1)
    assert empty.of(2, np.array([0]))[0].shape == (0, HIDDEN)


def test_one_is_not_asked_about_a_prompt_without_tokens_of_its_own():
    prompts = prompts_of(3, 2)
    states = OwnStates({2: torch.cat(prompts)}, np.array([0, 3, 3]), np.array([3, 3, 5]))
    branch = random_branch()
    trained = TrainedProbe(2, branch, torch.empty(0), partial(states.of, 2))
    everyone = np.arange(3)
    assert trained.asked(everyone).tolist() == [True, False, True]
    found = trained.scores(everyone, None)
    assert torch.equal(found[1], torch.zeros(2))
    torch.testing.assert_close(found[[0, 2]], scores(branch, prompts), rtol=1e-4, atol=1e-4)


def test_states_that_the_disk_has_no_room_for_are_refused_before_the_model_runs(monkeypatch):
    """With how much they take, and what to set: 100 prompts of 512 tokens, and one of 8."""
    examples = [SimpleNamespace(token_ids=[1] * length) for length in [*([600] * 100), 10]]
    needed = 2 * (100 * MOST_BRANCH_TOKENS + 8) * 4096 * 2
    free = needed - 1
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    started: list[Any] = []
    monkeypatch.setattr(collect, "start_engine", lambda *given, **_: started.append(given))
    monkeypatch.setattr(collect, "stop_engine", lambda _: None)
    monkeypatch.setattr(collect, "record", lambda *_: None)

    def start() -> None:
        hf_config = SimpleNamespace(hidden_size=4096, num_hidden_layers=32)
        plan = collect.Plan((8, 16), pooled_from=2, branches=(8, 16))
        collect.recorded("model", hf_config, examples, plan)

    with pytest.raises(AdaInferError, match=r"layers 8, 16, which take 0\.8 GiB.* set TMPDIR to "):
        start()
    assert not started
    free = needed
    start()
    assert started


BRANCHED: dict[str, Any] = {**POOLED, "branches": (2, 5)}


def test_an_artifact_is_read_back_as_it_was_written(tiny_model, tmp_path):
    config = tiny_config(tiny_model, **BRANCHED)
    tensors = tiny_tensors(config)
    save_artifact(tmp_path / "policy", config, tensors, {}, "card\n")
    loaded = load_artifact(str(tmp_path / "policy"))
    assert loaded.config == config
    assert tensors["exit.2.head_weight"].shape == (2, 2 * BRANCH_WIDTH)
    whole, last = loaded.parts("a").values()
    assert whole.tensors.keys() >= {f"exit.5.branch.{name}" for name in branch_shapes(64)}
    assert last.config.branches == ()
    assert not [name for name in last.tensors if "branch" in name]
    policy = Policy(whole, torch.device("cpu"))
    assert [isinstance(one.encoder, StateEncoder) for one in policy.probes] == [False, True, True]


def test_before_the_first_request_each_branch_has_read_states(tiny_model):
    config = tiny_config(tiny_model, **BRANCHED)
    tensors = {name: one.bfloat16() if "branch" in name else one for name, one in
               tiny_tensors(config).items()}  # fmt: skip
    policy = Policy(Artifact(config, tensors).parts("a")["a"], torch.device("cpu"))
    read, encoder = [], policy.probes[1].encoder
    own = encoder.read
    encoder.read = lambda rows, lens, _: read.append(rows) or own(rows, lens)
    warm_up(PolicySet({"a": policy}), torch.zeros(20, 64, dtype=torch.bfloat16))
    assert {(rows.dtype, rows.shape[1]) for rows in read} == {(torch.bfloat16, BRANCH_WIDTH)}
    assert {len(rows) for rows in read} == {*rows_to_compile_for(20)}


def test_tensors_of_several_dtypes_are_computed_with_in_one(tiny_model):
    config = tiny_config(tiny_model, **BRANCHED)
    tensors = {name: one.half() if "mlp" in name else one for name, one in
               tiny_tensors(config).items()}  # fmt: skip
    own = {n.removeprefix("exit.2.branch."): t for n, t in tensors.items() if "2.branch" in n}
    encoder = StateEncoder.of(own, torch.device("cpu"))
    assert {one.dtype for one in encoder.parameters()} == {torch.float32}
    assert encoder([torch.randn(3, 64)]).isfinite().all()


def as_branch(candidate: Any) -> Any:
    return replace(candidate, probe=random_branch())


@pytest.mark.parametrize("choose", [choose_exits, one_per_layer])
@pytest.mark.parametrize("seed", range(5))
def test_never_two_candidates_of_one_layer_are_chosen(choose, seed):
    generator = np.random.default_rng(seed)
    heads = [
        exit_after(layer, generator.standard_normal(80) + layer / 4, np.zeros(80))
        for layer in (2, 4, 6)
    ]
    branches = [
        as_branch(exit_after(layer, generator.standard_normal(80) + layer / 4, np.zeros(80)))
        for layer in (2, 4)
    ]
    candidates = sorted([*heads, *branches], key=lambda exit: exit.layer)
    costs = replace(costs_of(probe=1e-7), branch={2: 1e-7, 4: 1e-7})
    found = choose(candidates, costs, np.full(80, 7.0), 1.0)
    layers = [exit.layer for exit in found]
    assert layers == sorted(set(layers))
    if choose is one_per_layer:
        assert layers == [2, 4, 6]


def test_a_branch_is_chosen_by_its_own_cost_and_results():
    """It knows all answers after layer 2, whose head knows none."""
    unsure = exit_after(2, np.full(80, -np.inf), np.ones(80))
    sure = as_branch(exit_after(2, np.ones(80), np.zeros(80)))
    for seconds, chosen in ((1e-7, [sure]), (1.0, [])):
        costs = replace(costs_of(probe=1e-7), branch={2: seconds})
        assert choose_exits([unsure, sure], costs, np.full(80, 7.0), 0.0) == chosen


def exclusive(count: int) -> tuple[list[Tensor], Tensor]:
    """States of prompts, some with a token of a kind, of another, or of both: label is the xor."""
    generator = torch.Generator().manual_seed(0)
    prompts, labels = [], torch.zeros(count, 2)
    for number in range(count):
        length = int(torch.randint(4, 9, (1,), generator=generator))
        states = 0.1 * torch.randn(length, HIDDEN, generator=generator)
        states[:, 0] = 1.0
        kinds = torch.rand(2, generator=generator) < 0.5
        for kind in torch.nonzero(kinds).flatten().tolist():
            states[kind] = 0
            states[kind, 1 + kind] = 1.0
        prompts.append(states)
        labels[number, int(kinds[0] ^ kinds[1])] = 1.0
    return prompts, labels


def test_it_learns_what_no_head_on_the_mean_can(capsys):
    prompts, labels = exclusive(300)
    ends = np.cumsum([len(states) for states in prompts])
    lens = np.array([len(states) for states in prompts])
    states = OwnStates({2: torch.cat(prompts)}, ends - lens, ends)
    everyone = np.arange(len(prompts))
    read = torch.stack([torch.cat([one[-1], one.mean(0)]) for one in prompts])
    taught = Taught(read, labels)
    lesson = Lesson(taught, everyone, everyone % 2, LABEL_IDS, seed=0)
    [found] = train_branches(states, lesson)
    assert "training a branch after layer 2 on 300 prompts, for up to 1 minute" in (
        capsys.readouterr().err
    )
    right, new = labels.argmax(1), everyone % FOLDS == FOLDS - 1
    head = distil(taught, everyone % FOLDS, (1.0,))[2][FOLDS - 1]
    by_head = (read @ head.matrix.T + head.bias).argmax(1)
    assert (by_head == right)[new].float().mean() < 0.8
    assert (found.unseen.argmax(1) == right).float().mean() > 0.95
    assert found.asked(everyone).all()
    assert (found.scores(everyone, None).argmax(1) == right).float().mean() > 0.95


@pytest.fixture
def branched(monkeypatch) -> Any:
    """A pooled policy whose heads know little, and the same with the branches that pay."""
    cheap_probes_that_learn_fast(monkeypatch)
    monkeypatch.setattr(branches, "EPOCHS", 2)
    recording = recording_of_prompts(mean_noise=1.0)
    heads = fit_policy(of_prompts(recording), "pooled-label-head")
    layers = [exit.layer for exit in heads.exits if exit.layer > 0]
    return heads, states_that_tell(recording, layers)


def test_branches_that_pay_are_kept_and_shown_with_their_cost(branched):
    heads, states = branched
    found = with_trained_probes(heads, *branches_of(heads.calibration, states))
    assert found.branches
    assert found.expected["chosen"] < heads.expected["chosen"]
    layers = [exit.layer for exit in found.exits]
    assert {exit.layer for exit in found.last_token.exits} <= {*layers} - {0}
    config, details = policy_config(found, "tiny", HF_CONFIG), policy_details(found)
    assert config.branches == found.branches
    by_layer = {one["layer"]: one for one in details["exit_points"]}
    for layer in found.branches:
        assert by_layer[layer]["probe_bytes"] > 2 * sum(np.prod(s) for s in
                                                        branch_shapes(HIDDEN).values())  # fmt: skip
        assert by_layer[layer]["agreement"] == details["branch_agreement"][str(layer)]
        assert f"{layer}, branch (exit point)" in model_card(config, details)
    recording = heads.calibration.rows
    part = Artifact(config, policy_tensors(found)).parts("")[""]
    level = config.level_of(None)
    seen = views_of(part, replace(recording, own_states=states), 1, level, str)
    assert [view.layer for view in seen] == [*layers, DEPTH]


def test_all_are_judged_by_what_they_have_not_seen(branched):
    """The student takes the place of the first head, a branch stands beside its layer's head."""
    heads, states = branched
    calibrated = heads.calibration
    recording, split = calibrated.rows, calibrated.split
    own = branches_of(calibrated, states)
    student = replace(own[0], layer=0)
    found = with_trained(replace(calibrated, trained=(student, *own)), heads.candidates)
    layers = sorted([*(one.layer for one in heads.candidates), *(one.layer for one in own)])
    assert [exit.layer for exit in found] == layers
    assert {len(exit.fitted.loss) for exit in found} == {len(split.fit)}
    assert {len(exit.held_out.loss) for exit in found} == {len(split.certify)}
    assert [exit.is_branch for exit in found if exit.layer == 0] == [True]
    [branch] = [exit for exit in found if exit.is_branch and exit.layer == own[-1].layer]
    assert branch.fitted.tokens.tolist() == LABEL_IDS[own[-1].unseen.argmax(1)].tolist()
    held_out = own[-1].scores(recording.prompts[recording.of(split.certify)], None)
    assert branch.held_out.tokens.tolist() == LABEL_IDS[held_out.argmax(1)].tolist()


def test_without_a_branch_that_pays_the_policy_is_what_it_was(branched, monkeypatch, capsys):
    heads, states = branched
    monkeypatch.setattr(cost, "trained_seconds", lambda *_: 1.0)
    found = fit_policy(heads.calibration, "branch", None, lambda _: states)
    assert found.branches == ()
    assert found.points[EPSILON].threshold == heads.points[EPSILON].threshold
    assert "branches cost more time than they save, and are left out" in capsys.readouterr().err


@pytest.mark.parametrize(("layers", "trained"), [(0.2, True), (0.5, False)])
def test_auto_trains_branches_where_one_takes_a_small_part_of_a_layer(
    branched, monkeypatch, layers, trained
):
    _, states = branched
    monkeypatch.setattr(best, "untrained_branch_layers", lambda *_: layers)
    asked: list[Any] = []

    def states_after(after: Any) -> OwnStates:
        asked.append(after)
        return states

    recording = recording_of_prompts(1.0 if trained else 0.3)
    found = fit_policy(of_prompts(recording), "auto", None, states_after)
    assert bool(asked) == trained
    assert bool(found.branches) == trained


@pytest.mark.parametrize("knows", [True, False])
def test_a_first_look_finds_the_branches_that_do_as_well_as_heads(branched, knows):
    """States that tell the answer are worth a branch, noise is not."""
    heads, states = branched
    if not knows:
        noise = {layer: torch.randn_like(rows) for layer, rows in states.rows.items()}
        states = replace(states, rows=noise)
    found = promising(heads.calibration, heads.exits, states)
    assert found == ([*states.rows] if knows else [])


def test_auto_trains_no_branch_that_a_first_look_speaks_against(branched, monkeypatch, capsys):
    monkeypatch.setattr(best, "untrained_branch_layers", lambda *_: 0.1)
    monkeypatch.setattr(best, "promising", lambda *_: [])
    monkeypatch.setattr(best, "branches_of", lambda *_: pytest.fail("none is worth it"))
    _, states = branched
    found = fit_policy(of_prompts(recording_of_prompts(1.0)), "auto", None, lambda _: states)
    assert found.branches == ()
    assert "at a first look no branch does as well" in capsys.readouterr().err


def test_an_untrained_branch_is_timed_in_layers():
    recording = recording_of_prompts(0.3)
    slow, fast = (
        cost.untrained_branch_layers(
            of_prompts(replace(recording, model=replace(recording.model, layer_seconds=seconds)))
        )
        for seconds in (1e-3, 1e-6)
    )
    assert 0 < slow < 1 < fast


def test_a_branch_is_trained_only_where_the_head_still_errs():
    def exit_at(layer: int, agrees: float) -> Any:
        rows = np.arange(100) < 100 * agrees
        return SimpleNamespace(layer=layer, fitted=SimpleNamespace(agrees=rows))

    exits = [exit_at(0, 0.7), exit_at(4, 0.8), exit_at(16, 0.97), exit_at(24, 0.99)]
    assert branches.layers_to_branch(exits) == [4, 16]
