"""The prompts of stage 3: states of real conversations, as the policy and the reward see them."""

from typing import NamedTuple

from geli.nets.options import INSTRUCTION


class Prompt(NamedTuple):
    """A state of a real conversation.

    Attributes:
        text: input of the policy. context: input of the reward's encoder. human: the human's response.
        trajectory: (context, response) of all agent turns of its trajectory (one tuple that its prompts share).
        position: index of this turn in `trajectory`; rewards that depend on earlier turns see those before it.
        name: conversation/flip/turn_id.
    """

    text: str
    context: str
    human: str
    trajectory: tuple[tuple[str, str], ...] = ()
    position: int = 0
    name: str = ""


def prompt_text(context: str) -> str:
    """The input of the policy: the instruction, the last turns, and ` AI:`, after which it responds."""
    return f"{INSTRUCTION}{context} AI:"
