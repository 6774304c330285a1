"""The policy for the best token, with label heads or with the model's own head."""

from __future__ import annotations

from dataclasses import replace

import torch
from adainfer_kernels import Head
from typing_extensions import override

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.kinds import FEATURES
from vllm_adainfer.artifact.tensors import served_shape
from vllm_adainfer.policy.answers import (
    Answers,
    EarlyScores,
    EarlyStates,
    LabelScores,
    ShortlistScores,
)
from vllm_adainfer.policy.artifact_policy import (
    TRAINED,
    ArtifactPolicy,
    Trained,
    branches_among,
    scores_of,
    tensors_of,
    trained_probe,
)
from vllm_adainfer.policy.exit_policy import Decision, UndecidedRows
from vllm_adainfer.policy.probe import LabelHead, Probe, lens_of
from vllm_adainfer.policy.reading import ProbeView, features_among
from vllm_adainfer.policy.score import score

LINEAR_SHAPE = served_shape("svm", len(FEATURES))


class CalibratedPolicy(ArtifactPolicy):
    """Settles a row once the best token of its probe is decided."""

    def __init__(self, artifact: Artifact, logit_lens: Probe | None, device: torch.device) -> None:
        """Load the fitted tensors of `artifact` onto `device`.

        `logit_lens` is the served model's; None for label heads, which need none.
        """
        config = artifact.config
        tensors = {name: tensor.to(device) for name, tensor in artifact.tensors.items()}
        super().__init__(config, tensors)
        self.answer_ids = tensors.get("shortlist")
        self._scores: type[EarlyScores] = ShortlistScores
        if config.candidates == "labels":
            self.answer_ids = torch.tensor(config.label_ids, device=device)
            self._scores = LabelScores
        if logit_lens is not None and "head_rows" in tensors:
            head = Head(tensors["head_rows"])
            logit_lens = replace(logit_lens, head=head, token_ids=self.answer_ids, shards=None)
        if self.answer_ids is not None and self._scores is ShortlistScores:
            self.answers_stand = True
        self._probes: list[Probe | Trained] = []
        for layer, read in zip(self.exit_points, self.probe_inputs, strict=True):
            own = tensors_of(tensors, f"exit.{layer}.")
            if read in TRAINED:
                assert self.answer_ids is not None, "a trained probe scores labels"
                weight, bias = own["head_weight"].float(), own["head_bias"].float()
                labels = LabelHead(weight, bias, self.answer_ids)
                self._probes.append(trained_probe(artifact, layer, labels, device))
            elif logit_lens is None or config.has_label_heads:
                head = Head(own["head_weight"], own["head_bias"])
                self._probes.append(Probe(head, token_ids=self.answer_ids))
            else:
                self._probes.append(replace(logit_lens, lens=lens_of(own)))
        self.branches = branches_among(self._probes)
        self.probes = [probe for probe in self._probes if isinstance(probe, Probe)]

    @override
    def _decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        probe, classifier = self._probes[exit_index], self._classifiers[exit_index]
        threshold = self._thresholds[exit_index][rows.threshold_rows]
        is_linear, ids = classifier.shape == LINEAR_SHAPE, self.answer_ids
        if not isinstance(probe, Probe):
            assert ids is not None
            scores = scores_of(probe, rows)
            answers: Answers = self._scores(scores, ids)
            features = features_among(scores)
            return Decision.by_score(features, classifier, threshold, rows.memory, answers)
        readout = probe.readout(rows.hidden)
        if is_linear and ids is not None:
            settled, scores = probe.settle(readout, classifier, threshold)
            return Decision(settled, self._scores(scores, ids))
        result = probe.score(
            readout,
            classifier=classifier if is_linear else None,
            threshold=threshold if is_linear else None,
            return_scores=ids is not None,
        )
        answers = EarlyStates(readout)
        if ids is not None:
            assert result.scores is not None
            answers = self._scores(result.scores, ids)
        if result.settled is not None:  # the kernel has applied a linear classifier
            return Decision(result.settled, answers)
        return Decision.by_score(result.features, classifier, threshold, rows.memory, answers)

    def view(self, exit_index: int, rows: UndecidedRows) -> ProbeView:
        """What `decide` bases its decision on."""
        probe = self._probes[exit_index]
        if not isinstance(probe, Probe):
            scores = scores_of(probe, rows)
            tokens, features = probe.head.token_ids[scores.argmax(dim=1)], features_among(scores)
        else:
            result = probe.score(probe.readout(rows.hidden))
            tokens, features = result.top1_id, result.features
        return ProbeView(
            tokens=tokens,
            top_prob=features[:, 0],
            gap=features[:, 1],
            odds=score(features, self._classifiers[exit_index], rows.memory),
            threshold=self._thresholds[exit_index][rows.threshold_rows],
        )
