"""Talks with a policy, and collects what is said as training data."""
