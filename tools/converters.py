"""Converters of other corpora into CANDOR's layout.

A converter is a function that yields the conversations of a corpus, and a row of `CONVERTERS`. It needs no checks of
its own, because `convert` reports any error that odd files cause.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from geli.data.words import count_words
from geli.run.console import progress_bar
from geli.run.errors import UserError, first_line
from geli.run.files import require_empty_folder
from tools.writer import write_conversation


class NewConversation(NamedTuple):
    """A conversation that is written in CANDOR's layout.

    Attributes:
        id: name of its folder.
        turns: (user id, start, stop, utterance), in order, in seconds.
        faces: (user id, start, stop, face class of `FACES`): the user's face from start to stop; it is neutral at other
            times. None: the corpus says nothing of faces.
        answers: user id -> survey question of `QUESTIONS` -> answer, of the users who rated.
    """

    id: str
    turns: list[tuple[str, float, float, str]]
    faces: list[tuple[str, float, float, str]] | None
    answers: dict[str, dict[str, float]]


class Converter(NamedTuple):
    """A corpus that can be converted.

    Attributes:
        read: folder of the corpus -> its conversations. expects: the files that must be in the folder.
        help: one line for `--help`.
    """

    read: Callable[[Path], Iterator[NewConversation]]
    expects: tuple[str, ...]
    help: str


def convert(corpus: str, source: Path, out: Path) -> tuple[int, int]:
    """Writes a corpus as one folder a conversation below `out`; returns the numbers of conversations and turns.

    Args:
        corpus: a key of `CONVERTERS`. source: folder with its files. out: a new or empty folder.

    Raises:
        UserError: if a file is missing, or holds something else, or `out` is not empty.
    """
    converter = CONVERTERS[corpus]
    if missing := [name for name in converter.expects if not (source / name).is_file()]:
        raise UserError(f"{source}: expected {', '.join(converter.expects)}; found no {missing[0]}")
    require_empty_folder(out)
    conversations = turns = 0
    try:
        for new in progress_bar(converter.read(source), desc=f"converting {corpus}", unit="conversation"):
            write_conversation(out / new.id, new.turns, new.faces, new.answers)
            conversations, turns = conversations + 1, turns + len(new.turns)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        found = f"something else after {conversations} conversations ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"{source}: expected {converter.help}, found {found}") from None
    return conversations, turns


# ---------------------------------------------------------------------------------------------------------------------
# CaSiNo

CASINO_FILES = ("casino_train.json", "casino_valid.json", "casino_test.json")
BUTTONS = {"Submit-Deal", "Accept-Deal", "Reject-Deal", "Walk-Away"}  # messages that are no utterances
EMOTICONS = {"🙂": "happiness", "☹": "sadness", "😡": "anger", "😮": "surprise"}
_EMOTICON = re.compile("([" + "".join(EMOTICONS) + "])\ufe0f?")  # some are followed by a variation selector
LEVELS = {
    "Extremely dissatisfied": 1, "Slightly dissatisfied": 3, "Undecided": 5,
    "Slightly satisfied": 7, "Extremely satisfied": 9,
    "Extremely dislike": 1, "Slightly dislike": 3, "Slightly like": 7, "Extremely like": 9,
}  # fmt: skip
ANSWERS = {
    "overall_affect": "opponent_likeness",
    "i_like_you": "opponent_likeness",
    "how_enjoyable": "satisfaction",
    "end_affect": "satisfaction",
}
WORDS_PER_SECOND, PAUSE = 2.5, 0.5  # CaSiNo has no times


def read_casino(source: Path) -> Iterator[NewConversation]:
    """The dialogues of CaSiNo's three files."""
    for name in CASINO_FILES:
        yield from map(casino_dialogue, json.loads((source / name).read_text(encoding="utf-8")))


def casino_dialogue(dialogue: dict) -> NewConversation:
    """One of CaSiNo's dialogues.

    A person's answers on the opponent's likeness become overall_affect and i_like_you, those on satisfaction
    how_enjoyable and end_affect. The first emoticon in a person's utterance is that person's face during the turn
    before it.
    """
    conversation_id = f"casino-{int(dialogue['dialogue_id']):04d}"
    user_of = {name: f"{conversation_id}-{name}" for name in sorted(dialogue["participant_info"])}
    utterances = [message for message in dialogue["chat_logs"] if message["text"] not in BUTTONS]
    turns, faces, clock = [], [], 0.0
    for i, message in enumerate(utterances):
        text = " ".join(_EMOTICON.sub(" ", message["text"]).split())
        start, stop = clock, clock + count_words(text) / WORDS_PER_SECOND
        clock = stop + PAUSE
        turns.append((user_of[message["id"]], start, stop, text))
        following = utterances[i + 1] if i + 1 < len(utterances) else None
        if following is not None and following["id"] != message["id"]:
            shown = _EMOTICON.search(following["text"])
            if shown:
                faces.append((user_of[following["id"]], start, stop, EMOTICONS[shown.group(1)]))
    answers = {
        user_of[name]: {
            question: LEVELS[person["outcomes"][field]]
            for question, field in ANSWERS.items()
            if person["outcomes"].get(field) in LEVELS
        }
        for name, person in dialogue["participant_info"].items()
    }
    return NewConversation(conversation_id, turns, faces, answers)


CONVERTERS = {
    "casino": Converter(
        read_casino, CASINO_FILES, "the JSON files of CaSiNo (negotiations; Chawla et al., NAACL 2021; CC BY 4.0)"
    ),
}
