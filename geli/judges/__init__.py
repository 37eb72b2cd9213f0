"""Comparing responses by the judgement of people or of a language model. Nothing outside imports this."""
