"""Measures saved reward heads on held-out conversations, with intervals, and draws what they learned."""
