"""Verifies drafts on Model Runner V1: what vLLM 0.32 does only for its own speculative decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_adainfer.arrays import Ints
from vllm_adainfer.engine.admission.requested_output import only_grammar_decides
from vllm_adainfer.engine.runner.v1_best_tokens import UNREAD, best_tokens, mask_places
from vllm_adainfer.exits.loop.step import NOBODY

if TYPE_CHECKING:
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Runner
else:
    _Runner = object

REFUSED = -1  # vLLM's `PLACEHOLDER_TOKEN_ID`


class VerifiesDrafts(_Runner):
    """Mixin that samples at each row of a draft; must precede the vLLM class in the MRO."""

    _best: Tensor | None = None  # the tokens of a step's rows, where nothing else is sampled

    @override
    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample a step; vLLM applies the masks, unless only the likeliest tokens count."""
        self._best = None
        if grammar_output is not None and self._only_best_count():
            state = self.execute_model_state
            places = mask_places(
                self.input_batch.req_ids,
                state.scheduler_output.scheduled_spec_decode_tokens,
                grammar_output.structured_output_request_ids,
            )
            if len(unread := self._unread()):
                lens = state.spec_decode_metadata.num_draft_tokens
                of_rows = np.repeat(np.arange(len(lens)), np.array(lens) + 1)
                places[np.isin(of_rows, unread)] = UNREAD
            masks, best_of = grammar_output.grammar_bitmask, self.sampler.greedy_sample
            self._best = best_tokens(state.logits, masks, places, best_of)
            grammar_output = None
        return super().sample_tokens(grammar_output)

    def _unread(self) -> Ints:
        """The requests of a step whose samples count for nothing, by their places in the batch."""
        return NOBODY

    def _only_best_count(self) -> bool:
        """Whether a step has drafts, and needs nothing but the likeliest token of each row."""
        own, state = self.input_batch.sampling_metadata, self.execute_model_state
        if state is None or state.spec_decode_metadata is None or self.speculative_config:
            return False
        params = [self.requests[one].sampling_params for one in self.input_batch.req_ids]
        return (
            own.all_greedy
            and own.max_num_logprobs is None
            and all(one is not None and only_grammar_decides(one) for one in params)
        )

    @override
    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        """Also take the logits of drafts' rows."""
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        if not drafts or self.speculative_config is not None:
            return prepared
        lens = [len(drafts.get(one, ())) for one in self.input_batch.req_ids]
        lens_np = np.array(lens, dtype=np.int32)
        metadata = self._calc_spec_decode_metadata(lens_np, np.cumsum(num_scheduled_tokens))
        if self.lora_config:
            self.set_active_loras(self.input_batch, num_scheduled_tokens, lens_np + 1)
        return metadata.logits_indices, metadata, max(lens) + 1

    @override
    def _sample(self, logits: Any, spec_decode_metadata: SpecDecodeMetadata | None) -> Any:
        """Sample at a draft's rows for as long as the samples are the drafted tokens.

        The first row of each request is sampled exactly as in a step without drafts. Only requests
        without logits processors have others.
        """
        if spec_decode_metadata is None or self.speculative_config is not None:
            return super()._sample(logits, spec_decode_metadata)
        drafts = Drafts.of(
            spec_decode_metadata.num_draft_tokens, spec_decode_metadata.draft_token_ids
        )
        if self._best is not None:
            return drafts.kept_of(self._best)
        first = super()._sample(logits[drafts.first_rows], None)
        samples = Samples(first, drafts)
        own = self.input_batch.sampling_metadata
        if own.logprob_token_ids:  # log-probabilities of other requests have another shape then
            return samples.output()
        for places in samples.open_places(own.generators):
            sampled = self.sampler(
                logits=logits[drafts.rows_at(places)],
                sampling_metadata=_of_rows(own, places[:, 0]),
            )
            samples.put(places, sampled.sampled_token_ids[:, 0], sampled.logprobs_tensors)
        return samples.output()


