"""The error whose message is meant for the user as it stands."""


class AdaInferError(ValueError):
    """A mistake in input, settings or files: one sentence that says what to change."""
