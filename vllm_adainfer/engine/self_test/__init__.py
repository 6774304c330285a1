"""The self-test: before serving on a device, compare fast paths with plain ones."""
