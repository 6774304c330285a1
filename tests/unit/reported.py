"""What an engine reports to its frontends."""

from __future__ import annotations

from typing import Any


def report(*added: Any, serving: Any = (), **state: Any) -> dict[str, Any]:
    """Counts that were `added`; of `state`, what is a list is what shadow requests show."""
    shadow = {name: one for name, one in state.items() if isinstance(one, list)}
    others = {name: one for name, one in state.items() if name not in shadow}
    before = {
        "weights_differ": False,
        "failed_parts": (),
        "not_tested": "",
        "changed_at_most": {},
        "all_changed_at_most": None,
    }
    return {"added": [*added], "serving": [*serving], "shadow": shadow, **before, **others}


def reading(epsilon: float, checked: int, disagreed: int, **more: Any) -> dict[str, Any]:
    """What shadow requests of a policy show at a bound."""
    rate = disagreed / max(checked, 1)
    rest = {"rate": rate, "low": 0.0, "high": 1.0, "tightened": False, **more}
    return {"epsilon": epsilon, "checked": checked, "disagreed": disagreed, **rest}
