"""Rewards for other trainers, over HTTP, and for whole folders of conversations. Nothing outside imports this, except
`from geli import GELIReward`."""
