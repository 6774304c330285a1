"""What the code at hand makes of the golden artifacts and their inputs.

This file follows the code; the artifacts, inputs and results on disk do not. Inputs are multiples
of a power of two, so that the products of heads and states are exact in whatever order they are
added up.
"""

from __future__ import annotations

import lzma
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from adainfer_kernels import Head, Norm
from safetensors.torch import load_file
from torch import Tensor

from tests.scored import scored as rows_of
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import LabelTest, certify
from vllm_adainfer.offline.calibration.certify.path import (
    Queries,
    held_out_path,
    pair_path,
    pairs_of_thresholds,
    threshold_grid,
)
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Scored
from vllm_adainfer.offline.calibration.fit.probes import Target, answers_of_probe
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.evaluation.report import build_report, summary_line
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.first_tokens import FirstTokens
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.promise.first_documents import FirstDocuments, relevance
from vllm_adainfer.promise.label_subsets import mask_of, restrict
from vllm_adainfer.promise.probabilities import LabelProbabilities
from vllm_adainfer.promise.promise import Outcome, Unit

HERE = Path(__file__).parent
INPUTS = "inputs.safetensors"
DECISIONS, SCORED, RUNS = (f"{name}.safetensors.xz" for name in ("decisions", "scored", "runs"))
NUMBERS = "numbers.json.xz"
DECIDED = 24  # the first rows, which policies decide here; all rows certify
HALF = 84  # rows fit, the others are held out
GROUP = 6  # rows are one query, or one group of requests
CPU = torch.device("cpu")
NORM = Norm("rms", torch.ones(8), eps=1e-5)
EPSILONS = (0.16, 0.3)


@dataclass(frozen=True)
class Inputs:
    """What all golden artifacts read.

    Attributes:
        states: fp32 [rows, 8], by layer, or by another name of what is read.
        head: fp32 [32, 8], the LM head.
        bits: int64 [rows], the labels of a pool that each request names.
        lens: [prompts], the tokens of the prompts of which ``prompt`` has the states.
        right: int64 [rows], the right label of each.

    """

    states: Mapping[str, Tensor]
    head: Tensor
    bits: Tensor
    lens: Tensor
    right: Tensor

    @classmethod
    def load(cls) -> Inputs:
        raw = load_file(HERE / INPUTS)
        states = {n: raw[n].float() / 4 for n in ("final", "2", "4", "mean2", "mean4", "prompt")}
        return cls(states, raw["head"].float() / 8, raw["bits"].long(), raw["lens"], raw["right"])

    def logits(self, config: ArtifactConfig) -> Tensor:
        """fp32 [rows, vocabulary], full depth's; of a classifier, [rows, columns]."""
        logits = self.states["final"] @ self.head.T
        if config.score_head is None:
            return logits
        scores = logits[:, [17, 9, 2][: len(config.labels)]]
        if config.score_head == "sigmoid":
            return torch.stack([torch.zeros(len(scores)), scores[:, 1]], dim=1)
        return scores

    def subsets(self, config: ArtifactConfig) -> Tensor | None:
        if not config.label_pool:
            return None
        return mask_of(self.bits, torch.arange(len(config.labels)))


def unpacked(case: str, directory: Path) -> Path:
    """A copy of an artifact in `directory`; its large files are packed on disk."""
    copy = directory / case
    results = shutil.ignore_patterns(DECISIONS, SCORED, RUNS, NUMBERS)
    shutil.copytree(HERE / case, copy, ignore=results)
    for packed in [*copy.rglob("*.xz")]:
        packed.with_suffix("").write_bytes(read(packed))
        packed.unlink()
    return copy


def read(path: Path) -> bytes:
    """What a packed file holds."""
    return lzma.decompress(path.read_bytes())


def logit_lens(inputs: Inputs, rows: Tensor | None) -> Probe:
    return Probe(Head(inputs.head if rows is None else rows), norm=NORM)


