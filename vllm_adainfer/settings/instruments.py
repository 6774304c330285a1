"""Instruments: keys for calibration, benchmarks and tests, which users have no need of.

The engine accepts them where it accepts the documented settings, but no documentation and no error
message offers them.
"""

from __future__ import annotations

from pydantic import BaseModel, Field, StrictInt

from vllm_adainfer.strict import Strict

ROW_ARG = "adainfer_row"
GUESS_ARG = "adainfer_guess"
GUESS_ROWS_ARG = "adainfer_guess_rows"
SCRIPT_ARG = "adainfer_exit"
COMPARE_ARG = "adainfer_compare"


class LensRecord(Strict):
    """The sums to keep for a tuned lens; see `exits.recording.recorder.TunedLensSums`."""

    folds: int = Field(ge=2)
    prompts: int = Field(ge=1, description="Those with lower rows; the others are held out.")


class StatesRecord(Strict):
    """The states to keep of whole prompts, in files; see `exits.recording.recorder`."""

    layers: tuple[int, ...] = Field(min_length=1)
    directory: str


class SwitchInstruments(BaseModel):
    """Instruments of the engine switch, ``additional_config={"adainfer": {...}}``.

    Attributes:
        record: instead of an artifact, the layers after which to keep the hidden states of sampled
            tokens, at full depth; 0 is the embedding. `calibrate` sets it.
        record_lens: with `record`, the sums for a tuned lens at all of these layers but the last.
        record_pooled_from: with `record`, the position from which on to take the mean of the states
            of each prompt, at all of these layers but the last.
        record_states: with `record_pooled_from`, where to keep each of these states instead.
        record_objects: with `record`, whether requests ask for objects. Their answers are drafted,
            and what is kept are the states at the rows that their fields are decided by.
        exit_script: instead of an artifact, exit points; a request leaves at the one that its
            ``adainfer_exit`` names, with a meaningless answer. Benchmarks and tests set it.
        compare: whether requests with ``adainfer_compare`` are shadow requests. Nothing that they
            find closes a level. `evaluate` sets it.

    """

    record: tuple[int, ...] | None = None
    record_lens: LensRecord | None = None
    record_pooled_from: int | None = Field(None, ge=1)
    record_states: StatesRecord | None = None
    record_objects: bool | None = None
    exit_script: tuple[int, ...] | None = None
    compare: bool = False


class RequestInstruments(BaseModel):
    """Instruments of a request, among its ``extra_args``.

    Attributes:
        adainfer_row: under `record`, the row of the calibration data.
        adainfer_guess: under `record_objects`, the tokens that stand behind the prompt in its step.
        adainfer_guess_rows: with a guess, how many rows each that is kept lies behind the prompt's
            last.
        adainfer_exit: under `exit_script`, the exit point at which to leave.
        adainfer_compare: under `compare`, whether it runs to full depth, to compare both answers.

    """

    adainfer_row: int | None = Field(None, strict=True)
    adainfer_guess: tuple[StrictInt, ...] | None = None
    adainfer_guess_rows: tuple[StrictInt, ...] | None = None
    adainfer_exit: int | None = Field(None, strict=True)
    adainfer_compare: bool | None = None
