"""Reinforcement learning: prompts, rollouts, TRL's trainers, outputs of stage 3."""