@dataclass(frozen=True)
class Drafts:
    """The drafts of a step.

    Attributes:
        tokens: [requests, longest draft], `REFUSED` behind the end of shorter ones.
        lens: [requests], the number of drafted tokens.
        first_rows: [requests], the row of the logits that samples the first token.

    """

    tokens: Tensor
    lens: Tensor
    first_rows: Tensor

    @classmethod
    def of(cls, lens: list[int], tokens: Tensor) -> Drafts:
        """The drafts of requests in order; `tokens` has them one behind the other."""
        each = torch.tensor(lens)
        table = torch.full((len(lens), max(lens)), REFUSED, dtype=torch.int32)
        table[torch.arange(max(lens)) < each[:, None]] = tokens.cpu().to(torch.int32)
        return cls(table, each, torch.cumsum(each + 1, 0) - each - 1)

    def rows_at(self, places: Tensor) -> Tensor:
        """The rows of the logits at `places`, [rows, 2]: a request, and a column of the samples."""
        return self.first_rows[places[:, 0]] + places[:, 1]

    def kept_of(self, tokens: Tensor) -> SamplerOutput:
        """What is kept of the `tokens` of all rows: those up to the first that was not drafted."""
        table = torch.full((len(self.lens), self.tokens.shape[1] + 1), REFUSED, dtype=torch.int32)
        table[torch.arange(table.shape[1]) <= self.lens[:, None]] = tokens.to(torch.int32)
        table[:, 1:][~self.agree(table)] = REFUSED
        return SamplerOutput(sampled_token_ids=table, logprobs_tensors=None)

    def agree(self, tokens: Tensor) -> Tensor:
        """[requests, longest draft], whether a drafted token and all before it are in `tokens`."""
        return torch.cumprod((tokens[:, :-1] == self.tokens).int(), 1).bool()


class Samples:
    """The samples of a step: [requests, 1 + longest draft] tokens, with log-probabilities."""

    def __init__(self, first: SamplerOutput, drafts: Drafts) -> None:
        """`first` has a sample for each request."""
        self._drafts = drafts
        requests, longest = drafts.tokens.shape
        self._tokens = torch.full((requests, longest + 1), REFUSED, dtype=torch.int32)
        self._logprobs: LogprobsTensors | None = None
        if (found := first.logprobs_tensors) is not None:
            rows = requests * (longest + 1)
            self._logprobs = LogprobsTensors(*(_rows_like(one, rows) for one in found[:3]))
        places = torch.stack([torch.arange(requests), torch.zeros(requests).long()], 1)
        self.put(places, first.sampled_token_ids[:, 0], first.logprobs_tensors)

    def put(self, places: Tensor, tokens: Tensor, logprobs: LogprobsTensors | None = None) -> None:
        """Note what was sampled at `places`, as in `Drafts.rows_at`."""
        requests, columns = places.unbind(1)
        self._tokens[requests, columns] = tokens.to(torch.int32)
        if self._logprobs is not None and logprobs is not None:
            rows = requests * self._tokens.shape[1] + columns
            for own, new in zip(self._logprobs[:3], logprobs[:3], strict=True):
                own[rows] = new

    @property
    def _agree(self) -> Tensor:
        return self._drafts.agree(self._tokens)

    def open_places(self, generators: dict[int, torch.Generator]) -> Iterator[Tensor]:
        """The places to sample at; those of requests with `generators` one column at a time.

        A generator may draw for the tokens alone that its request keeps.
        """
        agrees, columns = self._agree[:, 0], torch.arange(self._tokens.shape[1])
        has_generator = torch.zeros(len(agrees), dtype=torch.bool)
        has_generator[list(generators)] = True
        within = (columns > 0) & (columns <= self._drafts.lens[:, None])
        together = within & (agrees & ~has_generator)[:, None]
        if together.any():
            yield together.nonzero()
        for column in columns[1:].tolist():
            one_by_one = has_generator & self._agree[:, column - 1]
            if not one_by_one.any():
                return
            yield (within & one_by_one[:, None] & (columns == column)).nonzero()

    def output(self) -> SamplerOutput:
        """The tokens up to the first that is not the drafted one, with `REFUSED` behind it."""
        self._tokens[:, 1:][~self._agree] = REFUSED
        return SamplerOutput(sampled_token_ids=self._tokens, logprobs_tensors=self._logprobs)


def _rows_like(tensor: Tensor, rows: int) -> Tensor:
    return tensor.new_zeros((rows, *tensor.shape[1:]))


def _of_rows(own: SamplingMetadata, requests: Tensor) -> SamplingMetadata:
    """How the rows of `requests` are sampled, which have no logits processors."""

    def rows_of(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[requests]

    return replace(
        own,
        temperature=rows_of(own.temperature),
        top_p=rows_of(own.top_p),
        top_k=rows_of(own.top_k),
        generators={
            row: own.generators[one]
            for row, one in enumerate(requests.tolist())
            if one in own.generators
        },
        no_penalties=True,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        spec_token_ids=None,
        thinking_budget_state_holder=None,
    )
