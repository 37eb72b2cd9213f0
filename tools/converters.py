"""Converters of corpora into CANDOR's layout, or into rated chats.

A converter is a function that yields the conversations of a corpus, and a row of `CONVERTERS`. It needs no checks of
its own, because `convert` reports any error that odd files cause.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from geli.data.candor import FACES, HAPPINESS, NEGATIVE, Conversation
from geli.data.chats import FORMAT, PAUSE, WORDS_PER_SECOND, Range, open_chats
from geli.data.corpus import common_reasons, read_conversations
from geli.data.questions import QUESTIONS
from geli.data.words import count_words
from geli.run.console import progress_bar
from geli.run.errors import UserError, first_line
from geli.run.files import atomic_path, require_empty_folder
from tools.writer import write_conversation


class NewConversation(NamedTuple):
    """A conversation that is written in CANDOR's layout or as a chat.

    Attributes:
        id: name of its folder.
        turns: (user id, start, stop, utterance), in order, in seconds.
        faces: (user id, start, stop, face class of `FACES`): the user's face from start to stop; it is neutral at other
            times. None: the corpus says nothing of faces.
        answers: user id -> survey question of `QUESTIONS` -> answer, of the users who rated.
        lost: (user id, second) at which nothing is known of a face.
        labels: place of a turn -> people's judgement of it.
    """

    id: str
    turns: list[tuple[str, float, float, str]]
    faces: list[tuple[str, float, float, str]] | None
    answers: dict[str, dict[str, float]]
    lost: set[tuple[str, int]] = frozenset()
    labels: Mapping[int, float] = {}


class Converter(NamedTuple):
    """A corpus that can be converted.

    Attributes:
        read: folder of the corpus -> its conversations. expects: the files that must be in the folder.
        help: one line for `--help`.
    """

    read: Callable[[Path], Iterator[NewConversation]]
    expects: tuple[str, ...]
    help: str


def convert(corpus: str, source: Path, out: Path, rating_range: Range | None = None) -> tuple[int, int]:
    """Writes a corpus; returns the numbers of conversations and turns.

    Args:
        corpus: a key of `CONVERTERS`. source: folder with its files. rating_range: of rated chats.
        out: a new or empty folder, for CANDOR's layout; or a new file that ends with .jsonl or .jsonl.gz, for chats.

    Raises:
        UserError: if a file is missing, or holds something else, or `out` is not empty.
    """
    converter = CONVERTERS[corpus]
    if missing := [name for name in converter.expects if not (source / name).is_file()]:
        raise UserError(f"{source}: expected {', '.join(converter.expects)}; found no {missing[0]}")
    conversations = turns = 0

    def read() -> Iterator[NewConversation]:
        nonlocal conversations, turns
        found = converter.read(source, rating_range) if rating_range else converter.read(source)
        for new in progress_bar(found, desc=f"converting {corpus}", unit="conversation"):
            yield new
            conversations, turns = conversations + 1, turns + len(new.turns)

    try:
        (write_chats if out.name.endswith((".jsonl", ".jsonl.gz")) else write_folders)(read(), out)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        found = f"something else after {conversations} conversations ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"{source}: expected {converter.help}, found {found}") from None
    return conversations, turns


def write_folders(found: Iterable[NewConversation], out: Path) -> None:
    """Writes conversations in CANDOR's layout, and their labels to `out/turn_labels.csv`."""
    require_empty_folder(out)
    labels = []
    for new in found:
        write_conversation(out / new.id, new.turns, new.faces, new.answers, new.lost)
        labels += [(new.id, place, label) for place, label in new.labels.items()]
    if labels:
        table = pd.DataFrame(labels, columns=["conversation_id", "turn_id", "label"])
        table.to_csv(out / "turn_labels.csv", index=False)


