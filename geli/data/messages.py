"""Chat messages as the utterances of a conversation, without what models only thought."""

import re
from collections.abc import Iterator, Mapping, Sequence

from geli.run.errors import UserError, one_line

Turns = list[tuple[bool, str]]  # (is_agent, utterance) of each turn
Message = Mapping[str, str]  # {"role": "user", "content": "Hello"}

ROLES = {"user": False, "assistant": True}  # -> whether its messages are the agent's turns
UNREAD_ROLES = ("system", "developer")  # heads have read conversations without instructions

# the text that every prompt begins with; a prompt that is too long keeps it
INSTRUCTION = (
    "You are AI, in a casual social conversation with a User. Be polite, kind and honest, do not swear, and answer in "
    "under 100 words."
)

# What chat templates and tokenizers write around text, in known forms and in those that unknown ones are likely to have
MARKUP = re.compile(
    r"<[|\uff5c][^<>|\uff5c\n]{1,40}[|\uff5c]>|<\|\w{1,30}>|<\w{1,30}\|>|\[\|\w{1,30}\|\]"  # <|user|>, <|turn>
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|THINK|gMASK)\]|<</?SYS>>"
    r"|</?(?:s|bos|eos|pad|sop|eop|think)>|<(?:start|end)_of_(?:turn|role|text)>|<(?:extra_id|reserved)_\d+>"
    r"|^#{2,3} ?(?:Instruction|Response|Input|Human|Assistant|User|System)s?:",
    re.MULTILINE,
)
_THOUGHT_BEGINS = re.compile(r"<think>|\[THINK\]|<\|channel\|>analysis<\|message\|>")
_THOUGHT_ENDS = re.compile(r"</think>|\[/THINK\]|<\|channel\|>final<\|message\|>")


def spoken(text: str) -> str:
    """What of a reply is not thought: what follows its last thought, without one that has not ended."""
    return _THOUGHT_BEGINS.split(_THOUGHT_ENDS.split(text)[-1], maxsplit=1)[0]


def is_empty_thought(text: str) -> bool:
    """Whether the text is a thought, in which there need be nothing, and no more."""
    return bool(_THOUGHT_ENDS.search(text)) and not spoken(text).strip()


def ends_in_thought(text: str) -> bool:
    """Whether a thought has begun in the text and has not ended."""
    return bool(_THOUGHT_BEGINS.search(_THOUGHT_ENDS.split(text)[-1]))


def refuse_markup(text: str, place: str, markup: re.Pattern = MARKUP) -> None:
    """Refuses text that still holds markup: its reward would be that of the markup.

    Raises:
        UserError: with what was found. `place`: where.
    """
    if found := markup.search(text):
        raise UserError(
            f"{place}: expected text without a chat template's markup, found {one_line(found[0])!r}: send chat "
            "messages, or name the policy's tokenizer (--tokenizer of the server, GELIReward.template)"
        )


def utterances(
    messages: Sequence[Message], cuts: bool = False, names: bool = False
) -> Iterator[tuple[Message, int, str, str]]:
    """(message, place, role, text) of chat messages. System messages are left out, and what the assistant only thought.

    Args:
        cuts: cut a text before markup, as what a policy wrote is, instead of refusing it.
        names: whether roles may be names, too.

    Raises:
        UserError: for anything but messages of system, user and assistant with a text without markup each.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise UserError(f"expected a list of chat messages, found {type(messages).__name__}")
    for place, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        known = isinstance(role, str) and (role in ROLES or role in UNREAD_ROLES or (names and role.strip()))
        if not known or not isinstance(content, str):
            raise UserError(
                f'message {place}: expected {{"role": "user" or "assistant" or "system", "content": text}}, found '
                + (f"role {role!r}, content of type {type(content).__name__}"[:100] if role else "something else")
            )
        if role not in UNREAD_ROLES:
            text = content.strip().removeprefix(INSTRUCTION) if role == "user" else spoken(content)
            text = MARKUP.split(text, maxsplit=1)[0] if cuts else text
            if "<" in text or "[" in text or "#" in text:  # as all markup begins
                refuse_markup(text, f"message {place}")
            yield message, place, role.strip(), text.strip()


def read_messages(messages: Sequence[Message], cuts: bool = False) -> Turns:
    """The turns of chat messages of user and assistant (see `utterances`)."""
    return [(ROLES[role], text) for _, _, role, text in utterances(messages, cuts)]
