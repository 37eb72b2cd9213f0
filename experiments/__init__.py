"""Experiments that show that it works, and their modules."""
