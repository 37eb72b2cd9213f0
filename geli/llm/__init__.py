"""A language model shares scores out over the turns. Nothing outside imports this."""
