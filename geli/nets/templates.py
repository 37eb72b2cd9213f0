"""Texts that chat templates wrote, read as their messages."""

import re
from collections.abc import Callable
from typing import NamedTuple

from geli.data.messages import INSTRUCTION, MARKUP, refuse_markup, spoken
from geli.run.errors import UserError

Messages = list[dict[str, str]]  # [{"role": "user", "content": "Hello"}]
OwnTemplate = Callable[[str], Messages | None]  # as `apps.serve.template.TokenizerTemplate`

# where a reply begins in a text with words for markup (Vicuna's and others'), or that has lost its special tokens
_CUE = re.compile(
    r"(?:\bASSISTANT:|(?:^|\n)[ \t]*(?:Assistant|assistant|Bot|Response) ?:|\n[ \t]*(?:assistant|model))$"
)

# ---------------------------------------------------------------------------------------------------------------------
# Templates in wide use


class Family(NamedTuple):
    """A form of chat templates.

    Attributes:
        message: of a message, with groups `role` and `content`, or of several, with groups named by their roles. Its
            end may be missing behind the last one.
        start: what may stand before the first one. folds: whether it writes a system message into a message of the
            user, with an empty line between them.
    """

    message: str
    start: str = ""
    folds: bool = False


# tokens before each message, and those behind the last one, which also pad texts on the left
_BEGIN = r"(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<\uff5cbegin▁of▁sentence\uff5c>|\s)*"
_PADS = r"(?:</s>|<eos>|<pad>|<\|(?:endoftext|end_of_text|eot_id|im_end|pad|finetune_right_pad_id)\|>|\s)*"
_END = re.compile(rf"{_PADS}\Z")
FAMILIES = {
    "ChatML, Qwen-2, Qwen-3, SmolLM, Phi-4": Family(
        r"<\|im_start\|>(?P<role>\w+)(?:\n|<\|im_sep\|>)(?P<content>.*?)(?:<\|im_end\|>|\Z)"
    ),
    "Llama-3": Family(r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>\n\n(?P<content>.*?)(?:<\|eot_id\|>|\Z)"),
    "Gemma": Family(r"<start_of_turn>(?P<role>\w+)\n(?P<content>.*?)(?:<end_of_turn>|\Z)", folds=True),
    "Phi-3": Family(r"<\|(?P<role>system|user|assistant)\|>(?P<content>.*?)(?:<\|end\|>|\Z)"),
    "Zephyr": Family(r"<\|(?P<role>system|user|assistant)\|>\n(?P<content>.*?)(?:</s>|\Z)"),
    "Llama-2, Mistral": Family(
        r"(?:\[SYSTEM_PROMPT\].*?\[/SYSTEM_PROMPT\])?\[INST\](?: ?<<SYS>>\n(?P<system>.*?)\n<</SYS>>\n\n)?"
        r"(?P<user>.*?)\[/INST\](?P<assistant>.*?)(?:</s>|\Z)",
        folds=True,
    ),
    "DeepSeek": Family(
        r"(?:<\uff5cUser\uff5c>(?P<user>.*?))?"
        r"(?:<\uff5cAssistant\uff5c>(?P<assistant>.*?)(?:<\uff5cend▁of▁sentence\uff5c>|\Z)|\Z)",
        start=r"[^<]*",
    ),
}
_ROLES = {"model": "assistant", "human": "user"}  # another family's name -> ours


def read_template(text: str, own: OwnTemplate | None = None) -> Messages | None:
    """The messages of a text that a chat template wrote, the last of them perhaps empty; None for a text without
    markup.

    Args:
        own: reads the template of the tokenizer that wrote it, and is tried before `FAMILIES`.

    Raises:
        UserError: for markup of another form, or a text that can be read in two ways.
    """
    messages = own(text) if own else None
    for family in FAMILIES.values() if messages is None else ():
        messages = _read_family(text, family)
        if messages is not None:
            break
    if messages is None:
        refuse_markup(text, "prompt")
        refuse_markup(text.rstrip(), "prompt", _CUE)
    return messages


def _read_family(text: str, family: Family) -> Messages | None:
    message, messages = re.compile(_BEGIN + family.message, re.DOTALL), []
    place = re.compile(_PADS + _BEGIN + family.start).match(text).end()
    while found := message.match(text, place):
        groups = found.groupdict()
        named = [(groups["role"], groups["content"])] if "role" in groups else groups.items()
        messages += [{"role": _ROLES.get(r.lower(), r.lower()), "content": c} for r, c in named if c is not None]
        if found.end() == place:
            break
        place = found.end()
    if not messages or not _END.match(text, place) or any(MARKUP.search(spoken(m["content"])) for m in messages):
        return None
    if family.folds and not any(m["role"] == "system" for m in messages):
        check_folded(messages, "\n\n")
    return messages


def check_folded(messages: Messages, separator: str) -> None:
    """Refuses user's messages that may hold one of the system. Stage 3's instruction is known (`read_messages`)."""
    texts = [message["content"] for message in messages if message["role"] == "user"]
    if any(separator in text for text in texts) and not any(text.strip().startswith(INSTRUCTION) for text in texts):
        raise UserError(
            "prompt: its chat template writes system messages into the user's, so of text with an empty line in it "
            "nobody can tell which is which: send chat messages"
        )