def decisions(artifact: Artifact, inputs: Inputs) -> dict[str, Tensor]:
    """What each part of an artifact decides, answers and gets wrong, by exit point."""
    found = {}
    for name, part in artifact.parts("policy").items():
        policy = Policy(part, CPU, lambda rows: logit_lens(inputs, rows))
        logits, memory = inputs.logits(part.config)[:DECIDED], None
        bits = inputs.bits[:DECIDED]
        for index, (layer, read) in enumerate(
            zip(policy.exit_points, policy.probe_inputs, strict=True)
        ):
            hidden, texts, lens = read_at(layer, read, inputs, policy)
            count = len(texts) or (len(lens) if len(lens) else DECIDED)
            place = f"{name}.{layer}"
            for level in range(policy.num_threshold_rows):
                tags = torch.full((count,), level)
                rows = UndecidedRows(hidden, tags, memory, bits[:count], texts, lens)
                decision = policy.decide(index, rows)
                found[f"{place}.settled.{level}"] = decision.settled
            found[f"{place}.answers"] = decision.answers.values
            view = policy.view(index, rows)
            found |= {f"{place}.tokens": view.tokens, f"{place}.odds": view.odds}
            found |= {f"{place}.top_prob": view.top_prob, f"{place}.gap": view.gap}
            memory = decision.memory
            head, promise = (lambda states: states @ inputs.head.T), policy.promise
            if promise.unit is Unit.QUERY:
                some = torch.arange(count) % 3 > 0
                answers = decision.answers.subset(some.nonzero().squeeze(1))
                full = relevance(policy.full_depth(logits, None))
                early = full.clone()
                early[some] = relevance(policy.early(answers, head))
                found[f"{place}.relevance"] = torch.stack([early, full])
                continue
            outcomes = (
                policy.early(decision.answers, head),
                policy.full_depth(logits[:count], decision.answers),
            )
            found[f"{place}.wrong"] = promise.wrong(*outcomes)
            if (moved := promise.moves(*outcomes)) is not None:
                found[f"{place}.moved"] = moved
        if part.config.labels:
            found[f"{name}.best"] = policy.best_labels(logits, bits)
    return {key: tensor.contiguous() for key, tensor in found.items()}


def read_at(layer: int, read: ProbeInput, inputs: Inputs, policy: Any) -> Any:
    """What a policy reads at an exit point: states, texts, and the tokens of each prompt."""
    states = inputs.states.get(str(layer))
    none = np.arange(0)
    if read is ProbeInput.LAST_TOKEN:
        return states[:DECIDED], (), none
    if read is ProbeInput.PROMPT:
        mean = inputs.states[f"mean{layer}"]
        return torch.cat([states, mean], dim=1)[:DECIDED], (), none
    if read is ProbeInput.OWN_STATES:
        [branch] = [probe for probe in policy.probes if probe.encoder is not None]
        return branch.project(inputs.states["prompt"]), (), inputs.lens.numpy()
    texts = [[5 + (row * 7 + place) % 90 for place in range(1 + row % 5)] for row in range(12)]
    return torch.zeros(0, 8), texts, none


def scored(artifact: Artifact, inputs: Inputs) -> dict[str, list[Scored]]:
    """What calibration makes of all rows, by part and exit point, for heads that read states."""
    found = {}
    for name, part in artifact.parts("policy").items():
        config = part.config
        if set(config.probe_inputs) & {ProbeInput.OWN_STATES, ProbeInput.TEXT}:
            continue
        target, rows = target_of(config, inputs)
        right = None
        if config.promise.reads_right:
            right = [{config.label_ids[place]} for place in inputs.right.tolist()]
        exits = []
        probes = Policy(part, CPU, lambda rows: logit_lens(inputs, rows)).probes
        for layer, probe in zip(config.exit_points, probes, strict=True):
            read = inputs.states[str(layer)]
            if config.is_pooled:
                read = torch.cat([read, inputs.states[f"mean{layer}"]], dim=1)
            early = answers_of_probe(probe, read, target.subsets, target.promise)
            judged = Scored.of(early, target, rows, np.arange(2 * HALF), right)
            one = judged.scored(part.tensors[f"exit.{layer}.classifier"].float())
            never = {config.label_ids[place] for place in config.never_settled}
            exits.append(one.never_at(np.isin(one.tokens, [*never])))
        found[name] = exits
    return found


def target_of(config: ArtifactConfig, inputs: Inputs) -> tuple[Target, Any]:
    """The target of calibration, and the rows with full depth's answers."""
    logits, subsets, full = inputs.logits(config), inputs.subsets(config), None
    ids, promise = torch.tensor(config.label_ids), config.promise
    best = logits.argmax(dim=1)
    if config.choices:
        first = FirstTokens.of(config.output)
        best = ids[first.decided_by(logits[:, first.token_ids])]
    elif config.labels:
        own = restrict(logits[:, ids], subsets)
        best = ids[own.argmax(dim=1)]
    if promise.reads_probabilities:
        mass = (own.logsumexp(dim=1) - logits.logsumexp(dim=1)).exp().clamp(max=1)
        is_label = own.amax(dim=1) >= logits.amax(dim=1)
        labels = LabelProbabilities(promise.link.probabilities(own), mass)
        full = Outcome(best, labels=labels, is_label=is_label)
    target = Target(config.probe, ids, full, subsets, promise=promise)
    return target, SimpleNamespace(tokens=best.numpy())


