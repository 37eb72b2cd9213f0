"""Makes conversations in CANDOR's layout of recorded calls."""
