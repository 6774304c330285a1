"""Memory for hidden states that stays where it is."""

from __future__ import annotations

from vllm_adainfer.exits.batch.hidden_states import HiddenStates


class StateMemory:
    """Memory for up to `rows` rows, allocated like the first states that come.

    States before the first layer have no residual, so they have memory of their own.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._by_form: dict[bool, HiddenStates] = {}

    def like(self, states: HiddenStates) -> HiddenStates:
        """The memory for states with the parts of `states`, of all rows."""
        form = states.residual is None
        if form not in self._by_form:
            self._by_form[form] = states.zeros(self._rows)
        return self._by_form[form]
