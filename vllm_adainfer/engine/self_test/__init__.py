"""The self-test: before serving on a device, check the fast paths against a plain reference."""
