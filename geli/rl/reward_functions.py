"""Rewards that are Python functions of the user's own."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

import torch

from geli.nets.prompts import Prompt
from geli.run.errors import UserError, first_line


class FunctionScorer:
    """Scores responses with a function: (prompts, responses) -> (n,) float32 rewards.

    Args:
        name: `module:function`. The module is searched in the working directory and on Python's path; the function maps
            n `Prompt`s and n responses (without `AI:`) to n numbers.
        option: that names it, for error messages.

    Raises:
        UserError: if there is no such function.
    """

    def __init__(self, name: str, option: str):
        module, _, function = name.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            self.function: Callable = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"{option} {name}: expected MODULE:FUNCTION on Python's path: {first_line(error)}"
            ) from None
        self.name = f"{option} {name}"

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        """(n,) rewards, on the CPU. Raises a `UserError` if the function does not return n numbers."""
        rewards = self.function(prompts, responses)
        try:
            rewards = torch.as_tensor(rewards, dtype=torch.float32).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.name}: expected numbers, found something else: {first_line(error)}") from None
        if rewards.shape != (len(responses),):
            raise UserError(
                f"{self.name}: expected {len(responses)} numbers, one a response, found shape {tuple(rewards.shape)}"
            )
        return rewards
