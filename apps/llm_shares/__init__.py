"""A language model shares scores out over turns."""
