"""The policy of an artifact: probe -> features -> classifier score -> threshold, at exit points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import adainfer_kernels
import torch
from adainfer_kernels import Head, Lens
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.artifact.tensors import served_shape
from vllm_adainfer.policy.answers import Answers, best_token
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.policy.exit_policy import Decision, ExitPolicy, UndecidedRows
from vllm_adainfer.policy.first_tokens import FirstTokens
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.score import score
from vllm_adainfer.policy.text_encoders import TextEncoder
from vllm_adainfer.promise.label_subsets import mask_of, restrict
from vllm_adainfer.promise.links import ByField
from vllm_adainfer.promise.probabilities import (
    FEATURES,
    features_among,
    probabilities_of_answers,
    probabilities_of_logits,
)
from vllm_adainfer.promise.promise import Outcome

LINEAR_SHAPE = served_shape("svm", len(FEATURES))


@dataclass(frozen=True)
class ProbeView:
    """A policy's view of some rows, as `explain` shows it to people; all tensors are [rows].

    Attributes:
        tokens: int64, the token that the probe would answer; of objects their numbers.
        top_prob: fp32, its probability among the tokens that the probe scores.
        gap: fp32, its lead over the second.
        odds: fp32, the classifier's score, log odds that the answer is final.
        threshold: fp32, the least score at which a row is settled.
        least_sure: int64, of objects, the field that is least sure; None for other answers.

    """

    tokens: Tensor
    top_prob: Tensor
    gap: Tensor
    odds: Tensor
    threshold: Tensor
    least_sure: Tensor | None = None


class Policy(ExitPolicy):
    """A probe, a classifier and a threshold at each exit point; the promise says what they are for.

    Attributes:
        answer_ids: int64 [tokens], the tokens that its answers score; None for all.

    """

    answer_ids: Tensor | None

    def __init__(
        self,
        artifact: Artifact,
        device: torch.device,
        logit_lens: Callable[[Tensor | None], Probe] | None = None,
    ) -> None:
        """Load the fitted tensors of `artifact`, or of one of its parts, onto `device`.

        `logit_lens` gives that of the served model, with its LM head (None) or with the rows given,
        [n, head size]; label heads need none.

        Raises:
            AdaInferError: a student cannot be built, see `TextEncoder.of`.

        """
        config = artifact.config
        tensors = {name: tensor.to(device) for name, tensor in artifact.tensors.items()}
        self.exit_points = config.exit_points
        self.num_threshold_rows = config.num_threshold_rows
        self.probe_inputs = config.probe_inputs
        self.promise = config.promise
        self.any_exit_point = config.any_exit_point
        self.answer_ids = tensors.get("shortlist")
        of_labels = config.candidates == "labels"
        has_rest = of_labels and self.promise.reads_probabilities
        if of_labels:
            self.answer_ids = torch.tensor(config.label_ids, device=device)
        self._scored = partial(
            Answers, token_ids=self.answer_ids, of_labels=of_labels, has_rest=has_rest
        )
        self.answers_stand = config.promise.answers_stand or "shortlist" in tensors
        self._pool = config.label_pool
        self._columns = torch.arange(len(config.labels), device=device)
        self._first_tokens = FirstTokens.of(config.output, device)
        self._columns_of_fields: tuple[int, ...] = ()
        if (objects := config.objects) is not None:
            self.decides_objects = True
            self._columns_of_fields = tuple(len(field.values) for field in objects.fields)
        self._thresholds = tensors["thresholds"].float().T.contiguous()  # [exit points, rows]
        self._classifiers = [
            tensors[f"exit.{layer}.classifier"].float() for layer in self.exit_points
        ]
        self._never_early: Tensor | None = None  # bool [labels]
        if config.never_settled:
            never = [column in config.never_settled for column in range(len(config.labels))]
            self._never_early = torch.tensor(never, device=device)
        lens = None
        if not config.has_label_heads:
            assert logit_lens is not None, "the probes need the model's own head"
            lens = logit_lens(artifact.tensors.get("head_rows"))
            if "head_rows" in tensors:
                head = Head(tensors["head_rows"])
                lens = replace(lens, head=head, token_ids=self.answer_ids, gather=None)
        self.probes = [
            self._probe(artifact, layer, probe_input, tensors_of(tensors, f"exit.{layer}."), lens)
            for layer, probe_input in zip(self.exit_points, self.probe_inputs, strict=True)
        ]

    def _probe(
        self,
        artifact: Artifact,
        layer: int,
        probe_input: ProbeInput,
        own: Mapping[str, Tensor],
        lens: Probe | None,
    ) -> Probe:
        """The probe of an exit point, whose tensors are `own`."""
        if lens is not None:
            weight = own.get("lens_weight")
            return replace(lens, lens=None if weight is None else Lens(weight, own["lens_bias"]))
        weight, bias = own["head_weight"], own["head_bias"]
        encoder = _encoder(artifact, layer, probe_input, weight.device)
        columns = self._columns_of_fields
        fused = not (encoder or columns or self._pool or self.promise.reads_probabilities)
        head = Head(weight, bias) if fused else Head(weight.float(), bias.float())
        return Probe(head, token_ids=self.answer_ids, encoder=encoder, columns=columns, fused=fused)

    @override
    def decide(self, exit_index: int, rows: UndecidedRows) -> Decision:
        probe, classifier = self.probes[exit_index], self._classifiers[exit_index]
        threshold = self._thresholds[exit_index][rows.threshold_rows]
        if probe.fused:
            decision = self._read_by_kernel(probe, classifier, threshold, rows)
        else:
            scores = self._scores(probe, rows)
            features, answers = self.promise.features(scores), self.promise.answers(scores)
            decision = Decision.by_score(
                features, classifier, threshold, rows.memory, self._scored(answers)
            )
            if self.decides_objects:
                codes = self.promise.link.best(scores[:, : len(self._columns)])
                decision = replace(decision, codes=codes)
        if self._never_early is None:
            return decision
        scores = decision.answers.scores
        best = self.promise.link.may_be_best(scores)  # the sampler breaks ties
        runs_on = (best & self._never_early).any(dim=1)
        return replace(decision, settled=decision.settled & ~runs_on)

    def _read_by_kernel(
        self, probe: Probe, classifier: Tensor, threshold: Tensor, rows: UndecidedRows
    ) -> Decision:
        """Decide by the best token, with a probe that a kernel runs."""
        readout, is_linear = probe.readout(rows.hidden), classifier.shape == LINEAR_SHAPE
        if is_linear and self.answer_ids is not None:
            settled, scores = adainfer_kernels.settle(readout, probe.head, classifier, threshold)
            return Decision(settled, self._scored(scores))
        result = probe.score(
            readout,
            classifier=classifier if is_linear else None,
            threshold=threshold if is_linear else None,
            return_scores=self.answer_ids is not None,
        )
        answers = Answers(readout)
        if self.answer_ids is not None:
            assert result.scores is not None
            answers = self._scored(result.scores)
        if result.settled is not None:  # the kernel has applied a linear classifier
            return Decision(result.settled, answers)
        return Decision.by_score(result.features, classifier, threshold, rows.memory, answers)

    def _scores(self, probe: Probe, rows: UndecidedRows) -> Tensor:
        """All scores of a label head for `rows`."""
        return probe.label_scores(rows.hidden, self._named(rows.subsets), rows.lens, rows.texts)

    def _named(self, subsets: Tensor | None) -> Tensor | None:
        """bool [rows, labels], the labels that each row names; None if all name all."""
        if not self._pool:
            return None
        assert subsets is not None
        return mask_of(subsets, self._columns)

    def view(self, exit_index: int, rows: UndecidedRows) -> ProbeView:
        """The basis of the decision of `decide`."""
        probe, ids, least_sure = self.probes[exit_index], self.answer_ids, None
        if probe.fused:
            result = probe.score(probe.readout(rows.hidden))
            tokens, features = result.top1_id, result.features
            shown = features
        else:
            assert ids is not None
            scores = self._scores(probe, rows)
            labels, features = scores[:, : len(ids)], self.promise.features(scores)
            best, shown = self.promise.link.best(labels), features_among(labels, self.promise.link)
            tokens = best if self._columns_of_fields else ids[best]
            if isinstance(self.promise.link, ByField):
                least_sure = self.promise.link.least_sure(labels)
        return ProbeView(
            tokens=tokens,
            top_prob=shown[:, 0],
            gap=shown[:, 1],
            odds=score(features, self._classifiers[exit_index], rows.memory),
            threshold=self._thresholds[exit_index][rows.threshold_rows],
            least_sure=least_sure,
        )

    @override
    def early(self, answers: Answers, head: Callable[[Tensor], Tensor]) -> Outcome:
        if self._first_tokens is not None:  # choices, by their places
            return Outcome(answers.values.argmax(dim=1))
        if not answers.has_rest:
            return super().early(answers, head)
        labels = None
        if self.promise.reads_values:
            labels = probabilities_of_answers(
                answers.values, self.promise.vocabulary, self.promise.link
            )
        return Outcome(answers.best(head), answers.scores, labels)

    @override
    def full_depth(self, logits: Tensor, answers: Answers | None) -> Outcome:
        if self._first_tokens is not None:  # before the request's grammar masks the logits
            return Outcome(self.best_labels(logits, None))
        if not self.promise.reads_probabilities:
            return super().full_depth(logits, answers)
        subsets = None
        if self._pool:
            assert answers is not None
            subsets = answers.scores.isfinite()
        ids = self.answer_ids
        assert ids is not None
        own = restrict(logits[:, ids].float(), subsets)
        labels = None
        if self.promise.reads_values:
            labels = probabilities_of_logits(logits, ids, subsets, self.promise.link)
        is_label = own.amax(dim=1) >= logits.amax(dim=1)
        return Outcome(best_token(own, ids), own, labels, is_label)

    @override
    def best_labels(self, logits: Tensor, subsets: Tensor | None) -> Tensor:
        if self._first_tokens is not None:
            return self._first_tokens.decided_by(logits[:, self._first_tokens.token_ids])
        assert self.answer_ids is not None
        return restrict(logits[:, self.answer_ids], self._named(subsets)).argmax(dim=1)


def tensors_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of `tensors` whose names begin with `prefix`, by the rest of the name."""
    return {n.removeprefix(prefix): one for n, one in tensors.items() if n.startswith(prefix)}


def _encoder(
    artifact: Artifact, layer: int, probe_input: ProbeInput, device: torch.device
) -> StateEncoder | TextEncoder | None:
    """What makes the state that the head after a layer reads: a branch's encoder, or a student's.

    Raises:
        AdaInferError: see `TextEncoder.of` and `TextEncoder.check_reads`.

    """
    if probe_input is ProbeInput.OWN_STATES:
        own = tensors_of(artifact.tensors, f"exit.{layer}.branch.")
        return StateEncoder.of(own, device)
    if probe_input is not ProbeInput.TEXT:
        return None
    student, built = artifact.config.student, artifact.encoder
    assert student is not None, "a student decides at this exit point"
    assert built is not None, "its files are part of the artifact"
    encoder = TextEncoder.of(built, torch.device("cpu"))
    encoder.check_reads(student, built.largest_token)
    return encoder.to(device)
