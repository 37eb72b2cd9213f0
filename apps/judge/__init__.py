"""People and language models compare two policies."""
