"""Turn-level rewards from conversation-level scores: what the three training commands are built from."""
