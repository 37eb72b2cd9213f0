"""A conversation with a policy in a terminal, or through pipes."""

import io
import signal
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from apps.chat.collect import Collection, talk_record
from apps.chat.survey import question_text
from apps.chat.talk import Talk
from apps.packages import install
from geli.run.errors import UserError
from geli.run.files import atomic_path

try:
    from prompt_toolkit import PromptSession
except ImportError:  # optional: see requirements.txt beside this file
    PromptSession = None

BAR = 10  # characters on either side of 0
QUOTED = 40  # characters of a reply behind its bar


def printable(text: str) -> str:
    """The text with every control character but line ends replaced, so that none reaches the terminal."""
    return "".join(c if c == "\n" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def longest(rewards: Sequence[float]) -> float:
    """The reward of the longest bar: the largest one's size, at least 1."""
    return max([1.0, *map(abs, rewards)])


def reward_bar(reward: float, scale: float) -> str:
    """A reward as a number and a bar, to the left of the middle if it is negative. `scale`: the longest bar's value."""
    length = min(BAR, round(abs(reward) / scale * BAR))
    left, right = ("█" * length, "") if reward < 0 else ("", "█" * length)
    return f"{reward:+.3f} {left:>{BAR}}|{right:<{BAR}}"


def line_reader(on_writing: Callable[[], None]) -> Callable[[str], str]:
    """Reads a line after a question: in a terminal with an editor that knows wide characters, else from stdin.

    Args:
        on_writing: called when somebody begins to write a line that is no command.

    Returns:
        question -> line. It raises EOFError at the end of input, and KeyboardInterrupt for Ctrl-C.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal and PromptSession:
        session = PromptSession()

        def on_text(buffer) -> None:
            if buffer.text and not buffer.text.startswith("/"):
                on_writing()

        session.default_buffer.on_text_changed += on_text
        return lambda question: edited_line(session, question)
    if terminal:
        print(f"prompt_toolkit is not installed, so lines are edited plainly: {install('chat')}")
        return input

    def read(_: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    return read


def edited_line(session: "PromptSession", question: str) -> str:
    """A line from the editor. Ctrl-C while it starts or ends would break asyncio's loop, and counts afterwards."""
    early: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: early.append(number))
    try:
        # `pre_run` is called once the editor has a handler of its own
        line = session.prompt(question, pre_run=lambda: early and session.app.exit(exception=KeyboardInterrupt))
    finally:
        signal.signal(signal.SIGINT, before)
    if early:
        raise KeyboardInterrupt
    return line


@contextmanager
def hang_ups_end_normally() -> Iterator[None]:
    """A closed window (SIGHUP) and SIGTERM end the block by `SystemExit`, so that what follows it is still done."""

    def leave(number: int, _) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Command(NamedTuple):
    """What a line that begins with `/` does: (terminal, its arguments) -> None, and a line of help."""

    run: Callable[["Terminal", str], None]
    help: str
    arguments: str = ""


class Left(Exception):
    """The person wants to leave."""


@dataclass
class Terminal:
    """Talks in a terminal, one after the other.

    Attributes:
        new_talk: makes one. compare: also show what the other policy replies.
        collection: where talks are stored; None: nowhere. reward_class: the question that is the score.
    """

    new_talk: Callable[[], Talk]
    compare: bool
    collection: Collection | None
    reward_class: str

    def run(self) -> None:
        """Talks until the person leaves, by command, at the end of input, or by Ctrl-C."""
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # what is no text, or cannot be shown, becomes a replacement
        self.talk, self.agreed = self.new_talk(), False
        self.read = line_reader(lambda: self.talk.writes())
        print(f"You talk to {self.talk.partner.name}. /help lists the commands.")
        with hang_ups_end_normally():
            try:
                if self.collection:
                    self.ask_for_consent()
                self.talk.agreed = self.agreed
                while True:
                    self.answer(self.read("You: "))
            except (EOFError, KeyboardInterrupt, Left):
                print()
            finally:
                self.store()

    def ask_for_consent(self) -> None:
        """Says what would be stored where, and asks whether it may be."""
        text = self.collection.consent_text(self.talk.user)
        print(textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False))
        self.agreed = self.ask("Do you agree? [yes/no]").strip().lower() in ("y", "yes")
        print("It will be stored." if self.agreed else "Nothing will be stored.")

    def ask(self, question: str) -> str:
        """Asks a question; returns the line that answers it."""
        print(question)
        return self.read("> ")

    def answer(self, line: str) -> None:
        """Does what a line says: a command, or a message."""
        try:
            if line.startswith("/"):
                name, _, arguments = line[1:].partition(" ")
                if name not in COMMANDS:
                    raise UserError(f"unknown command /{name}; /help lists the commands")
                COMMANDS[name].run(self, arguments.strip())
            elif line.strip():
                self.talk.say(line)
                self.show_reply(self.talk.reply())
        except UserError as error:
            print(printable(f"! {error}"))

    def show_reply(self, reply: Iterator[str]) -> None:
        """Shows a reply as it grows, its reward and, with `compare`, what the other policy replies."""
        self.stream("AI: ", reply)
        rewards = self.talk.rewards()
        if rewards:
            print(f"    reward {reward_bar(rewards[-1], longest(rewards))}")
        if self.compare:
            text = self.stream("Base: ", self.talk.other_reply())
            if rewards:
                print(f"    reward {reward_bar(self.talk.reward_instead(text), longest(rewards))}")

    def stream(self, label: str, reply: Iterator[str]) -> str:
        """Prints a reply as it grows; returns all of it."""
        print(label, end="", flush=True)
        shown = text = ""
        for text in reply:
            if text.startswith(shown):
                print(printable(text[len(shown) :]), end="", flush=True)
            else:  # the tokenizer changed what it wrote before
                print(printable(f"\n{label}{text}"), end="", flush=True)
            shown = text
        print()
        return text

    def store(self) -> None:
        """Stores the talk, if its person agreed, and says where."""
        path = self.collection.store(self.talk) if self.talk.agreed else None
        if path:
            finished, broken_off = self.collection.counts()
            print(f"Stored{'' if self.talk.answers else ' as broken off, because it was not rated'}: {path}")
            print(f"{self.collection.folder}: {finished:,} finished, {broken_off:,} broken off")


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def undo(terminal: Terminal, _: str) -> None:
    """Takes the last message back."""
    print(printable(f"Taken back: {terminal.talk.undo()}"))


