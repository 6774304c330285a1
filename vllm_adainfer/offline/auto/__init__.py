"""The trainer of a server that calibrates itself: recorded rows in, certified artifacts out."""
