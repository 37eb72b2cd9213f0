"""People's own conversations: talked with a policy and collected, or recorded calls. Nothing outside imports this."""
