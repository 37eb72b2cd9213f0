"""Experiments in which the true reward is known: planted truth, and the closed loop. Nothing outside imports this."""
