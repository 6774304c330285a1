"""Fetch a task's rows from the Hugging Face hub, with the field names of the data files."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Row

Part = Literal["train", "test"]


class Hub(BaseModel):
    """Where a task's data is on the hub, and how its fields are named there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    config: str | None = None
    train: str = Field(description="Split to calibrate on, or several joined by +.")
    test: str = Field(description="Split to measure on, one with published answers.")
    fields: dict[str, str] = Field(description="Our field to theirs; a dot steps inside one.")
    classes: dict[str, str] = Field({}, description="Their label, as text, to ours.")


def hub_rows(hub: Hub, part: Part, answer: str) -> list[Row]:
    """Fetch one part, shuffled with a fixed seed because some data sets are sorted by class.

    `answer` is our name for the field whose values `hub.classes` maps.

    An AdaInferError if `datasets` is not installed, or the data cannot be fetched or lacks a field.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise AdaInferError(
            f"fetching {hub.dataset} from the hub needs the datasets package: pip install "
            "datasets, or pass --data-dir DIR"
        ) from None
    split = hub.train if part == "train" else hub.test
    rows = []
    try:
        data = load_dataset(hub.dataset, hub.config, split=split).shuffle(seed=0)
        for number, item in enumerate(data, start=1):
            fields = {
                ours: reduce(operator.getitem, theirs.split("."), item)
                for ours, theirs in hub.fields.items()
            }
            label = fields[answer]
            fields[answer] = hub.classes.get(str(label), label)
            rows.append(Row(f"{hub.dataset} {split}, shuffled row {number}", fields))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise AdaInferError(
            f"cannot fetch {hub.dataset} from the hub ({' '.join(str(error).split())[:200]}): "
            "pass --data-dir DIR"
        ) from None
    return rows
