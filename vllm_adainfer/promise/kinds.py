"""The promises that there are. A new one is a file beside this one, and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, get_args

from pydantic import Field

from vllm_adainfer.promise.accuracy import Accuracy
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.promise.first_documents import FirstDocuments
from vllm_adainfer.promise.gates import Gates
from vllm_adainfer.promise.promise import Promise
from vllm_adainfer.promise.tolerance import Tolerance

Kinds = Changed | Accuracy | Tolerance | Gates | FirstDocuments
PROMISES: tuple[type[Promise], ...] = get_args(Kinds)
if TYPE_CHECKING:
    AnyPromise = Promise
else:
    AnyPromise = Annotated[Kinds, Field(discriminator="kind")]
