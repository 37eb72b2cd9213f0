"""Text encoder, policy, and loading their files safely."""
