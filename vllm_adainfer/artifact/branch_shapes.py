"""The shapes of a branch, a transformer layer of its own at an exit point. Needs no torch."""

from __future__ import annotations

MOST_BRANCH_TOKENS = 512  # the last ones of a prompt, which a branch reads
BRANCH_WIDTH = 192
BRANCH_HEADS = 3
BRANCH_MLP = 384


def branch_shapes(hidden_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a branch's parameters by name; it reads states of this width."""
    linear = {
        "project": (BRANCH_WIDTH, hidden_size),
        "attention_in": (3 * BRANCH_WIDTH, BRANCH_WIDTH),
        "attention_out": (BRANCH_WIDTH, BRANCH_WIDTH),
        "mlp_in": (BRANCH_MLP, BRANCH_WIDTH),
        "mlp_out": (BRANCH_WIDTH, BRANCH_MLP),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in "attention_norm", "mlp_norm":
        shapes |= {f"{name}.weight": (BRANCH_WIDTH,), f"{name}.bias": (BRANCH_WIDTH,)}
    return shapes
