"""What the frontend of a server does for us: request checks, metrics, log lines."""
