"""Prompts that a tokenizer's chat template wrote, read as their messages, whatever its form."""

import re
from collections.abc import Callable

from geli.data.messages import MARKUP, refuse_markup, spoken
from geli.nets.templates import Messages, check_folded
from geli.run.errors import UserError, first_line


class TokenizerTemplate:
    """Reads what the chat template of a tokenizer wrote.

    The template renders messages with known contents; what stands between these is where texts are split. A reading
    counts only if the template renders it as the same text.

    Args:
        tokenizer: with a chat template. option: that names it, for error messages.

    Raises:
        UserError: if there is no template, or it does not write every message.
    """

    def __init__(self, tokenizer, option: str = "--tokenizer"):
        self._render: Callable = lambda messages, **how: tokenizer.apply_chat_template(messages, tokenize=False, **how)
        self._bos = tokenizer.bos_token or ""
        self._tokens = [re.compile(re.escape(t)) for t in tokenizer.all_special_tokens if not MARKUP.search(t)]
        contents = [f"probe{i}probe" for i in range(5)]
        talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        try:
            parts = self._split(self._render(talk), contents)
            answered = self._split(self._render(talk[:4]), contents[:4])
            if not (parts and answered and parts[1] == parts[3] and parts[2] == parts[4] and parts[1] and parts[2]):
                raise ValueError("it does not write every message in the same way")
        except Exception as error:  # templates are other people's programs
            reason = first_line(error)
            raise UserError(f"{option} {tokenizer.name_or_path}: its chat template is of no use: {reason}") from None
        self._between, self._ends = parts[1:3], (parts[-1], answered[-1])
        self._starts: list[tuple[str, str | None]] = [(parts[0], None)]
        self._folds = None
        try:
            system = self._render([{"role": "system", "content": "probe5probe"}, *talk])
        except Exception:  # a template without system messages
            system = ""
        before, found, after = system.partition("probe5probe")
        separator = re.split(r"probe\dprobe", after)[0]
        if found and (before == parts[0] or "probe0probe" in before):
            self._folds = separator
        elif found:
            self._starts.insert(0, (before, separator))

    @staticmethod
    def _split(text: str, contents: list[str]) -> list[str] | None:
        """The texts around the contents, if each is there once, in order."""
        parts = re.split(r"(probe\dprobe)", text)
        return parts[::2] if parts[1::2] == contents else None

    def __call__(self, text: str) -> Messages | None:
        """The messages; None for a text that this template did not write.

        Raises:
            UserError: for a special token in a text, or one that can be read in two ways.
        """
        messages = self._read(text)
        for content in [text] if messages is None else [message["content"] for message in messages]:
            for token in self._tokens:
                refuse_markup(content, "prompt", token)
        return messages

    def _read(self, text: str) -> Messages | None:
        text = text.removeprefix(self._bos).lstrip()
        for start, separator in self._starts:
            start = start.removeprefix(self._bos).lstrip()
            if not text.startswith(start):
                continue
            messages, rest = [], text.removeprefix(start)
            if separator is not None:
                system, found, rest = rest.partition(separator)
                messages = [{"role": "system", "content": system}]
            messages += self._split_talk(rest)
            if self._writes(messages, text) and (separator is None or found):
                if self._folds and separator is None:
                    check_folded(messages, self._folds)
                return messages
        return None

    def _split_talk(self, rest: str) -> Messages:
        """The messages in a text that begins with the first user message's content."""
        messages, place, found = [], 0, "more"
        while found:
            content, found, rest = rest.partition(self._between[place])
            messages.append({"role": ("user", "assistant")[place], "content": content})
            place = 1 - place
        last, end = messages[-1], self._ends[1 - place]
        last["content"] = last["content"].removesuffix(end).removesuffix(end.rstrip() or end)
        return messages

    def _writes(self, messages: Messages, text: str) -> bool:
        """Whether the template writes these messages as the text, but for spaces and the last message's end."""
        last = messages[-1]
        opened = last["role"] == "assistant" and not spoken(last["content"]).strip()  # a reply has only begun
        try:
            rendered = self._render(messages[:-1], add_generation_prompt=True) if opened else self._render(messages)
        except Exception:  # it refuses such messages
            return False
        written, given = ("".join(t.removeprefix(self._bos).split()) for t in (rendered, text))
        return given.startswith(written) if opened else written.startswith(given)
