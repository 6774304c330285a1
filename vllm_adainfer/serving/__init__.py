"""What frontends do for us (request checks, metrics, log lines), and `doctor`."""
