"""Collects conversations as folders in CANDOR's layout, which the three commands read."""

import json
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from apps.chat.talk import Talk
from geli.data.candor import FACES
from geli.data.writer import write_conversation_of_frames
from geli.run.files import atomic_folder, private_folder

BROKEN_OFF = ".broken_off"  # subfolder of unrated conversations; what reads the data skips names that begin with a dot
METADATA_FILE = "metadata.json"


class Collection:
    """The folder that conversations are collected in.

    Args:
        folder: becomes `--data_dir` of the three commands. If it is new, only its owner can read it.
    """

    def __init__(self, folder: Path):
        self.folder, self.broken_off = folder, folder / BROKEN_OFF
        for path in (self.folder, self.broken_off):
            if not path.is_dir():
                private_folder(path)

    def consent_text(self, user: str) -> str:
        """What is stored where. A person must agree to it before a conversation is stored."""
        return (
            f"If you agree, this conversation is stored on this machine, in {self.folder}, under the id {user}: what "
            "you and the AI write, and when; your reactions; your answers at the end. Whoever runs this program can "
            "read it, and train models on it. Nothing is sent anywhere. A conversation without a rating is kept apart, "
            f"in {self.broken_off}. To delete all that is stored under your id: "
            f"python -m apps.chat.forget {user} --data_dir {self.folder}"
        )

    def store(self, talk: Talk) -> Path | None:
        """Writes a conversation, atomically, and returns its folder; None if nothing was said.

        A conversation is finished if it was rated and both have said something. One that was broken off is kept apart.

        Raises:
            ValueError: if its person did not agree. UserError: if it cannot be written.
        """
        if not talk.agreed:
            raise ValueError("a conversation that its person did not agree to store")
        if not talk.turns:
            return None
        finished = talk.answers and len({turn.by_agent for turn in talk.turns if turn.utterance}) == 2
        path = (self.folder if finished else self.broken_off) / talk.id
        with atomic_folder(path, private=True) as temporary:
            write_talk(temporary, talk)
        return path

    def counts(self) -> tuple[int, int]:
        """The numbers of conversations that were finished, and that were broken off."""
        folders = (self.folder, self.broken_off)
        return tuple(sum(p.is_dir() and not p.name.startswith(".") for p in folder.iterdir()) for folder in folders)


def write_talk(folder: Path, talk: Talk) -> None:
    """Writes a conversation in CANDOR's layout, and `metadata.json`, which says what the person talked to.

    The survey has a row for the person alone: the policy rates nothing, so the trajectory with it as the user is
    dropped.
    """
    turns = [(talk.agent if turn.by_agent else talk.user, turn.start, turn.stop, turn.utterance) for turn in talk.turns]
    seen = person_frames(talk)
    # The policy has no face. But readers drop a conversation without any frame, and the person's are not made up.
    frames = {talk.user: seen, talk.agent: [certain("neutral")] * len(seen)}
    write_conversation_of_frames(folder, turns, frames, {talk.user: talk.answers})
    about = {
        "collected": datetime.now(UTC).isoformat(timespec="seconds"),
        "agreed": talk.agreed,
        "policy": talk.partner.name,
        "adapter": talk.partner.tuned and not talk.base,
        "context_turns": talk.partner.context_turns,
        "reward_head": talk.scorer and talk.scorer.name,
        "rewards": talk.rewards(),
        **talk.notes,
    }
    with open(folder / METADATA_FILE, "w", encoding="utf-8", opener=_for_its_owner) as file:
        json.dump(about, file, indent=1)


def talk_record(talk: Talk) -> str:
    """A conversation as JSON, for its person: turns with reactions, rewards and answers."""
    turns = [
        {"speaker": talk.agent if turn.by_agent else talk.user, "start": round(turn.start, 2),
         "stop": round(turn.stop, 2), "text": turn.text, "reaction": turn.reaction}
        for turn in talk.turns
    ]  # fmt: skip
    record = {"id": talk.id, "turns": turns, "rewards": talk.rewards(), "answers": talk.answers}
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def person_frames(talk: Talk) -> list[Sequence[float] | None]:
    """Of each second the probabilities of the person's face; None where nothing is known of it.

    During a reply with a reaction the face is that reaction. Otherwise it is what a camera saw.
    """
    frames = [talk.frames.get(second) for second in range(int(talk.turns[-1].stop) + 1)]
    for turn in talk.replies:
        if turn.reaction:
            seconds = slice(math.ceil(round(turn.start, 2)), int(round(turn.stop, 2)) + 1)  # as they are written
            frames[seconds] = [certain(turn.reaction)] * len(frames[seconds])
    return frames


def certain(face: str) -> list[float]:
    """The probabilities of `FACES` for a face that is sure."""
    return [float(name == face) for name in FACES]


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
