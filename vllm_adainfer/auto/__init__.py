"""A server that calibrates itself: kinds of requests, their files, and the ledger of a promise."""
