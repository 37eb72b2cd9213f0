"""The forms in which trainers write prompts and completions, read as the state and the response that a head scores."""

import re
from collections.abc import Sequence

from geli.data.messages import INSTRUCTION, MARKUP, Message, Turns, ends_in_thought, read_messages, spoken
from geli.nets.prompts import Prompt, context_text, prompt_text
from geli.nets.templates import OwnTemplate, read_template

_TURN = re.compile(r"(?:^|(?<=\s))(User|AI): ?")  # begins a turn in the published form
_BEGIN = re.compile(r"^(?:<s>|<bos>|<\|begin_of_text\|>)")


def trajectory_of(turns: Turns, context_turns: int) -> tuple[tuple[str, str], ...]:
    """(context, response) of each turn of the agent, as stages 1 and 2 make them."""
    return tuple(
        (context_text(turns[max(0, i - context_turns) : i]), f"AI: {utterance}")
        for i, (is_agent, utterance) in enumerate(turns)
        if is_agent
    )


def prompt_of_turns(turns: Turns, context_turns: int) -> Prompt:
    """The state after some turns. For a sequential head the turns are the whole trajectory so far."""
    context = context_text(turns[-context_turns:])
    before = trajectory_of(turns, context_turns)
    return Prompt(prompt_text(context), context, "", (*before, (context, "")), len(before), turns=tuple(turns))


def read_prompt(
    prompt: Prompt | str | Sequence[Message], context_turns: int, template: OwnTemplate | None = None
) -> Prompt:
    """A prompt in any form that a trainer gives it.

    - A `Prompt` stays as it is.
    - Chat messages are turns (`read_messages`); the last `context_turns` of them are read.
    - A text in the published form (`INSTRUCTION`, turns as ` User: …` and ` AI: …`, and ` AI:` at the end) is the state
      that it was made from, with all its turns. Another instruction before the first turn is left out.
    - A text that a chat template wrote is read as its messages: by `template`, or one of `FAMILIES`.
    - Any other text is one message of the user.

    Raises:
        UserError: if messages are not chat messages, or there is markup in a text.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        context = published_context(prompt)
        if context is not None:
            parts = _TURN.split(context)[1:]
            turns = [(name == "AI", text.strip()) for name, text in zip(parts[::2], parts[1::2], strict=True)]
            return prompt_of_turns(turns, context_turns)._replace(text=prompt, context=context)
        prompt = read_template(prompt, template) or [{"role": "user", "content": prompt}]
    turns = read_messages(prompt)
    return prompt_of_turns(turns[:-1] if turns[-1:] == [(True, "")] else turns, context_turns)


def read_completion(completion: str | Sequence[Message], prompt: object = None) -> str:
    """The text of a completion: of chat messages, the assistant's. What was only thought is left out, also where the
    prompt has begun the thought, and so is what follows the first markup, which ends a turn."""
    if not isinstance(completion, str):
        return " ".join(utterance for is_agent, utterance in read_messages(completion, cuts=True) if is_agent)
    if isinstance(prompt, str) and ends_in_thought(prompt):
        completion = f"<think>{completion}"
    return MARKUP.split(spoken(completion), maxsplit=1)[0]


def published_context(text: str) -> str | None:
    """The state in a prompt of the published form; None for another form."""
    text = _BEGIN.sub("", text).rstrip()
    if not text.endswith(" AI:") or MARKUP.search(text):
        return None
    text = text.removesuffix(" AI:")
    if text.startswith(INSTRUCTION):
        return text.removeprefix(INSTRUCTION)
    first = _TURN.search(text)
    return f" {text[first.start() :]}" if first else None