def retry(terminal: Terminal, _: str) -> None:
    """Asks for another reply."""
    terminal.show_reply(terminal.talk.retry())


def show_rewards(terminal: Terminal, _: str) -> None:
    """Prints the rewards of all replies so far."""
    if not terminal.talk.scorer:
        raise UserError("there is no reward head: name one with --reward_path")
    rewards, replies = terminal.talk.rewards(), terminal.talk.replies
    print(f"{len(rewards):,} rewards by {terminal.talk.scorer.name}:")
    for number, (reward, turn) in enumerate(zip(rewards, replies, strict=True), 1):
        text = turn.utterance if len(turn.utterance) <= QUOTED else f"{turn.utterance[:QUOTED]}…"
        print(printable(f"{number:5} {reward_bar(reward, longest(rewards))} {text}"))


def react(face: str) -> Callable[[Terminal, str], None]:
    """The command that reacts to the last reply with `face`."""

    def run(terminal: Terminal, _: str) -> None:
        terminal.talk.react(face)
        print(f"Noted: {face}")

    return run


def rate(terminal: Terminal, arguments: str) -> None:
    """Answers a question of the survey: `[QUESTION] [ANSWER]`."""
    words = arguments.split()
    question = words.pop(0) if words and not words[0].lstrip("-")[:1].isdigit() else terminal.reward_class
    answer = " ".join(words) or terminal.ask(question_text(question))
    terminal.talk.rate(question, answer)
    print(f"Noted: {question} {terminal.talk.answers[question]:g}. More, if you like: /rate QUESTION ANSWER")
    if not terminal.talk.agreed:
        print("The conversation is not collected; /save writes it to a file.")


def save(terminal: Terminal, arguments: str) -> None:
    """Writes the talk to a file."""
    talk = terminal.talk
    path = Path(arguments or f"talk-{talk.id}.json")
    if arguments and path.exists():
        raise UserError(f"{path} exists; name a new file")
    with atomic_path(path, private=True) as temporary:
        temporary.write_text(talk_record(talk), encoding="utf-8")
    print(f"Written: {path}")


def begin_new(terminal: Terminal, _: str) -> None:
    """Ends the talk, and begins another one of the same person."""
    terminal.store()
    terminal.talk = terminal.new_talk()
    terminal.talk.agreed = terminal.agreed
    print("A new conversation.")


def leave(terminal: Terminal, _: str) -> None:
    """Leaves; offers to rate first if the talk would count as broken off."""
    if terminal.talk.agreed and terminal.talk.replies and not terminal.talk.answers:
        answer = terminal.ask(f"{question_text(terminal.reward_class)} An empty line leaves without a rating.")
        if answer.strip():
            terminal.talk.rate(terminal.reward_class, answer)
    raise Left


def show_help(_: Terminal, __: str) -> None:
    """Lists the commands."""
    for name, command in COMMANDS.items():
        print(f"  {f'/{name} {command.arguments}':26} {command.help}")
    print("  Anything else is a message; so is a line that begins with a space. Ctrl-C and Ctrl-D leave.")


COMMANDS = {
    "undo": Command(undo, "take the last message and the reply to it back"),
    "retry": Command(retry, "another reply to the last message"),
    "smile": Command(react("happiness"), "🙂 about the last reply"),
    "frown": Command(react("sadness"), "☹️ about the last reply"),
    "reward": Command(show_rewards, "the rewards of all replies so far"),
    "rate": Command(rate, "rate the conversation; rated ones are finished", "[QUESTION] [ANSWER]"),
    "save": Command(save, "write the conversation to a JSON file", "[FILE]"),
    "new": Command(begin_new, "end this conversation, and begin another"),
    "quit": Command(leave, "leave"),
    "help": Command(show_help, "this list"),
}