def write_chats(found: Iterable[NewConversation], out: Path) -> None:
    """Writes conversations as rated chats, in points of 0 to 100. The face that a listener shows from a turn's start to
    its stop becomes a reaction."""
    if out.exists():
        raise UserError(f"{out}: exists already; name another file, or remove it")
    with atomic_path(out, private=True) as temporary, open_chats(temporary, "wb") as file:
        file.write(f"{json.dumps({'format': FORMAT, 'rating_range': [0, 100]})}\n".encode())
        for new in found:
            file.write(f"{json.dumps(chat_of(new), ensure_ascii=False)}\n".encode())


def chat_of(new: NewConversation) -> dict:
    """A conversation as a line of rated chats."""
    faces = {(start, stop): (user, FACES.index(face)) for user, start, stop, face in new.faces or ()}
    messages = []
    for place, (user, start, stop, text) in enumerate(new.turns):
        listener, face = faces.get((start, stop), (user, None))
        reaction = {} if listener == user else {1: {"reaction": 1}, -1: {"reaction": -1}}.get(
            (face == HAPPINESS) - (face in NEGATIVE), {}
        )  # fmt: skip
        label = {"turn_rating": new.labels[place]} if place in new.labels else {}
        messages.append({"role": user, "content": text, "time": start, **reaction, **label})
    ratings = {
        user: {question: QUESTIONS[question].points * answer for question, answer in given.items()}
        for user, given in new.answers.items()
    }
    return {"id": new.id, "messages": messages, "ratings": ratings}


# ---------------------------------------------------------------------------------------------------------------------
# What the three commands read: CANDOR's layout and rated chats

FOLDER_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


def read_corpus_again(source: Path, rating_range: Range | None = None) -> Iterator[NewConversation]:
    """The conversations of a folder in CANDOR's layout or of rated chats. A chat whose id cannot name a folder gets a
    number."""
    conversations, dropped = read_conversations(source, rating_range=rating_range)
    if dropped:
        print(f"Dropped {len(dropped):,} conversations: {common_reasons(dropped)}")
    for number, conversation in enumerate(conversations):
        named = FOLDER_NAME.fullmatch(conversation.id)
        yield _again(conversation, conversation.id if named else f"chat-{number:06}")


def _again(conversation: Conversation, name: str) -> NewConversation:
    first, second = conversation.speakers
    faces, unseen = [], set(conversation.unseen)
    for place, turn in enumerate(conversation.turns):
        shown = turn.reaction or (place not in unseen and (turn.affect == HAPPINESS) - (turn.affect in NEGATIVE))
        if shown:
            listener = second if turn.speaker == first else first
            faces.append((listener, turn.start, turn.stop, "happiness" if shown > 0 else "sadness"))
    seconds = range(int(conversation.turns[-1].stop) + 1)
    lost = {(user, s) for user in conversation.speakers for s in seconds
            if not any(user == who and start <= s <= stop for who, start, stop, _ in faces)}  # fmt: skip
    return NewConversation(
        name, [(t.speaker, t.start, t.stop, t.utterance) for t in conversation.turns], faces or None,
        conversation.answers, lost, {i: t.rating for i, t in enumerate(conversation.turns) if t.rating is not None},
    )  # fmt: skip


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


def read_dstc9(source: Path) -> Iterator[NewConversation]:
    """The chats of DSTC9's interactive evaluation, whose raters' mean becomes overall_affect."""
    return read_corpus_again(source / "chats.jsonl", (1, 5))


CONVERTERS = {
    "casino": Converter(
        read_casino, CASINO_FILES, "the JSON files of CaSiNo (negotiations; Chawla et al., NAACL 2021; CC BY 4.0)"
    ),
    "dstc9": Converter(
        read_dstc9,
        ("chats.jsonl",),
        "chats.jsonl, people with chatbots, rated 1 to 5 (DSTC9; Gunasekara et al., 2020)",
    ),
    "rated-chats": Converter(read_corpus_again, (), "a JSONL file of rated chats, or a folder of them"),
    "candor": Converter(read_corpus_again, (), "a folder in CANDOR's layout"),
}