def certified(
    config: ArtifactConfig, by_part: Mapping[str, Sequence[Scored]], inputs: Inputs
) -> dict[str, Any]:
    """The thresholds that the second half of the rows certifies, by part and epsilon."""
    fit, held_out = np.arange(HALF), np.arange(HALF, 2 * HALF)
    options = PolicyOptions(
        delta=config.delta,
        promise=config.promise,
        label_bounds=config.label_bounds,
        bound=config.bound,
    )
    groups, queries = np.arange(2 * HALF) // GROUP, {}
    together = config.largest_group or 1
    bound = Bound.promised(options, groups[held_out] if together > 1 else None, together)
    if isinstance(config.promise, FirstDocuments):
        full = inputs.logits(config).softmax(dim=1)[:, -1].double().numpy()
        for name, rows in (("fit", fit), ("held out", held_out)):
            queries[name] = Queries.of_groups(config.promise, groups[rows], full[rows])
    token = {label.name: label.token_id for label in config.labels}
    tests = [LabelTest(one, token[one.label], bound) for one in config.label_bounds]
    parts = config.parts("policy")
    exits = {
        name: [
            FittedExit(layer, None, torch.zeros(0), one.of_rows(fit), one.of_rows(held_out))
            for layer, one in zip(parts[name].exit_points, own, strict=True)
        ]
        for name, own in by_part.items()
    }
    queries_held = queries.get("held out")
    if len(exits) == 2:
        both = [*exits.values()]
        pairs = pairs_of_thresholds(*both, config.layers, queries.get("fit"))
        paths = [
            held_out_path(one, config.layers, thresholds)
            for one, thresholds in zip(both, zip(*pairs, strict=True), strict=True)
        ]
        found = certify(pair_path(*paths, queries_held), EPSILONS, bound, tests)
        points = (
            {epsilon: pair.whole for epsilon, pair in found.items()},
            {epsilon: pair.last for epsilon, pair in found.items()},
        )
    else:
        [one] = exits.values()
        path = held_out_path(one, config.layers, threshold_grid(one), queries=queries_held)
        points = (certify(path, EPSILONS, bound, tests),)
    return {
        name: {
            str(epsilon): {
                "threshold": point.threshold,
                "risk": point.risk,
                "disagreement": point.disagreement,
                "layers_saved": point.layers_saved,
                "bound": bound.within(epsilon, point.losses),
                "labels": [vars(test.risk(point.answers, point.full)) for test in tests],
            }
            for epsilon, point in own.items()
        }
        for name, own in zip(exits, points, strict=True)
    }


def report(config: ArtifactConfig, runs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What an evaluation reports of runs, drawn from the answers of a policy."""
    names = {label.token_id: label.name for label in config.labels}
    right = runs["right"].tolist()
    examples = [
        Example(
            f"line {row}",
            "text",
            [1, 2, 3],
            names.get(right[row]),
            group=str(row // GROUP),
        )
        for row in range(len(right))
    ]

    def run(name: str) -> Run:
        texts, logprobs = runs[f"{name}.texts"].tolist(), runs.get(f"{name}.logprobs")
        seconds = float(runs[f"{name}.seconds"])
        return Run(
            seconds,
            texts,
            layers_run=int(runs[f"{name}.layers"].sum()),
            layers_possible=config.layers * len(texts),
            exit_histogram={
                int(layer): int((runs[f"{name}.layers"] == layer).sum())
                for layer in runs[f"{name}.layers"].unique()
            },
            logprobs=None if logprobs is None else logprobs.numpy(),
        )

    by_epsilon = {level.epsilon: run(str(level.epsilon)) for level in config.levels}
    rounds = [(run("stock"), {NEVER_EXIT: run("never"), **by_epsilon})]

    def right_in(texts: Sequence[Sequence[int]]) -> list[bool]:
        return [text[0] == token for text, token in zip(texts, right, strict=True)]

    found = build_report("golden", Path("data.jsonl"), config, examples, right_in, rounds)
    del found["provenance"]
    return {**found, "summary": summary_line(found)}


def loaded(case: str, directory: Path) -> Artifact:
    return load_artifact(str(unpacked(case, directory)))


def kept(scores: Mapping[str, Tensor]) -> dict[str, list[Scored]]:
    """Scored rows as they were kept, by part and exit point."""
    found: dict[str, list[Scored]] = {}
    for key in sorted(scores):
        name, place, what = key.split("/")
        if what != "score":
            continue
        tokens, full, loss = (
            scores[f"{name}/{place}/{what}"].numpy() for what in ("tokens", "full", "loss")
        )
        relevance = scores.get(f"{name}/{place}/relevance")
        shown = None if relevance is None else relevance.double().numpy()
        found.setdefault(name, []).append(rows_of(scores[key], tokens, full, loss, shown))
    return found
